"""Qwen2-VL, 2.5 and 3 against transformers: pixels, ids, positions, features, logits, answers; training; errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import make_picture
from einops import rearrange
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
from torch import Tensor

import mm_gpt
from mm_gpt.document import Image, Message
from mm_gpt.errors import CheckpointError, ConfigError, ImageError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.export.export_model import export_model
from mm_gpt.hub.families.qwen_vl import read
from mm_gpt.hub.weights import read_json
from mm_gpt.model.positions import mrope_components
from mm_gpt.processor import IGNORE_INDEX, collate
from mm_gpt.templates.image_text import mrope_positions
from mm_gpt.vision.native_vit import NativeViTConfig
from mm_gpt.vision.tiling import Tiler, TilingConfig, nearest_cells
from mm_gpt.vision.transforms import ImageTransformConfig

KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
PATCH, CELL = 4, 8
QUESTION = "What is in it?"
ANSWER: Message = {"role": "assistant", "content": [{"type": "text", "text": "A red ball."}]}
# Text alone; one image; one of a single window, and a sliver; several sizes between words; two turns
CHATS: list[list[Message]] = [
    [user("What is red?")],
    [user(make_picture(1, (40, 30)), QUESTION)],
    [user(make_picture(2, (60, 29)), QUESTION)],
    [user(make_picture(3, (9, 61)), QUESTION)],
    [user("First ", make_picture(4, (28, 28)), "and ", make_picture(5, (90, 61)), "which is red, é?")],
    [user(make_picture(6, (31, 57)), QUESTION), ANSWER, user(make_picture(7, (75, 29)), "\n\nand in it?")],
]
# What the published ones write for texts and images; the older two begin with a system message of their own
TEMPLATE = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% if add_vision_id %}Picture: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
)


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

    def positions(self, inputs: dict[str, Any]) -> Tensor:
        """(T, 3)"""
        if "image_grid_thw" not in inputs:
            return torch.arange(inputs["input_ids"].shape[1])[:, None].expand(-1, 3)
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        return self.model.model.get_rope_index(**{name: inputs[name] for name in names})[0][:, 0].T


def make_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user\nWhat is in it?", "assistant\nA red ball.\n\n"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_theirs(folder: Path, kind: str) -> Theirs:
    import transformers as hf

    tokenizer = make_tokenizer()
    text: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer) + 5}
    text |= {"max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        vision |= {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}
        text["head_dim"] = 16
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    config = getattr(hf, names[kind] + "Config")(
        vision_config=vision,
        text_config=text | {"rope_parameters": rope},
        tie_word_embeddings=kind != "qwen2_5_vl",
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in (("image", "image_pad"), ("video", "video_pad"))
        },
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            for name in ("vision_start", "vision_end")
        },
    )
    torch.manual_seed(0)
    model = getattr(hf, names[kind] + "ForConditionalGeneration")(config).eval()
    roughen(model)
    sizes = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 4 * CELL**2, "longest_edge": 20 * CELL**2}}
    videos = hf.Qwen3VLVideoProcessor if kind == "qwen3_vl" else hf.Qwen2VLVideoProcessor
    processor = getattr(hf, names[kind] + "Processor")(
        hf.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        videos(**sizes),
        chat_template=TEMPLATE.replace("SYSTEM", "" if kind == "qwen3_vl" else SYSTEM),
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
    """One batch of all chats, padded on the left."""
    for ours, chat in zip(logits_of(*load_model(folder), CHATS), CHATS, strict=True):
        theirs.model.model.rope_deltas = None  # it remembers the chat before
        with torch.inference_mode():
            expected = theirs.model(**theirs.inputs(chat)).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_pixels_ids_and_positions(get_theirs: Callable[[str], Theirs], kind: str) -> None:
    """Stops: rows and columns swapped, positions that count an image's tokens, windows across images or in every layer,
    features of DeepStack at other layers or places, patches row by row instead of cell by cell."""
    theirs = get_theirs(kind)
    model, processor = load_model(theirs.folder)
    for example, chat in zip(examples_of(processor, CHATS), CHATS, strict=True):
        expected = theirs.inputs(chat)
        assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert torch.equal(example.position_ids, theirs.positions(expected))
        if not example.images:
            continue
        pixels = processor.pixels([example])
        patches = rearrange(pixels, "n c (a y) (b x) -> (n a b) c y x", y=PATCH, x=PATCH)
        both = patches[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)  # they write each image as two frames
        assert torch.equal(both, expected["pixel_values"])
        grids = expected["image_grid_thw"]
        assert [(1, 2 * rows, 2 * cols) for rows, cols in example.grids] == [tuple(grid) for grid in grids.tolist()]
        with torch.inference_mode():
            images = model.image_tokens(collate([[example]], pixels))
            found = theirs.model.model.get_image_features(expected["pixel_values"], grids, return_dict=True)
        levels = [found.pooler_output, *getattr(found, "deepstack_features", [])]
        assert len(levels) == 1 + 2 * (kind == "qwen3_vl")
        for level, parts in enumerate(levels):
            for image, part in zip(images, parts, strict=True):
                torch.testing.assert_close([image.tokens, *image.deepstack][level], part, **CLOSE)
    check_logits(theirs.folder, theirs)
    one, other = logits_of(model, processor, [[user(make_picture(seed), QUESTION)] for seed in (1, 2)])
    assert (one - other).abs().max() > 0.1  # the picture matters


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answers(get_theirs: Callable[[str], Theirs], kind: str, tmp_path: Path) -> None:
    """Stops: a token that is generated at the place after the prompt's tokens, not after its positions."""
    theirs, picture = get_theirs(kind), make_picture(8, (50, 41))
    theirs.model.model.rope_deltas = None
    inputs = theirs.inputs([user(picture, QUESTION)])
    out = theirs.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    check_answers(theirs.folder, picture, QUESTION, out[inputs["input_ids"].shape[1] :].tolist(), tmp_path)


