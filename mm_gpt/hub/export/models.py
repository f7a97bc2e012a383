"""Whole models as Hugging Face folders: relatives of LLaVA and Qwen-VL, Idefics3, PaliGemma, Gemma 3, by structure.

Names of tensors and files are laid out as in the published repositories, which every version of transformers and vLLM
reads.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub.decoders import decoder_table
from mm_gpt.hub.export.decoders import CLASSES, decoder_values, essence
from mm_gpt.hub.export.layout import CHATML, INSTEAD, Export, image_values, with_template, with_tokens
from mm_gpt.hub.export.qwen_vl import qwen_vl_export
from mm_gpt.hub.families import FAMILIES, Import, gemma3
from mm_gpt.hub.vision_towers import vit_table
from mm_gpt.hub.weights import same
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.native_vit import NativeViTConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

LLAVA = {
    None: ("llava", "LlavaForConditionalGeneration", "LlavaProcessor"),
    "anyres": ("llava_next", "LlavaNextForConditionalGeneration", "LlavaNextProcessor"),
    "anyres_max": ("llava_onevision", "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor"),
}
"""By the kind of tiling: model type, its class and its processor."""
LLAVA_TEXTS = ("llama", "mistral", "qwen2", "qwen3")
"""GPT-2's class does not take part, and Gemma's would scale the images along with the words."""
MARKS = ("<|image_begin|>", "<image>", "<|image_end|>")
"""What the three ids behind the vocabulary become: the image's begin, each of its tokens, its end."""
READING = ("prefix_lm", "bidirectional_images")
"""What a model may read in both directions."""
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def whole_export(model: MMGPT, processor: Processor) -> tuple[MMGPT, Processor, Export]:
    """The plan, and what it is for: a model with image marks behind its vocabulary gets them inside first.

    Raises CheckpointError for a structure that no family has.
    """
    vision, connector = model.config.vision, model.config.connector
    assert vision is not None
    assert connector is not None
    if isinstance(vision.model, NativeViTConfig) and connector.kind == "merger":
        return model, processor, qwen_vl_export(model, processor, vision.model)
    if not isinstance(vision.model, ViTConfig):
        raise CheckpointError(f"vision encoder {vision.model!r} has no counterpart in a Hugging Face class; {INSTEAD}")
    plans = {"mlp": _llava, "pixel_shuffle": _idefics3, "linear": _paligemma, "pool": _gemma3}
    if connector.kind not in plans:
        raise CheckpointError(f"connector {connector.kind!r} has no counterpart in a Hugging Face class; {INSTEAD}")
    hidden: tuple[int, ...] = ()
    if model.config.image_token_id is None:
        if connector.kind != "mlp":
            raise CheckpointError(
                f"begin and end marks of images have no counterpart in the Hugging Face classes with connector "
                f"{connector.kind!r}, whose processors write others; {INSTEAD}"
            )
        model, processor = with_marks_inside(model, processor)
        hidden = tuple(processor.tokenizer.special[token] for token in MARKS)
    plan = plans[connector.kind](model, processor)
    return model, processor, dataclasses.replace(plan, hidden_ids=hidden)


