"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as Hugging Face folders: the way back of `mm_gpt.hub.families.qwen_vl`."""

from typing import Any

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.decoders import decoder_table
from mm_gpt.hub.export.decoders import decoder_values
from mm_gpt.hub.export.layout import INSTEAD, Export, image_values
from mm_gpt.hub.families.qwen_vl import merger_table, tower_table
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.vision.native_vit import NativeViTConfig

_CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
_OTHER_IDS = {"video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}


def qwen_vl_export(model: MMGPT, processor: Processor, tower: NativeViTConfig) -> Export:
    """The plan. Raises CheckpointError for settings that the closest of the three lacks."""
    decoder, tiling, image = model.decoder.config, processor.config.tiling, processor.config.image
    assert tiling is not None
    assert image is not None
    kind = "qwen2_5_vl" if tower.gated_mlp else "qwen3_vl" if tower.patch_bias else "qwen2_vl"
    special = processor.tokenizer.special
    if missing := [token for token in _OTHER_IDS.values() if f"<|{token}|>" not in special]:
        raise CheckpointError(f"the vocabulary has no <|{missing[0]}|>, which {kind} needs; {INSTEAD}")
    text = decoder_values(decoder, kinds=(f"{kind}_text",))
    values: dict[str, Any] = {
        "architectures": [f"{_CLASSES[kind]}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": model.config.image_token_id,
        **{f"{name}_token_id": special[f"<|{token}|>"] for name, token in _OTHER_IDS.items()},
        "tie_word_embeddings": decoder.tie_embeddings,
        "vision_config": _tower_values(kind, tower, decoder.width),
    }
    # The older two have the text half between the keys of the whole
    values = values | {"text_config": text} if kind == "qwen3_vl" else text | values
    sizes = {"shortest_edge": tiling.min_pixels, "longest_edge": tiling.max_pixels}
    prepared = image_values(image) | {
        "size": sizes,
        "patch_size": tower.patch_size,
        "merge_size": tower.merge,
        "temporal_patch_size": tower.frames,
        "processor_class": f"{_CLASSES[kind]}Processor",
    }
    video = "Qwen3VLVideoProcessor" if kind == "qwen3_vl" else "Qwen2VLVideoProcessor"
    language, visual = ("model.language_model.", "model.visual.") if kind == "qwen3_vl" else ("model.", "visual.")
    return Export(
        values=values,
        tables={
            "decoder": decoder_table(f"{kind}_text", prefix=language),
            "vision.tower": tower_table(kind, visual),
            "connector": merger_table(kind, visual),
        },
        files={
            "preprocessor_config.json": prepared | {"image_processor_type": "Qwen2VLImageProcessor"},
            "video_preprocessor_config.json": prepared | {"video_processor_type": video},
        },
    )


def _tower_values(kind: str, tower: NativeViTConfig, width: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": f"{kind}_vision",
        "depth": tower.num_layers,
        "num_heads": tower.num_heads,
        "hidden_act": _ACTIVATIONS.get(tower.activation, tower.activation),
        "in_channels": 3,
        "patch_size": tower.patch_size,
        "spatial_merge_size": tower.merge,
        "temporal_patch_size": tower.frames,
    }
    if kind == "qwen2_vl":
        ratio = tower.mlp_width // tower.width  # what is no whole number is found by reading it again
        return values | {"embed_dim": tower.width, "hidden_size": width, "mlp_ratio": ratio}
    values |= {"hidden_size": tower.width, "out_hidden_size": width, "intermediate_size": tower.mlp_width}
    if kind == "qwen2_5_vl":
        window = tower.window * tower.image_size
        return values | {"window_size": window, "fullatt_block_indexes": list(tower.full_layers)}
    return values | {
        "num_position_embeddings": tower.position_side**2,
        "deepstack_visual_indexes": list(tower.deepstack),
    }
