"""InternVL against transformers: logits, grids of tiles, pixels, prompt ids, greedy answers; training; bad folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.document import Message
from mm_gpt.errors import CheckpointError, ConfigError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.families.internvl import read
from mm_gpt.hub.weights import read_json
from mm_gpt.processor import IGNORE_INDEX
from mm_gpt.vision.tiling import TilingConfig, closest_grid

TILE, PATCH = 28, 7  # four patches a side, four tokens a tile
QUESTION = "What is in it?"
KINDS = ["300m", "6b"]
# As published: a line end behind each image, none before
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
ANSWER: Message = {"role": "assistant", "content": [{"type": "text", "text": "A red ball."}]}
# Text alone; an image that fills its grid, one of two tiles, a sliver; several sizes, one of a single tile; two turns
CHATS: list[list[Message]] = [
    [user("What is red?")],
    [user(make_picture(1, (40, 30)), QUESTION)],
    [user(make_picture(2, (60, 29)), QUESTION)],
    [user(make_picture(3, (9, 61)), QUESTION)],
    [user("First ", make_picture(4, (28, 28)), "and ", make_picture(5, (90, 61)), "which is red, é?")],
    [user(make_picture(6, (31, 57)), QUESTION), ANSWER, user(make_picture(7, (75, 29)), "\n\nand in it?")],
]


class Theirs(NamedTuple):
    folder: Path
    model: Any
    processor: Any

    def inputs(self, chat: list[Message]) -> dict[str, Any]:
        """What their processor makes of one of our chats."""
        messages = [{"role": m["role"], "content": list(map(self.part, m["content"]))} for m in chat]
        return dict(
            self.processor.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        )

    @staticmethod
    def part(part: Any) -> dict[str, Any]:
        if isinstance(part, dict):
            return part
        return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def make_tokenizer() -> Any:
    """Qwen's kind: byte-level BPE without a first token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user\nWhat is in it?", "assistant\nA red ball.\n\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


def make_theirs(folder: Path, kind: str) -> Theirs:
    """`300m`: as InternVL3-1B. `6b`: the other tower, here with Llama, a tied head and a norm behind the last block."""
    import transformers as hf

    tokenizer = make_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision: dict[str, Any] = {**small, "hidden_size": 24, "image_size": TILE, "patch_size": PATCH}
    text: dict[str, Any] = {**small, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 5}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    if kind == "300m":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
        decoder: Any = hf.Qwen2Config(**text, max_position_embeddings=512, rope_parameters=rope)
        vision |= {"attention_bias": True}
    else:
        decoder = hf.LlamaConfig(**text, max_position_embeddings=512)
        vision |= {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False, "layer_norm_eps": 1e-3}
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=kind == "6b",
    )
    torch.manual_seed(0)
    model = hf.InternVLForConditionalGeneration(config).eval()
    roughen(model)
    square = {"height": TILE, "width": TILE}
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=square, min_patches=1, max_patches=6 if kind == "300m" else 12, **means),
        tokenizer,
        hf.InternVLVideoProcessor(size=square),
        image_seq_length=4,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Theirs(folder, model, processor)