def with_marks_inside(model: MMGPT, processor: Processor) -> tuple[MMGPT, Processor]:
    """The same model with its three ids for images inside the vocabulary, as special tokens.

    Logits of all other ids stay as they are. The placeholder's rows are zero: its embedding is never looked up.
    """
    taken = [token for token in MARKS if processor.tokenizer.backend.token_to_id(token) is not None]
    if taken:
        raise CheckpointError(f"the vocabulary has a token {taken[0]!r} already; {INSTEAD}")
    if processor.template is not None:
        raise CheckpointError(f"a chat template that knows no image token cannot be exported with images; {INSTEAD}")
    tokenizer = with_tokens(processor.tokenizer, MARKS)
    begin, placeholder, end = (tokenizer.special[token] for token in MARKS)
    old = model.decoder
    config = dataclasses.replace(old.config, vocab_size=max(old.config.vocab_size, end + 1))
    with torch.device("meta"):
        decoder = Decoder(config)
        inside = MMGPT(dataclasses.replace(model.config, decoder=config, image_token_id=placeholder), decoder)
    decoder.blocks, decoder.norm = old.blocks, old.norm
    if config.positions == "learned":
        decoder.position_embedding = old.position_embedding
    inside.vision, inside.connector, inside.image_newline = model.vision, model.connector, model.image_newline
    assert model.image_marks is not None
    # A decoder multiplies its embeddings, but not the marks.
    marks = torch.zeros(3, config.width)
    marks[0::2] = model.image_marks.detach().float() / config.embedding_scale
    for name, rows in (("embedding", marks), ("head", torch.zeros_like(marks))):
        if (matrix := getattr(old, name)) is not None:
            table = torch.zeros(config.vocab_size, config.width)
            table[: len(matrix.weight)] = matrix.weight.detach()
            table[begin : end + 1] = rows
            getattr(decoder, name).weight = nn.Parameter(table)
    source = CHATML.replace("IMAGE", f"'{''.join(MARKS)}'")
    text = ImageTextConfig(token=MARKS[1])
    return inside.eval(), with_template(processor, source, tokenizer, image_text=text)


# ---- Families ----


def _llava(model: MMGPT, processor: Processor) -> Export:
    vision, tower, connector, image = _parts(model, processor)
    tiling = model.config.tiling
    if tiling is not None and tiling.kind not in LLAVA:
        raise CheckpointError(f"tiling {tiling.kind!r} with connector 'mlp' has no counterpart; {INSTEAD}")
    kind, name, processor_name = LLAVA[None if tiling is None else tiling.kind]
    text = decoder_values(model.decoder.config, kinds=LLAVA_TEXTS)
    text["architectures"] = [CLASSES[text["model_type"]]]
    strategy = "default" if tower.class_token and not vision.include_class_token else "full"
    values: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "text_config": text,
        "vision_config": _vit_values(tower, "clip_vision_model" if tower.class_token else "siglip_vision_model"),
        "image_token_index": model.config.image_token_id,
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": connector.bias,
        "tie_word_embeddings": model.decoder.config.tie_embeddings,
    }
    prepared = image_values(image) | _size_values(image)
    own: dict[str, Any] = {
        "processor_class": processor_name,
        "image_token": _image_token(processor),
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(tower.class_token),
    }
    files: dict[str, dict[str, Any]] = {}
    if tiling is None:
        values["image_seq_length"] = processor.config.tokens_per_image
    else:
        pinpoints = [list(pair) for pair in tiling.pinpoints]
        values["image_grid_pinpoints"] = pinpoints
        prepared |= {"image_grid_pinpoints": pinpoints, "do_pad": True}
        prepared["image_processor_type"] = processor_name.replace("Processor", "ImageProcessor")
    if kind == "llava_next":
        prepared |= {"size": {"shortest_edge": image.size}, "crop_size": _square(image.size), "do_center_crop": True}
    if tiling is not None and kind == "llava_onevision":
        own["num_image_tokens"] = own.pop("num_additional_image_tokens") + tower.num_patches
        del own["patch_size"]
        own["vision_aspect_ratio"] = values["vision_aspect_ratio"] = f"anyres_max_{tiling.max_tiles}"
        shared = {key: value for key, value in prepared.items() if key != "image_grid_pinpoints"}
        files["video_preprocessor_config.json"] = shared | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    files |= {"preprocessor_config.json": prepared, "processor_config.json": own}
    tables = {
        "decoder": decoder_table(
            text["model_type"], prefix="language_model.model.", head="language_model.lm_head.weight"
        ),
        "vision.tower": vit_table("vision_tower.vision_model."),
        "connector": {
            f"fc{number}.{part}": same(f"multi_modal_projector.linear_{number}.{part}")
            for number in (1, 2)
            for part in ("weight", "bias")
        },
    }
    if tiling is not None:
        tables[""] = {"image_newline": same("image_newline")}
    return Export(values=values, tables=tables, files=files)


