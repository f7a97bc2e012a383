"""LLaVA-1.5, NeXT and OneVision against the classes of transformers, tiny, with random weights, in all layouts."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture
from family_checks import (
    CLOSE,
    as_published,
    check_account,
    check_answers,
    check_finetuning,
    examples_of,
    logits_of,
    roughen,
    user,
)
from safetensors.torch import load_file

from mm_gpt.document import Message
from mm_gpt.errors import CheckpointError, ContextOverflowError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.decoders import part_sizes
from mm_gpt.hub.families import llava
from mm_gpt.hub.weights import read_json, written
from mm_gpt.tokenizer import Tokenizer

TILE, PATCH = 30, 14  # two patches a side and a rest that nobody sees, as of 384 pixels in OneVision
PINPOINTS = [[TILE * rows, TILE * cols] for rows in range(1, 5) for cols in range(1, 5)]
QUESTION = "what is in it?"
KINDS = ["llava", "llava_interleave", "llava_next", "llava_onevision"]
# As the published templates: LLaVA puts images first; what `generation` encloses is the answer
VICUNA = """\
{% for m in messages %}{{ m['role'].upper() + ': ' if m['role'] != 'system' }}\
{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{% if m['role'] == 'assistant' %}\
{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}\
{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"""
MISTRAL = """\
{% for m in messages %}{{ '[INST] ' if m['role'] == 'user' else ' ' }}{% for part in m['content'] %}\
{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}\
{{ ' [/INST]' if m['role'] == 'user' else eos_token }}{% endfor %}"""
CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{% for part in m['content'] %}\
{{ '<image>' if part['type'] == 'image' }}{% endfor %}{% for part in m['content'] %}\
{{ '\n' + part['text'] if part['type'] == 'text' }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}\
{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""


def said(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# Text alone, one image, one beyond what max_tiles keeps, a sliver, two of different sizes, two in different turns
CHATS: list[list[Message]] = [
    [user("what is red?")],
    [user(make_picture(1, (40, 30)), QUESTION)],
    [user(make_picture(2, (120, 109)), QUESTION)],
    [user(make_picture(3, (9, 61)), QUESTION)],
    [user(make_picture(4, (31, 57)), make_picture(5, (90, 33)), "which is red?")],
    [user(make_picture(6, (28, 28)), QUESTION), said("a red dot"), user(make_picture(7, (75, 29)), "and in it?")],
]


def make_tokenizer(kind: str) -> Any:
    """Llama's, with `<s>` before every text and a mark for each space, or Qwen's byte-level BPE without a prefix."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    texts = [
        "USER: what is in it? which is red? ASSISTANT: a red dot and a picture of number",
        "[INST] system user",
    ] * 4
    if kind in ("llava", "llava_next"):
        special, names = ["<unk>", "<s>", "</s>", "<image>", "<pad>"], {"bos_token": "<s>", "eos_token": "</s>"}
        backend = Backend(models.BPE(unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
        alphabet = list("▁?:[]/\n0123456789")
    else:
        special, names = ["<|im_start|>", "<|im_end|>", "<image>", "<video>"], {"eos_token": "<|im_end|>"}
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    added = [AddedToken(token, special=True, normalized=False) for token in special]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=added, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    if "bos_token" in names:
        post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
        backend.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[-1], **names)


def make_reference(kind: str) -> tuple[Any, Any]:
    """A model of transformers and its processor."""
    import transformers as tf

    tokenizer = make_tokenizer(kind)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**small, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 3}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {**small, "num_hidden_layers": 3, "image_size": TILE, "patch_size": PATCH}
    clip, siglip = tf.CLIPVisionConfig(**vision), tf.SiglipVisionConfig(**vision, vision_use_head=False)
    common: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    square, rows = {"height": TILE, "width": TILE}, {"image_grid_pinpoints": PINPOINTS}
    cropped = {"size": {"shortest_edge": TILE}, "crop_size": square}
    extra: dict[str, Any] = {"patch_size": PATCH, "num_additional_image_tokens": 1}
    default, whole = {"vision_feature_select_strategy": "default"}, {"vision_feature_select_strategy": "full"}
    if kind == "llava":
        config = tf.LlavaConfig(vision_config=clip, text_config=tf.LlamaConfig(**text, rms_norm_eps=1e-5), **common)
        model = tf.LlavaForConditionalGeneration(config)
        images = tf.CLIPImageProcessor(**cropped)
        processor = tf.LlavaProcessor(images, tokenizer, chat_template=VICUNA, **extra, **default)
    elif kind == "llava_interleave":  # LLaVA-NeXT-Interleave is published as this one, with another tower
        config = tf.LlavaConfig(
            vision_config=siglip,
            text_config=tf.Qwen2Config(**text),
            vision_feature_layer=2,
            multimodal_projector_bias=False,
            **whole,
            **common,
        )
        model = tf.LlavaForConditionalGeneration(config)
        images = tf.SiglipImageProcessor(size=square)
        extra["num_additional_image_tokens"] = 0
        processor = tf.LlavaProcessor(images, tokenizer, chat_template=CHATML, **extra, **whole)
    elif kind == "llava_next":
        mistral = tf.MistralConfig(**text, sliding_window=None, rope_theta=1e6)
        model = tf.LlavaNextForConditionalGeneration(
            tf.LlavaNextConfig(vision_config=clip, text_config=mistral, **rows, **common)
        )
        images = tf.LlavaNextImageProcessor(**cropped, **rows)
        processor = tf.LlavaNextProcessor(images, tokenizer, chat_template=MISTRAL, **extra, **default)
    else:
        common["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
        qwen = tf.Qwen2Config(**text, tie_word_embeddings=True)
        model = tf.LlavaOnevisionForConditionalGeneration(
            tf.LlavaOnevisionConfig(vision_config=siglip, text_config=qwen, **rows, **common)
        )
        images = tf.LlavaOnevisionImageProcessor(size=square, **rows, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        side = TILE // PATCH
        processor = tf.LlavaOnevisionProcessor(
            images,
            tokenizer,
            tf.LlavaOnevisionVideoProcessor(),
            num_image_tokens=side * side,
            chat_template=CHATML,
            **whole,
        )
    roughen(model)
    return model.eval(), processor


@dataclasses.dataclass
class Case:
    kind: str
    folder: Path
    model: Any
    processor: Any

    def inputs(self, chat: list[Message]) -> Any:
        """What transformers makes of a chat."""
        return self.processor.apply_chat_template(
            [{**m, "content": [_part(part) for part in m["content"]]} for m in chat],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return part if isinstance(part, dict) else {"type": "image", "image": part}


@pytest.fixture(scope="module")
def get_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def get(kind: str) -> Case:
        if kind not in cases:
            folder = tmp_path_factory.mktemp(kind)
            model, processor = make_reference(kind)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            cases[kind] = Case(kind, folder, model, processor)
        return cases[kind]

    return get


@pytest.fixture
def copied(get_case: Callable[[str], Case], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's folder, with other keys in its `config.json`: None takes one away."""

    def copy(kind: str, **changes: Any) -> Path:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(get_case(kind).folder, folder)
        change_json(folder / "config.json", **changes)
        return folder

    return copy


def change_json(path: Path, **changes: Any) -> None:
    values = {k: v for k, v in (read_json(path) | changes).items() if v is not None}
    path.write_text(json.dumps(values))


def published(folder: Path, target: Path) -> Path:
    """The folder in the layout of the published repositories: older names, short configs, shards, separate files."""
    values = read_json(folder / "config.json")
    kept = ["model_type", "image_token_index", "image_grid_pinpoints", "text_config", "vision_config"]
    if values["model_type"] == "llava" and values["vision_config"]["model_type"] == "siglip_vision_model":
        kept += ["vision_feature_select_strategy", "vision_feature_layer", "multimodal_projector_bias"]
    config = {key: values[key] for key in kept if key in values} | {"ignore_index": -100, "torch_dtype": "float16"}
    sizes = ("size", "heads", "layers", "model_type", "rope", "rms_norm_eps", "tie_word", "sliding_window")
    for part in ("text_config", "vision_config"):
        config[part] = {k: v for k, v in values[part].items() if any(size in k for size in sizes)}
    settings = read_json(folder / "processor_config.json")
    images = json.dumps(settings.pop("image_processor"))
    as_published(folder, target, config, {"vision_tower.": "vision_tower.vision_model."}, images)
    (target / "processor_config.json").write_text(json.dumps(settings))
    template = (target / "chat_template.jinja").read_text()
    (target / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (target / "chat_template.jinja").unlink()
    return target


# ---- The same numbers ----


@pytest.mark.parametrize("kind", KINDS)
def test_ids_pixels_and_logits_equal_transformers(get_case: Callable[[str], Case], kind: str) -> None:
    """One batch of six, padded on the left, against one at a time.

    Stops another count of image tokens than the model's (transformers rounded twice), padding that shifts positions,
    the class token among the patches, a norm behind the chosen layer, and tiles in another order.
    """
    case = get_case(kind)
    model, processor = load_model(case.folder)
    ours = logits_of(model, processor, CHATS)
    for chat, example, logits in zip(CHATS, examples_of(processor, CHATS), ours, strict=True):
        inputs = case.inputs(chat)
        assert example.input_ids.tolist() == inputs["input_ids"][0].tolist()
        if example.images:
            pixels = processor.pixels([example])
            theirs = inputs["pixel_values"]
            if theirs.dim() == 5:  # padded to the image with the most tiles
                tiles = [rows * cols + 1 for rows, cols in example.grids]
                theirs = torch.cat([image[:count] for image, count in zip(theirs, tiles, strict=True)])
            assert torch.equal(pixels, theirs)
        with torch.inference_mode():
            expected = case.model(**inputs).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_pictures_matter(get_case: Callable[[str], Case]) -> None:
    """Otherwise the comparison above would say nothing about the tower."""
    model, processor = load_model(get_case("llava").folder)
    chats = [[user(make_picture(seed), QUESTION)] for seed in (1, 2)]
    one, other = (logits[-1] for logits in logits_of(model, processor, chats))
    assert (one - other).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_layout_of_published_folders(get_case: Callable[[str], Case], kind: str, tmp_path: Path) -> None:
    """Other tensor names, shards, configs that leave out their defaults, and the processor in separate files."""
    case = get_case(kind)
    model, processor = load_model(case.folder)
    expected = logits_of(model, processor, CHATS[1:3])
    folder = published(case.folder, tmp_path / "published")
    again, reader = load_model(folder)
    assert (again.config, reader.config) == (model.config, processor.config)
    for one, other in zip(logits_of(again, reader, CHATS[1:3]), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_names_as_transformers_has_them_in_memory(
    get_case: Callable[[str], Case], copied: Callable[..., Path], kind: str
) -> None:
    case, folder = get_case(kind), copied(kind)
    case.model.save_pretrained(folder, save_original_format=False)
    assert any(name.startswith("model.language_model.") for name in load_file(folder / "model.safetensors"))
    one, other = (load_model(path)[0].state_dict() for path in (case.folder, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_tables_written_back_lose_nothing(get_case: Callable[[str], Case], kind: str) -> None:
    """CLIP's last block and last norm are not run, and yet belong to the checkpoint."""
    folder = get_case(kind).folder
    model, _ = load_model(folder)
    stored = load_file(folder / "model.safetensors")
    plan = llava.read(folder, read_json(folder / "config.json"), Tokenizer.from_hf_folder(folder))
    back = {}
    for part, table in plan.tables.items():
        if part == "":
            back[table["image_newline"].parts[0]] = model.image_newline
        else:
            sizes = lambda name, parts, rows: part_sizes(model.decoder.config, name, parts, rows)  # noqa: E731
            if part == "vision.tower":
                sizes = lambda name, parts, rows: [rows // parts] * parts  # noqa: E731
            back |= dict(written(model.get_submodule(part), table, sizes))
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_class_token_of_strategy_full(copied: Callable[..., Path]) -> None:
    from transformers import LlavaForConditionalGeneration

    folder = copied("llava", vision_feature_select_strategy="full")
    change_json(folder / "processor_config.json", vision_feature_select_strategy="full")
    model, processor = load_model(folder)
    assert model.tokens_per_image == (TILE // PATCH) ** 2 + 1
    (example,) = examples_of(processor, CHATS[1:2])
    with torch.inference_mode():
        reference = LlavaForConditionalGeneration.from_pretrained(folder)
        inputs = {"input_ids": example.input_ids[None], "pixel_values": processor.pixels([example])}
        expected = reference(**inputs).logits[0]
    torch.testing.assert_close(logits_of(model, processor, CHATS[1:2])[0], expected, **CLOSE)


# ---- Using and training it ----


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_answers(get_case: Callable[[str], Case], kind: str, tmp_path: Path) -> None:
    case, picture = get_case(kind), make_picture(8, (50, 41))
    inputs = case.inputs([user(picture, QUESTION)])
    generated = case.model.generate(**inputs, do_sample=False, max_new_tokens=6)
    check_answers(case.folder, picture, QUESTION, generated[0, inputs["input_ids"].shape[1] :].tolist(), tmp_path)


@pytest.mark.parametrize(("kind", "decoder"), [("llava", "full"), ("llava_next", "frozen")])
def test_finetuning_and_loading_again(get_case: Callable[[str], Case], kind: str, decoder: str, tmp_path: Path) -> None:
    task = check_finetuning(get_case(kind).folder, tmp_path, CHATS[1:3], decoder=decoder)
    assert (task.model.config.lora is None) == (decoder == "full")


def test_images_are_never_cut(copied: Callable[..., Path]) -> None:
    """Truncation that left half an image failed only in the forward pass, or silently."""
    folder = copied("llava_next")
    text = read_json(folder / "config.json")["text_config"]
    change_json(folder / "config.json", text_config=text | {"max_position_embeddings": 30})
    _, processor = load_model(folder)
    with pytest.raises(ContextOverflowError, match=r"1 images of .* tokens"):
        examples_of(processor, CHATS[2:3])


def test_without_a_template_llava_speaks_vicuna(copied: Callable[..., Path]) -> None:
    folder = copied("llava")
    (folder / "chat_template.jinja").unlink()
    _, processor = load_model(folder)
    chat = [user(make_picture(1), QUESTION), {"role": "assistant", "content": "a red dot"}, user("is it?")]
    document = processor.chat(chat)
    text = "".join(getattr(segment, "text", "<image>") for segment in document.segments)
    assert text == f"USER: <image>\n{QUESTION} ASSISTANT: a red dot</s>USER: is it? ASSISTANT:"
    assert "".join(s.text for s in document.segments if getattr(s, "is_target", False)) == "a red dot</s>"


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("kind", "name"), [("llava_next", "image_newline"), ("llava", "language_model.lm_head.weight")]
)
def test_missing_and_left_over_tensors_are_named(
    get_case: Callable[[str], Case], kind: str, name: str, tmp_path: Path
) -> None:
    check_account(get_case(kind).folder, tmp_path, name)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llava", {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]: only .* one layer"),
        ("llava", {"vision_feature_layer": -9}, r"vision_feature_layer -9.*3 layers"),
        ("llava", {"projector_hidden_act": "relu"}, r"projector_hidden_act 'relu' is not supported"),
        ("llava", {"vision_feature_select_strategy": "cls"}, r"'cls' is not supported"),
        ("llava", {"image_token_index": 200}, r"image_token_index 200 is no special token"),
        ("llava", {"text_config": None}, r"no text_config; .* llava-hf"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, r"leave out the first patch"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, r"class token into each tile"),
        ("llava_next", {"image_grid_pinpoints": [[30, 30]]}, r"image_grid_pinpoints of config.json .* differ"),
        ("llava_next", {"model_type": "llava"}, r"image processor is not that of model type 'llava'"),
        ("llava_onevision", {"vision_aspect_ratio": "pad"}, r"vision_aspect_ratio is 'pad'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    copied: Callable[..., Path], kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(copied(kind, **changes))


def test_other_sizes_and_lost_templates_are_refused(copied: Callable[..., Path]) -> None:
    folder = copied("llava")
    values = read_json(folder / "processor_config.json")
    values["image_processor"] |= {"crop_size": {"height": 14, "width": 14}}
    (folder / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="images of 14 pixels are prepared for a tower of 30"):
        load_model(folder)
    folder = copied("llava_next")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load_model(folder)