@pytest.fixture(scope="module")
def get_theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Theirs]:
    made: dict[str, Theirs] = {}

    def get(kind: str) -> Theirs:
        if kind not in made:
            made[kind] = make_theirs(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


def check_logits(folder: Path, theirs: Theirs) -> None:
    for ours, chat in zip(logits_of(*load_model(folder), CHATS), CHATS, strict=True):
        with torch.inference_mode():
            expected = theirs.model(**theirs.inputs(chat)).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_pixels_and_ids(get_theirs: Callable[[str], Theirs], kind: str) -> None:
    """Stops: one epsilon for all norms, the class token among the patches, a norm behind a tower that has none, the
    global tile first or made of the squashed canvas, as many tokens as without tiles, positions shifted by padding."""
    theirs = get_theirs(kind)
    model, processor = load_model(theirs.folder)
    assert model.decoder.config.tie_embeddings == (kind == "6b")
    for example, chat in zip(examples_of(processor, CHATS), CHATS, strict=True):
        expected = theirs.inputs(chat)
        assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
        if example.images:
            assert torch.equal(processor.pixels([example]), expected["pixel_values"])
    check_logits(theirs.folder, theirs)
    one, other = logits_of(model, processor, [[user(make_picture(seed), QUESTION)] for seed in (1, 2)])
    assert (one - other).abs().max() > 0.1  # the picture matters


@settings(max_examples=300)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from([TILE, 448]),
    st.tuples(st.integers(1, 7), st.integers(0, 12)),
)
def test_the_same_grids(size: tuple[int, int], tile: int, tiles: tuple[int, int]) -> None:
    """Stops: another order of grids that are as close, as 1 x 2 and 2 x 4 are to an image of 2 : 1."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    least, most = tiles[0], sum(tiles)
    for height, width in (size, (tile * least, tile * most), (tile, 2 * tile)):
        cols, rows = get_optimal_tiled_canvas((height, width), (tile, tile), least, most)
        assert closest_grid((height, width), tile, least, most) == (rows, cols)


def test_the_published_layout(get_theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    """As OpenGVLab/InternVL3-1B-hf: tensors in shards, few keys, a stored head that nothing in the configuration speaks
    of, a scaling of positions beyond the context, and image settings in a file of their own, which forbid tiles."""
    theirs = get_theirs("300m")
    values = read_json(theirs.folder / "config.json")
    text = ("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    text = (*text, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "eos_token_id")
    vision = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "image_token_id": values["image_token_id"],
        "model_type": "internvl",
        "text_config": {
            **{key: values["text_config"][key] for key in text},
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1e6,
            "torch_dtype": "bfloat16",
        },
        "torch_dtype": "bfloat16",
        "vision_config": {key: values["vision_config"][key] for key in (*vision, "patch_size", "attention_bias")},
    }
    images = read_json(theirs.folder / "processor_config.json")["image_processor"]
    images |= {"image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": False, "crop_size": None}
    folder = as_published(theirs.folder, tmp_path / "published", config, {}, json.dumps(images))
    (folder / "processor_config.json").write_text('{"image_seq_length": 4, "processor_class": "InternVLProcessor"}')
    model, processor = load_model(folder)
    expected = load_model(theirs.folder)
    assert (model.config, processor.config) == (expected[0].config, expected[1].config)
    check_logits(folder, theirs)


def test_names_as_transformers_has_them_in_memory(get_theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    theirs = get_theirs("6b")
    folder = shutil.copytree(theirs.folder, tmp_path / "copy")
    theirs.model.save_pretrained(folder, save_original_format=False)
    one, other = (load_model(path)[0].state_dict() for path in (theirs.folder, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answers(get_theirs: Callable[[str], Theirs], kind: str, tmp_path: Path) -> None:
    theirs, picture = get_theirs(kind), make_picture(8, (50, 41))
    inputs = theirs.inputs([user(picture, QUESTION)])
    out = theirs.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    check_answers(theirs.folder, picture, QUESTION, out[inputs["input_ids"].shape[1] :].tolist(), tmp_path)


def test_training_labels(get_theirs: Callable[[str], Theirs]) -> None:
    """The answer and its end mark are learned: no image token, no line end behind it."""
    _, processor = load_model(get_theirs("300m").folder)
    example = processor(processor.chat(CHATS[5][:2], answer_starts=False))
    learned = example.labels[example.labels != IGNORE_INDEX].tolist()
    assert processor.tokenizer.decode(learned, keep_special=True) == "A red ball.<|im_end|>"


@pytest.mark.parametrize("changes", [{}, {"decoder": "full", "vision_blocks": 1}], ids=["lora", "full"])
def test_finetuning(get_theirs: Callable[[str], Theirs], tmp_path: Path, changes: dict[str, Any]) -> None:
    task = check_finetuning(get_theirs("6b" if changes else "300m").folder, tmp_path, CHATS, **changes)
    assert task.processor.config.tiling is not None
    assert (task.model.config.lora is None) == bool(changes)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("kind", "name"),
    [("300m", "vision_tower.encoder.layer.1.lambda_2"), ("6b", "multi_modal_projector.layer_norm.bias")],
)
def test_missing_and_left_over_tensors_are_named(
    get_theirs: Callable[[str], Theirs], kind: str, name: str, tmp_path: Path
) -> None:
    check_account(get_theirs(kind).folder, tmp_path, name)


def test_errors_name_what_does_not_fit(get_theirs: Callable[[str], Theirs]) -> None:
    folder = get_theirs("300m").folder
    values, tokenizer = read_json(folder / "config.json"), load_model(folder)[1].tokenizer
    for changes, message in (
        ({"vision_feature_layer": -2}, "vision_feature_layer -2 is not supported, only -1"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full' is not supported"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' is not supported"),
        ({"downsample_ratio": 0.3}, "downsample_ratio 0.3 does not fit the 4 patches of a side"),
        ({"downsample_ratio": 0.25}, "processor_config.json: image_seq_length is 4, but the model makes 1 tokens"),
        ({"image_token_id": 7}, "image_token_id is 7, but the tokenizer's <IMG_CONTEXT> is 5"),
        ({"text_config": None}, "no text_config; of InternVL, only the repositories ending in -hf are read"),
        ({"vision": {"image_size": [28, 35]}}, r"vision_config: image_size \[28, 35\] is not supported, only squares"),
        ({"vision": {"image_size": 42}}, "the model sees 42 pixels, but tiles have 28"),
        ({"vision": {"norm_type": "batch_norm"}}, "norm_type 'batch_norm' is not one of layer_norm, rms_norm"),
        ({"vision": {"use_absolute_position_embeddings": False}}, "use_absolute_position_embeddings must be true"),
    ):
        changed = values | changes
        changed["vision_config"] = changed["vision_config"] | changed.pop("vision", {})
        with pytest.raises(CheckpointError, match=message) as caught:
            read(folder, changed, tokenizer)
        assert str(folder) in str(caught.value)


def test_other_processors_and_lost_templates_are_refused(get_theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    folder = shutil.copytree(get_theirs("300m").folder, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load_model(folder)
    values = read_json(folder / "processor_config.json")
    for changes, message in (
        ({"image_processor_type": "SiglipImageProcessor"}, "image processor is not that of model type 'internvl'"),
        ({"max_patches": 0}, "processor_config.json: max_patches is 0: expected a whole number"),
        ({"min_patches": 7}, "processor_config.json: min_tiles 7 does not go with tiling 'internvl'"),
    ):
        changed = values | {"image_processor": values["image_processor"] | changes}
        (folder / "processor_config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


def test_tiling_config_is_checked() -> None:
    for values in ({"longest_edge": 28, "max_tiles": 6}, {}, {"min_tiles": -1, "max_tiles": 6}):
        with pytest.raises(ConfigError, match=r"(longest_edge|max_tiles|min_tiles) .*'internvl'"):
            TilingConfig(kind="internvl", **values)
    with pytest.raises(ConfigError, match="min_tiles 1 does not go with tiling 'idefics3'"):
        TilingConfig(kind="idefics3", longest_edge=56, min_tiles=1)
