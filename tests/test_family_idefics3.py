"""Idefics3 and SmolVLM against transformers: logits, pixels, prompt ids, greedy answers; training; damaged folders."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_repository
import tokenizers
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
from test_repository import NAME, Hub
from tokenizers import decoders, models, pre_tokenizers, trainers

import mm_gpt
from mm_gpt.commands.cli import main
from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.families.idefics3 import read
from mm_gpt.processor import IGNORE_INDEX

hub, cache = test_repository.hub, test_repository.cache  # fixtures

# Tiles of 28 pixels, an image enlarged to 56: grids of 2 x 2, 1 x 2 and 2 x 1.
A, B, C = make_picture(0, (40, 30)), make_picture(1, (60, 21)), make_picture(2, (13, 57))
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A red ball."}]}
CHATS = [
    [user("What is red?")],
    [user(A, "What is this?")],
    [user("First ", B, "and then", C, " which is red?")],
    [user(C, "What is it, é?"), ANSWER, user("And ", A, "\n\nhere?")],
]
# What the published template does: no space between a speaker's colon and an image.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MARKS = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]


class Theirs(NamedTuple):
    folder: Path
    model: Any
    processor: Any

    def inputs(self, chat: list[Any]) -> dict[str, Any]:
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


def make_tokenizer(marks: list[str]) -> Any:
    """SmolLM2's kind; `marks` are the special tokens for the places of tiles."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<fake_token_around_image>", "<image>", "<end_of_utterance>", *marks]
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=words.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["User: What is this?\n\nAssistant: A red ball.", "\n\n"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def make_theirs(folder: Path, kind: str, marks: list[str], **values: Any) -> Theirs:
    import transformers as hf
    from transformers.models.smolvlm import processing_smolvlm

    tokenizer = make_tokenizer(marks)
    common: Any = {"image_seq_len": 4, "chat_template": TEMPLATE}
    settings: Any = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    if kind == "idefics3":
        processor: Any = hf.Idefics3Processor(hf.Idefics3ImageProcessor(**settings), tokenizer, **common)
        config_class: Any = hf.Idefics3Config
        model_class: Any = hf.Idefics3ForConditionalGeneration
    else:
        processing_smolvlm.num2words = str  # an extra package that writes the number of a video's frames
        videos = hf.SmolVLMVideoProcessor(**settings)
        images = hf.SmolVLMImageProcessor(**settings)
        processor = hf.SmolVLMProcessor(images, tokenizer, videos, **common)
        config_class, model_class = hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration
    config = config_class(
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer) + 8,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000},
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "patch_size": 7,
            "image_size": 28,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **values,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    roughen(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Theirs(folder, model, processor)


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """As SmolVLM-256M: the marks of rows and columns are tokens."""
    return make_theirs(tmp_path_factory.mktemp("idefics3"), "idefics3", MARKS)


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """SmolVLM2's classes with a tied head, and with marks that are ordinary text, as in the first 2.2B model."""
    return make_theirs(tmp_path_factory.mktemp("smolvlm"), "smolvlm", [], tie_word_embeddings=True)


@pytest.fixture(scope="module")
def smolvlm2(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """As SmolVLM2-256M-Video."""
    return make_theirs(tmp_path_factory.mktemp("smolvlm2"), "smolvlm", MARKS)


@pytest.fixture(params=["idefics3", "smolvlm", "smolvlm2"])
def theirs(request: pytest.FixtureRequest) -> Theirs:
    return request.getfixturevalue(request.param)


def check_logits(folder: Path, theirs: Theirs) -> None:
    for ours, chat in zip(logits_of(*load_model(folder), CHATS), CHATS, strict=True):
        with torch.inference_mode():
            expected = theirs.model(**theirs.inputs(chat)).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_same_logits_pixels_and_ids(theirs: Theirs) -> None:
    """Stops: the features of a square side by side in another order, a bias in the projection, tiles in another order,
    a line end too many or too few around them, a head that is tied where it is not, positions shifted by padding."""
    model, processor = load_model(theirs.folder)
    for example, chat in zip(examples_of(processor, CHATS), CHATS, strict=True):
        expected = theirs.inputs(chat)
        assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
        if example.images:
            assert torch.equal(processor.pixels([example]), expected["pixel_values"][0])
    check_logits(theirs.folder, theirs)
    one, other = logits_of(model, processor, [[user(A, "What?")], [user(make_picture(9, (40, 30)), "What?")]])
    assert (one - other).abs().max() > 0.1  # the picture matters


def test_marks_are_the_template_s_alone(theirs: Theirs) -> None:
    """What people write is text; to transformers a user's <row_1_col_1> is the mark of a tile, if that is a token."""
    _, processor = load_model(theirs.folder)
    chat = [user(A, "What is <row_1_col_1>?")]
    (example,) = examples_of(processor, [chat])
    expected = theirs.inputs(chat)["input_ids"][0].tolist()
    mark = processor.tokenizer.special.get("<row_1_col_1>")
    assert (example.input_ids.tolist() == expected) == (mark is None)
    if mark is not None:
        assert expected.count(mark) == 2
        assert example.input_ids.tolist().count(mark) == 1


def test_without_splitting(idefics3: Theirs, tmp_path: Path) -> None:
    """`do_image_splitting` false: one tile, without rows and columns, made by two resizes nevertheless."""
    model, _ = load_model(idefics3.folder)
    settings = json.loads((idefics3.folder / "processor_config.json").read_text())
    settings["image_processor"]["do_image_splitting"] = False
    for path in idefics3.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    _, processor = load_model(tmp_path)
    idefics3.processor.image_processor.do_image_splitting = False
    try:
        inputs = idefics3.inputs(CHATS[2])
    finally:
        idefics3.processor.image_processor.do_image_splitting = True
    (example,) = examples_of(processor, [CHATS[2]])
    assert example.image_tokens == 2 * 4
    assert example.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(processor.pixels([example]), inputs["pixel_values"][0])
    with torch.inference_mode():
        expected = idefics3.model(**inputs).logits[0]
    torch.testing.assert_close(logits_of(model, processor, [CHATS[2]])[0], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm2"])
def test_the_published_layout(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As HuggingFaceTB/SmolVLM-256M-Instruct and SmolVLM2-256M-Video-Instruct are stored: few keys and those of their
    training code, `preprocessor_config` beside a `processor_config` without image settings, what the second does with
    videos, the template in a JSON file, shards."""
    theirs: Theirs = request.getfixturevalue(kind)
    name = "SmolVLM" if kind == "smolvlm2" else "Idefics3"
    values = json.loads((theirs.folder / "config.json").read_text())
    text = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    text = (*text, "vocab_size", "head_dim", "max_position_embeddings", "model_type", "rms_norm_eps")
    vision = ("hidden_size", "image_size", "num_attention_heads", "patch_size", "intermediate_size")
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "image_token_id": values["image_token_id"],
        "model_type": name.lower(),
        "scale_factor": 2,
        "text_config": {
            **{key: values["text_config"][key] for key in text},
            "_flash_attn_2_enabled": True,
            "architectures": ["VLlama3ForCausalLM"],
            "is_llama_config": True,
            "neftune_noise_alpha": 0.0,
            "pad_token_id": 2,
            "perceiver_config": {"model_type": "vllama3", "n_latents": 64},
            "pixel_shuffle_factor": 4,
            "qk_layer_norms": False,
            "rope_interleaved": False,
            "rope_theta": 100_000,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
            "use_resampler": False,
        },
        "tie_word_embeddings": False,
        "use_reentrant_checkpointing": False,
        "vision_config": {
            **{key: values["vision_config"][key] for key in vision},
            "max_image_size": {"longest_edge": 28},
            "model_type": values["vision_config"]["model_type"],
            "num_hidden_layers": 2,
            "size": {"longest_edge": 56},
            "use_base_siglip": False,
        },
        "vocab_size": values["text_config"]["vocab_size"],
    }
    images = json.loads((theirs.folder / "processor_config.json").read_text())["image_processor"]
    images["image_processor_type"] = f"{name}ImageProcessor"
    images["video_sampling"] = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 28}}
    folder = as_published(theirs.folder, tmp_path / "published", config, {}, json.dumps(images))
    own = {"image_seq_len": 4, "processor_class": f"{name}Processor"}
    (folder / "processor_config.json").write_text(json.dumps(own))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    _, processor = load_model(folder)
    assert "unknown keys" not in caplog.text
    (example,) = examples_of(processor, [CHATS[2]])
    assert example.input_ids.tolist() == theirs.inputs(CHATS[2])["input_ids"][0].tolist()
    check_logits(folder, theirs)


def test_the_same_answers(theirs: Theirs, tmp_path: Path) -> None:
    inputs = theirs.inputs([user(A, "What is this?")])
    out = theirs.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    check_answers(theirs.folder, A, "What is this?", out[inputs["input_ids"].shape[1] :].tolist(), tmp_path)


def test_by_its_name_from_a_hub(
    hub: Hub,
    cache: Path,
    smolvlm: Theirs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole way of `mm-gpt ask --model OWNER/NAME`: fetched, answered, and answered again without a network."""
    A.save(tmp_path / "shown.png")
    hub.files = {path.name: path.read_bytes() for path in smolvlm.folder.iterdir()}
    expected = mm_gpt.load(smolvlm.folder, device="cpu").ask(A, "What is this?", max_new_tokens=4)
    command = ["ask", "--model", NAME, str(tmp_path / "shown.png"), "What is this?", "--max-new-tokens", "4"]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == expected
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == expected


def test_training_labels(smolvlm: Theirs) -> None:
    """The answer and <end_of_utterance> are learned, and nothing else: no tile, no mark, no line end. The
    token of the answer's first word holds the space that the template writes."""
    _, processor = load_model(smolvlm.folder)
    example = processor(processor.chat([*CHATS[3][:2]], answer_starts=False))
    learned = example.labels[example.labels != IGNORE_INDEX].tolist()
    assert processor.tokenizer.decode(learned, keep_special=True) == " A red ball.<end_of_utterance>"


@pytest.mark.parametrize("changes", [{}, {"decoder": "full", "vision_blocks": 1}], ids=["lora", "full"])
def test_finetuning(idefics3: Theirs, smolvlm: Theirs, tmp_path: Path, changes: dict[str, Any]) -> None:
    task = check_finetuning((smolvlm if changes else idefics3).folder, tmp_path, CHATS, **changes)
    assert task.processor.config.tiling is not None


def test_videos_are_refused(smolvlm2: Theirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, processor = load_model(smolvlm2.folder)
    for part in ({"type": "video", "path": "clip.mp4"}, {"type": "video_url", "video_url": {"url": "clip.mp4"}}):
        with pytest.raises(MMGPTError, match=r"message 0 has a video: .* give frames as images"):
            processor.chat([user(part, "What happens?")])
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100))
    assert main(["ask", str(tmp_path / "clip.mp4"), "What?", "--model", str(smolvlm2.folder)]) == 1
    assert "a video" in capsys.readouterr().err


def test_errors_name_what_does_not_fit(idefics3: Theirs, tmp_path: Path) -> None:
    check_account(idefics3.folder, tmp_path, "model.connector.modality_projection.proj.weight")
    values = json.loads((idefics3.folder / "config.json").read_text())
    _, processor = load_model(idefics3.folder)
    for changes, message in (
        ({"scale_factor": 3}, "scale_factor 3 does not divide the 4 patches"),
        ({"scale_factor": 4}, "processor_config.json: image_seq_len is 4, but the model makes 1 tokens"),
        ({"image_token_id": 7}, "image_token_id is 7, but the tokenizer's <image> is 4"),
        ({"text_config": {"model_type": "mistral"}}, "model_type 'mistral' is not supported, only 'llama'"),
        ({"text_config": {"use_resampler": True}}, "text_config: use_resampler must be False"),
        ({"vision_config": {**values["vision_config"], "image_size": 42}}, "sees 42 pixels, but tiles have 28"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(idefics3.folder, values | changes, processor.tokenizer)
        assert str(idefics3.folder) in str(caught.value)