def test_turns_and_neighbours(get_theirs: Callable[[str], Theirs]) -> None:
    """A second turn, whose beginning was read before, and pictures of several sizes in one batch: each answer is the
    one that its prompt gets alone. Stops: a turn that goes on at the number of tokens before it."""
    assistant = mm_gpt.load(get_theirs("qwen3_vl").folder, device="cpu", dtype="fp32")
    options: Any = {"max_new_tokens": 6, "no_repeat_ngram_size": 0}
    talk = assistant.conversation(**options)
    first, second = [Image(make_picture(1, (70, 30))), QUESTION], ["and ", Image(make_picture(2, (20, 50))), "here?"]
    answers = [str(talk.say(first)), str(talk.say(second))]
    turns = [user(*first), {"role": "assistant", "content": answers[0]}, user(*second)]
    fresh = mm_gpt.load(get_theirs("qwen3_vl").folder, device="cpu", dtype="fp32")
    assert str(fresh.chat(turns, **options)) == answers[1]
    pictures = [make_picture(number, size) for number, size in enumerate([(40, 30), (90, 61), (9, 61)])]
    together = fresh.caption(pictures, prompt=QUESTION, num_beams=2, **options)
    assert together == [fresh.caption([picture], prompt=QUESTION, num_beams=2, **options)[0] for picture in pictures]