def _idefics3(model: MMGPT, processor: Processor) -> Export:
    _, tower, connector, image = _parts(model, processor)
    tiling = processor.config.tiling
    if tiling is None or tiling.kind != "idefics3":
        kind = "none" if tiling is None else repr(tiling.kind)
        raise CheckpointError(f"connector 'pixel_shuffle' with tiling {kind} has no counterpart; {INSTEAD}")
    text = decoder_values(model.decoder.config, kinds=("llama",))
    values = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "text_config": text | {"architectures": [CLASSES["llama"]], "pad_token_id": None},
        "vision_config": _vit_values(tower, "idefics3_vision"),
        "image_token_id": model.config.image_token_id,
        "scale_factor": connector.scale,
        "tie_word_embeddings": model.decoder.config.tie_embeddings,
        "pad_token_id": None,
    }
    prepared = image_values(image) | {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": tiling.longest_edge},
        "max_image_size": {"longest_edge": image.size},
        "do_image_splitting": tiling.split,
        "do_convert_rgb": True,
        "do_pad": True,
    }
    own = {"processor_class": "Idefics3Processor", "image_seq_len": processor.config.tokens_per_image}
    return Export(
        values=values,
        tables={
            "decoder": decoder_table("llama", prefix="model.text_model."),
            "vision.tower": vit_table("model.vision_model."),
            "connector": {"projection.weight": same("model.connector.modality_projection.proj.weight")},
        },
        files={"preprocessor_config.json": prepared, "processor_config.json": own},
    )


def _paligemma(model: MMGPT, processor: Processor) -> Export:
    _, tower, _, image = _parts(model, processor)
    text = decoder_values(model.decoder.config, kinds=("gemma", "gemma2"))
    width, tokens = model.decoder.config.width, processor.config.tokens_per_image
    values = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "text_config": text | {"architectures": [CLASSES[text["model_type"]]], "num_image_tokens": tokens},
        "vision_config": _vit_values(tower, "siglip_vision_model") | {"projection_dim": width},
        "image_token_index": model.config.image_token_id,
        "hidden_size": width,
        "projection_dim": width,
        "tie_word_embeddings": model.decoder.config.tie_embeddings,
    }
    prepared = image_values(image) | {
        "image_processor_type": "SiglipImageProcessor",
        "size": _square(image.size),
        "image_seq_length": tokens,
    }
    return Export(
        values=values,
        tables={
            "decoder": decoder_table(
                text["model_type"], prefix="language_model.model.", head="language_model.lm_head.weight"
            ),
            "vision.tower": vit_table("vision_tower.vision_model."),
            "connector": {f"projection.{part}": same(f"multi_modal_projector.linear.{part}") for part in _BOTH},
        },
        files={
            "preprocessor_config.json": prepared,
            "processor_config.json": {"processor_class": "PaliGemmaProcessor"},
        },
        has_template=False,
    )


_BOTH = ("weight", "bias")


def _gemma3(model: MMGPT, processor: Processor) -> Export:
    _, tower, _, image = _parts(model, processor)
    how = processor.config.image_text
    assert how is not None
    text = decoder_values(model.decoder.config, kinds=("gemma3_text",))
    tokens = {"image": how.token, "boi": how.written, "eoi": how.after.strip()}
    lacking = [token for token in tokens.values() if token not in processor.tokenizer.special]
    if lacking:
        raise CheckpointError(f"image_text {how!r} has no counterpart in gemma3, whose marks are tokens; {INSTEAD}")
    length = processor.config.tokens_per_image
    values = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text | {"architectures": [CLASSES["gemma3_text"]]},
        "vision_config": _vit_values(tower, "siglip_vision_model"),
        "mm_tokens_per_image": length,
        "tie_word_embeddings": model.decoder.config.tie_embeddings,
        **{f"{name}_token_index": processor.tokenizer.special[token] for name, token in tokens.items()},
    }
    prepared = image_values(image) | {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": _square(image.size),
        "image_seq_length": length,
        "do_pan_and_scan": None,
    }
    return Export(
        values=values,
        tables={
            "decoder": decoder_table(
                "gemma3_text", prefix="language_model.model.", head="language_model.lm_head.weight"
            ),
            "vision.tower": vit_table("vision_tower.vision_model."),
            "connector": gemma3.connector_table("multi_modal_projector."),
        },
        files={
            "preprocessor_config.json": prepared,
            "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": length},
        },
        tokens={f"{name}_token": token for name, token in tokens.items()},
    )