PUBLISHED = {
    "qwen2_vl": ({"vision_token_id": 9, "sliding_window": 512, "max_window_layers": 3}, "in_chans", {}),
    "qwen2_5_vl": ({"vision_token_id": 9, "sliding_window": 512, "max_window_layers": 3}, "in_chans", {}),
    "qwen3_vl": ({}, "in_channels", {"attention_bias": False, "dtype": "bfloat16", "rope_theta": 1e4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_layout(get_theirs: Callable[[str], Theirs], kind: str, tmp_path: Path) -> None:
    """As Qwen/Qwen2-VL-2B-Instruct, Qwen2.5-VL-3B-Instruct and Qwen3-VL-2B-Instruct: tensors in shards, the text half
    between the keys of the whole or, in the last, on its own, and the image processor in a file of its own."""
    theirs = get_theirs(kind)
    values = read_json(theirs.folder / "config.json")
    more, channels, own = PUBLISHED[kind]
    names = ("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
    names = (*names, "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size", "eos_token_id")
    if kind == "qwen3_vl":
        names = (*names, "head_dim")
    text = {name: values["text_config"][name] for name in names}
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    if kind == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text |= {"rope_scaling": rope, "rope_theta": 1e4, "use_cache": True, "attention_dropout": 0.0} | own
    keys = [key for key in values["vision_config"] if key not in ("rope_parameters", "in_channels", "dtype")]
    vision = {key: values["vision_config"][key] for key in keys} | {channels: 3, "temporal_patch_size": 2}
    config = {key: values[key] for key in values if key.endswith(("token_id", "type")) or key == "architectures"}
    config |= {"tie_word_embeddings": kind != "qwen2_5_vl", "vision_config": vision}
    if kind == "qwen3_vl":
        config["text_config"] = text | {"model_type": "qwen3_vl_text"}
        vision["model_type"] = "qwen3_vl"
    else:
        config |= text | more | {"torch_dtype": "bfloat16", "use_sliding_window": False}
        vision |= {"spatial_patch_size": PATCH, "tokens_per_second": 2}
    images = read_json(theirs.folder / "processor_config.json")["image_processor"]
    if kind == "qwen2_vl":
        images |= {"min_pixels": images["size"]["shortest_edge"], "max_pixels": images["size"]["longest_edge"]}
        images["size"] = {"min_pixels": 1, "max_pixels": 2}
    if kind == "qwen2_5_vl":
        images["image_processor_type"] = "Qwen2_5_VLImageProcessor"
    folder = as_published(theirs.folder, tmp_path / "published", config, {}, json.dumps(images))
    model, processor = load_model(folder)
    expected = load_model(theirs.folder)
    assert (model.config, processor.config) == (expected[0].config, expected[1].config)
    check_logits(folder, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_names_as_transformers_has_them_in_memory(
    get_theirs: Callable[[str], Theirs], kind: str, tmp_path: Path
) -> None:
    theirs = get_theirs(kind)
    folder = shutil.copytree(theirs.folder, tmp_path / "copy")
    theirs.model.save_pretrained(folder, save_original_format=False)
    one, other = (load_model(path)[0].state_dict() for path in (theirs.folder, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- Positions and sizes by hand ----


def test_positions_of_rows_and_columns() -> None:
    """Two words, an image of 2 x 3 tokens, one word, one of 3 x 1, two words."""
    found = mrope_positions(14, [(2, (2, 3)), (9, (3, 1))])
    first = [(2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4)]
    second = [(6, 6, 6), (6, 7, 6), (6, 8, 6)]
    text = {place: [(place, place, place)] for place in (0, 1, 5, 9, 10)}
    assert found.tolist() == [
        list(triple) for triple in [*text[0], *text[1], *first, *text[5], *second, *text[9], *text[10]]
    ]
    assert mrope_positions(3, []).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_which_component_turns_which_pair() -> None:
    device = torch.device("cpu")
    assert mrope_components((1, 2, 3), False, device).tolist() == [0, 1, 1, 2, 2, 2]
    # In turn for as long as rows and columns have pairs left; time takes the rest
    assert mrope_components((4, 2, 2), True, device).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert mrope_components((24, 20, 20), True, device).bincount().tolist() == [24, 20, 20]


@settings(max_examples=300)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from([8, 28, 32]),
    st.tuples(st.integers(1, 300), st.integers(0, 1000)),
)
def test_the_same_sizes(size: tuple[int, int], cell: int, cells: tuple[int, int]) -> None:
    """Stops: rounding by halves in another way, sides that are rounded before they are shrunk."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    least, most = cells[0] * cell**2, sum(cells) * cell**2
    if max(size) > 200 * min(size):
        with pytest.raises(ImageError, match="too long and thin: a side may be 200 times the other"):
            nearest_cells(size, cell, least, most)
    else:
        assert nearest_cells(size, cell, least, most) == smart_resize(*size, cell, least, most)


# ---- Batches, training, saving ----


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_images_see_nothing_of_each_other(get_theirs: Callable[[str], Theirs], kind: str) -> None:
    """In training they go through the tower together, else one by one."""
    model, processor = load_model(get_theirs(kind).folder)
    examples = examples_of(processor, [CHATS[4], CHATS[1], CHATS[1]])
    batch = collate([[example] for example in examples], processor.pixels(examples))
    alone, together = model.eval().image_tokens(batch), model.train().image_tokens(batch)
    assert len(alone) == 4
    for one, other in zip(alone, together, strict=True):
        for level, same in zip([one.tokens, *one.deepstack], [other.tokens, *other.deepstack], strict=True):
            torch.testing.assert_close(level, same, **CLOSE)


@torch.inference_mode()
def test_packed_rows_and_known_images(get_theirs: Callable[[str], Theirs]) -> None:
    """Documents side by side in a row give what each gives alone, and so do images that are known already."""
    model, processor = load_model(get_theirs("qwen3_vl").folder)
    examples = examples_of(processor, CHATS[1:4])
    together = collate([examples[:2], examples[2:]], processor.pixels(examples))
    assert together.position_ids.shape == (*together.input_ids.shape, 3)
    images = model.image_tokens(together)
    packed = model(together)
    without = collate([examples[:2], examples[2:]], processor.pixels([]))
    torch.testing.assert_close(model(without, images=images), packed, atol=0, rtol=0)
    places = [(0, 0), (0, len(examples[0])), (1, 0)]
    for example, (row, start) in zip(examples, places, strict=True):
        alone = model(collate([[example]], processor.pixels([example])))[0]
        torch.testing.assert_close(packed[row, start : start + len(example)], alone, **CLOSE)


def test_training_labels(get_theirs: Callable[[str], Theirs]) -> None:
    _, processor = load_model(get_theirs("qwen2_vl").folder)
    example = processor(processor.chat(CHATS[5][:2], answer_starts=False))
    learned = example.labels[example.labels != IGNORE_INDEX].tolist()
    assert processor.tokenizer.decode(learned, keep_special=True) == "A red ball.<|im_end|>"


def test_branches_go_on_from_the_shared_image(get_theirs: Callable[[str], Theirs]) -> None:
    _, processor = load_model(get_theirs("qwen2_vl").folder)
    document = processor.captions(Image(make_picture(1, (40, 30))), "What?", ["red", "blue and red"])
    example = processor(document)
    whole = processor(type(document)(document.branches[1]))
    shared = int((example.branch_ids == 0).sum())
    second = example.position_ids[example.branch_ids == 2]
    assert torch.equal(second, whole.position_ids[shared : shared + len(second)])
    assert second[0, 0] < shared  # the image counts by its longer side


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen3_vl", {}), ("qwen2_5_vl", {"decoder": "full", "vision_blocks": 1}), ("qwen2_vl", {"vision_blocks": 3})],
)
def test_finetuning(get_theirs: Callable[[str], Theirs], tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Also that a folder of ours brings back what was saved in it."""
    task = check_finetuning(get_theirs(kind).folder, tmp_path, CHATS, **changes)
    assert task.processor.config.mrope
    assert (task.model.config.lora is None) == ("decoder" in changes)


@pytest.mark.parametrize("kind", KINDS)
def test_export(get_theirs: Callable[[str], Theirs], kind: str, tmp_path: Path) -> None:
    """transformers reads our folder and says what the model that it came from says."""
    import transformers as hf

    theirs, chat = get_theirs(kind), CHATS[4]
    export_model(theirs.folder, tmp_path / "out", dtype="float32")
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    inputs = Theirs(tmp_path / "out", model, hf.AutoProcessor.from_pretrained(tmp_path / "out")).inputs(chat)
    expected = theirs.inputs(chat)
    assert all(torch.equal(inputs[name], expected[name]) for name in ("input_ids", "pixel_values", "image_grid_thw"))
    theirs.model.model.rope_deltas = None
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, theirs.model(**expected).logits, **CLOSE)
    export_model(theirs.folder, tmp_path / "alone", dtype="float32", decoder_only=True)
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "alone", dtype=torch.float32).eval()
    assert alone.config.model_type == ("qwen3" if kind == "qwen3_vl" else "qwen2")
    text = theirs.inputs(CHATS[0])
    theirs.model.model.rope_deltas = None
    with torch.inference_mode():
        found = alone(input_ids=text["input_ids"]).logits
        torch.testing.assert_close(found, theirs.model(**text).logits, **CLOSE)
    with pytest.raises(CheckpointError, match="a tower for images of any size is not written as GGUF; --decoder-only"):
        export_model(theirs.folder, tmp_path / "gguf", format="gguf")


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen2_vl", "visual.merger.ln_q.bias"),
        ("qwen2_5_vl", "visual.blocks.1.mlp.up_proj.bias"),
        ("qwen3_vl", "model.visual.deepstack_merger_list.1.norm.weight"),
    ],
)
def test_missing_and_left_over_tensors_are_named(
    get_theirs: Callable[[str], Theirs], kind: str, name: str, tmp_path: Path
) -> None:
    check_account(get_theirs(kind).folder, tmp_path, name)


def test_errors_name_what_does_not_fit(get_theirs: Callable[[str], Theirs]) -> None:
    for kind, part, changes, message in (
        ("qwen2_vl", "vision_config", {"in_chans": 1}, "vision_config: only in_chans 3 is supported, not 1"),
        ("qwen2_vl", "vision_config", {"spatial_patch_size": 7}, "only spatial_patch_size 4 is supported, not 7"),
        ("qwen2_vl", "vision_config", {"hidden_act": "swish"}, "hidden_act: unknown activation 'swish'"),
        ("qwen2_vl", "vision_config", {"depth": "3"}, "depth '3' is not a whole number"),
        ("qwen2_vl", "vision_config", {"patch_size": 5}, "config.json: patch_size is 4, but the model has 5"),
        ("qwen2_vl", "vision_config", {"temporal_patch_size": 1}, "temporal_patch_size is 2, but the model has 1"),
        ("qwen2_vl", "vision_config", {"hidden_size": 40}, "the tower gives vectors of 40, the decoder takes 32"),
        ("qwen2_vl", "vision_config", {"num_heads": 5}, "width 24 is not a multiple of 4 · num_heads 5"),
        ("qwen2_vl", "", {"vision_config": None}, "no vision_config"),
        ("qwen2_vl", "", {"image_token_id": 7}, "image_token_id is 7, but the tokenizer's <|image_pad|> is 5"),
        ("qwen2_5_vl", "vision_config", {"window_size": 7}, "window_size 7 is less than a cell of 8 pixels"),
        ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [3]}, "full_layers names layer 3, but there are 3"),
        ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": 3}, "fullatt_block_indexes 3 is not a list of whole"),
        ("qwen2_5_vl", "vision_config", {"hidden_act": "gelu"}, "activation 'silu' and gated_mlp go together"),
        ("qwen3_vl", "vision_config", {"num_position_embeddings": 26}, "num_position_embeddings 26 is not a square"),
        (
            "qwen3_vl",
            "vision_config",
            {"deepstack_visual_indexes": [1, 0]},
            "deepstack must name layers in their order",
        ),
        ("qwen3_vl", "vision_config", {"rope_parameters": {"rope_theta": 5}}, "only axial with theta 10000"),
        ("qwen3_vl", "rope", {"mrope_section": [3, 2, 2]}, "mrope_section must be three counts of the 8 pairs"),
        ("qwen3_vl", "rope", {"mrope_section": [2, 3, 3]}, "cannot take turns: its first must be the largest"),
        ("qwen3_vl", "rope", {"mrope_section": 8}, "mrope_section 8 is not a list of whole numbers"),
        ("qwen3_vl", "rope", {"mrope_interleaved": False}, "mrope_interleaved must be True for qwen3_vl_text"),
        ("qwen3_vl", "rope", {"rope_type": "yarn", "factor": 2.0}, "rope scaling 'yarn' is not supported"),
    ):
        folder = get_theirs(kind).folder
        values, tokenizer = read_json(folder / "config.json"), load_model(folder)[1].tokenizer
        place = {"": values, "rope": values["text_config"]["rope_parameters"]}.get(part) or values[part]
        place.update(changes)
        with pytest.raises((CheckpointError, ConfigError), match=message):
            read(folder, values, tokenizer)


def test_other_processors_and_lost_templates_are_refused(get_theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    folder = shutil.copytree(get_theirs("qwen2_vl").folder, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load_model(folder)
    values = read_json(folder / "processor_config.json")
    for changes, message in (
        (
            {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 8}},
            "image processor is not that of model type 'qwen2_vl'",
        ),
        ({"size": {"height": 8, "width": 8}}, "size is .*expected shortest_edge and longest_edge, in pixels"),
        ({"size": {"shortest_edge": 9}}, "longest_edge must be a whole number of pixels, not None"),
        ({"max_pixels": 8}, "tiling 'native': min_pixels and max_pixels must be 1 to .* not 256 and 8"),
        ({"merge_size": 4}, "merge_size is 4, but the model has 2"),
    ):
        changed = values | {"image_processor": values["image_processor"] | changes}
        (folder / "processor_config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


def test_slivers_and_videos_are_refused_in_one_line(get_theirs: Callable[[str], Theirs]) -> None:
    _, processor = load_model(get_theirs("qwen2_vl").folder)
    with pytest.raises(ImageError, match="an image of 601 x 3 pixels is too long and thin"):
        processor(processor.chat([user(make_picture(1, (601, 3)), QUESTION)]))
    with pytest.raises(MMGPTError, match="message 0 has a video: models read text and images here"):
        processor.chat([user({"type": "video", "video": "x.mp4"}, QUESTION)])


def test_configurations_are_checked() -> None:
    for values, message in (
        ({"kind": "native", "min_pixels": 1, "max_pixels": 2}, "tiling 'native' has no global tile"),
        ({"kind": "native", "whole": False}, "min_pixels and max_pixels must be 1 to"),
        ({"kind": "idefics3", "longest_edge": 56, "max_pixels": 9}, "min_pixels and max_pixels must be 0 to 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            TilingConfig(**values)
    many = TilingConfig(kind="native", whole=False, min_pixels=1, max_pixels=2**26)
    with pytest.raises(ConfigError, match="makes up to 4194304 tiles of 4 pixels: too many"):
        Tiler(ImageTransformConfig(4), many)
    sizes: dict[str, Any] = {"patch_size": 4, "width": 24, "num_layers": 2, "num_heads": 2, "mlp_width": 8}
    for changes, message in (
        ({"merge": 0}, "merge must be positive, got 0"),
        ({"width": 20}, "width 20 is not a multiple of 4 · num_heads 2"),
        ({"num_layers": 1001}, "num_layers 1001 is more than 1000"),
        ({"gated_mlp": True}, "activation 'silu' and gated_mlp go together"),
        ({"window": -1}, "cannot be below 0"),
        ({"deepstack": (2,)}, "deepstack names layer 2, but there are 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            NativeViTConfig(**sizes | changes)