def _parts(model: MMGPT, processor: Processor) -> tuple[VisionConfig, ViTConfig, ConnectorConfig, ImageTransformConfig]:
    config, image = model.config, processor.config.image
    assert config.vision is not None
    assert isinstance(config.vision.model, ViTConfig)
    assert config.connector is not None
    assert image is not None
    return config.vision, config.vision.model, config.connector, image


def _image_token(processor: Processor) -> str:
    assert processor.config.image_text is not None
    return processor.config.image_text.token


def _vit_values(tower: ViTConfig, kind: str) -> dict[str, Any]:
    values = {
        "model_type": kind,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": _ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }
    return values | {"vision_use_head": False} if kind == "siglip_vision_model" else values


def _size_values(image: ImageTransformConfig) -> dict[str, Any]:
    """One tile: squashed, cut out of the middle, or padded to a square."""
    square = _square(image.size)
    if image.mode == "crop":
        return {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": image.short_side or image.size},
            "crop_size": square,
            "do_center_crop": True,
        }
    name = "LlavaImageProcessor" if image.mode == "pad" else "CLIPImageProcessor"
    values = {"image_processor_type": name, "size": square, "crop_size": square, "do_center_crop": False}
    return values | {"do_pad": True} if image.mode == "pad" else values


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


# ---- The import as the judge ----


def check(folder: Path, values: dict[str, Any], model: MMGPT, processor: Processor) -> None:
    """Read what was written. Raises CheckpointError for what would come back as something else."""
    kind = values["model_type"]
    family = importlib.import_module(f"mm_gpt.hub.families.{FAMILIES[kind]}")
    try:
        back: Import = family.read(folder, values, Tokenizer.from_hf_folder(folder))
    except MMGPTError as error:
        raise CheckpointError(f"{str(error).replace(f'{folder}/', '')}; {INSTEAD}") from None
    wanted = {**_model_facts(model.config, model), **_processor_facts(processor.config, processor.tokenizer)}
    found = {**_model_facts(back.model, None), **_processor_facts(back.processor, processor.tokenizer)}
    for name, value in wanted.items():
        if value != found[name]:
            raise CheckpointError(
                f"{name} {value!r} has no counterpart in {kind}, which has {found[name]!r}; {INSTEAD}"
            )


def _model_facts(config: ModelConfig, model: MMGPT | None) -> dict[str, Any]:
    decoder = config.decoder if model is None else model.decoder.config
    assert not isinstance(decoder, str)
    assert config.vision is not None
    assert config.connector is not None
    facts: dict[str, Any] = {f"decoder.{name}": value for name, value in vars(essence(decoder)).items()}
    facts |= {f"vision.{name}": value for name, value in vars(config.vision.model).items()}
    for name in ("include_class_token", "l2_normalize"):
        facts[f"vision.{name}"] = getattr(config.vision, name)
    facts["connector.kind"] = kind = config.connector.kind
    if kind != "linear":
        facts["connector.bias"] = config.connector.bias
    if kind in ("pixel_shuffle", "pool"):
        facts["connector.scale"] = config.connector.scale
    if kind == "merger":
        facts["connector.norm"], facts["connector.deepstack"] = config.connector.norm, config.connector.deepstack
    return facts | {name: getattr(config, name) for name in ("image_token_id", "tiling", *READING)}


def _processor_facts(config: ProcessorConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    assert config.image is not None
    # Backends differ by a grey level here and there; no file says which one a program has.
    facts = {f"image.{name}": value for name, value in vars(config.image).items() if name != "backend"}
    facts["image.short_side"] = config.image.short_side or config.image.size
    begins = config.begin_of_text and bool(tokenizer.prefix_ids)
    return facts | {
        "tokens_per_image": config.tokens_per_image,
        "processor.tiling": config.tiling,
        "image_text": config.image_text,
        "mrope": config.mrope,
        "begin_of_text": begins,
    }
