"""Gemma 3 with images against transformers: logits, pixels, prompt ids, greedy answers; training; damaged folders."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
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
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

import mm_gpt
from mm_gpt.document import Document, Image, interleave
from mm_gpt.errors import CheckpointError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.hub.families.gemma3 import read
from mm_gpt.processor import IGNORE_INDEX, collate
from mm_gpt.tokenizer import Tokenizer

A, B, C = make_picture(0, (40, 30)), make_picture(1, (31, 57)), make_picture(2, (60, 21))
ANSWER = {"role": "assistant", "content": "It is red."}
CHATS = [
    [user("What is red?")],
    [user(A, "What is this?")],
    [user("First ", B, "and then", C, "which is blue, é?")],
    [{"role": "system", "content": "Be short."}, user(C, "What colour?"), ANSWER, user("And ", A, "\n\nhere?")],
    [user(A, B)],
]
TOKENS = 9
"""Of an image: 6 x 6 patches, 2 x 2 to a token. The window is shorter."""
# What google/gemma-3-4b-it's does: the system message before the first turn, `model` for the assistant, trimmed texts.
TEMPLATE = """\
{{ bos_token }}
{%- set first = messages[0]['role'] == 'system' -%}
{%- if first -%}
    {%- set content = messages[0]['content'] -%}
    {%- set prefix = (content if content is string else content[0]['text']) + '\n\n' -%}
{%- endif -%}
{%- for message in messages[(1 if first else 0):] -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- prefix if first and loop.first else '' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""


LAYOUTS = {
    "published": {"vision_tower.": "vision_tower.vision_model."},
    "in memory": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}
"""Names of tensors besides those that today's transformers writes."""


class Theirs(NamedTuple):
    folder: Path
    model: Any
    processor: Any

    def inputs(self, chat: list[Any]) -> dict[str, Tensor]:
        """What their processor makes of one of our chats."""
        messages = [{"role": m["role"], "content": self.content(m["content"])} for m in chat]
        return dict(
            self.processor.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        )

    @staticmethod
    def content(content: Any) -> Any:
        parts = [content] if isinstance(content, str) else content
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ]


def make_tokenizer() -> Any:
    """Gemma 3's: BPE with bytes for what it lacks, spaces as ▁, runs of line ends as tokens of their own."""
    from transformers import GemmaTokenizer

    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁|\n"), "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=["\n"], show_progress=False)
    backend.train_from_iterator(["What colour is this? It is red.", "user model which"] * 3, trainer)
    state = json.loads(backend.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]])
    tokenizer.add_tokens([tokenizers.AddedToken(ends, normalized=False) for ends in ("\n\n", "\n\n\n", "\n\n\n\n")])
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"extra_special_tokens": [*turns, *marks.values()]})
    for name, token in marks.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    return tokenizer


def make_theirs(folder: Path, **text: Any) -> Theirs:
    import transformers as hf

    tokenizer = make_tokenizer()
    images = hf.Gemma3ImageProcessor(size={"height": 42, "width": 42}, image_seq_length=TOKENS)
    processor = hf.Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=TOKENS)
    ids = {f"{key}_token_index": getattr(tokenizer, f"{key}_token_id") for key in ("image", "boi", "eoi")}
    config = hf.Gemma3Config(
        text_config={
            "model_type": "gemma3_text",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 6,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "vocab_size": len(tokenizer) + 8,
            "max_position_embeddings": 512,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            **text,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "patch_size": 7,
            "image_size": 42,
            "vision_use_head": False,
        },
        mm_tokens_per_image=TOKENS,
        **ids,
    )
    torch.manual_seed(0)
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    roughen(model)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Theirs(folder, model, processor)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return make_theirs(tmp_path_factory.mktemp("gemma3"))


def check_logits(folder: Path, theirs: Theirs) -> None:
    for ours, chat in zip(logits_of(*load_model(folder), CHATS), CHATS, strict=True):
        with torch.inference_mode():
            expected = theirs.model(**theirs.inputs(chat)).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_same_logits_pixels_and_ids(theirs: Theirs) -> None:
    """Stops: images scaled along with Gemma's words, a causal image, an image that sees the next one, a window that
    does not end in an image, patches averaged in another order, a norm without its one, marks without line ends."""
    model, processor = load_model(theirs.folder)
    for example, chat in zip(examples_of(processor, CHATS), CHATS, strict=True):
        expected = theirs.inputs(chat)
        assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert example.image_tokens == int(expected["token_type_ids"].sum())
        if example.images:
            assert torch.equal(processor.pixels([example]), expected["pixel_values"])
    check_logits(theirs.folder, theirs)
    one, other = logits_of(model, processor, [[user(A, "What?")], [user(B, "What?")]])
    assert (one - other).abs().max() > 0.1  # the picture matters


def test_same_features(theirs: Theirs) -> None:
    model, processor = load_model(theirs.folder)
    (example,) = examples_of(processor, [CHATS[2]])
    pixels = processor.pixels([example])
    with torch.inference_mode():
        expected = theirs.model.get_image_features(pixels).pooler_output
        found = [image.tokens for image in model.image_tokens(collate([[example]], pixels))]
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=1e-5)


def test_same_masks(theirs: Theirs) -> None:
    """Who sees whom, in global and in local layers, as transformers' own function has it."""
    model, processor = load_model(theirs.folder)
    for example, chat in zip(examples_of(processor, CHATS), CHATS, strict=True):
        masks = model.masks(collate([[example]], processor.pixels([example])))
        if not example.images:
            assert masks == {"mask": None, "local_mask": None}
            continue
        T = len(example)
        theirs_of = theirs.model.create_masks_for_generate(
            theirs.model.config,
            inputs_embeds=torch.zeros(1, T, 32),
            attention_mask=torch.ones(1, T, dtype=torch.long),
            cache=None,
            position_ids=torch.arange(T)[None],
            token_type_ids=theirs.inputs(chat)["token_type_ids"],
        )
        assert torch.equal(masks["mask"], theirs_of["full_attention"])
        assert torch.equal(masks["local_mask"], theirs_of["sliding_attention"])
        # After a part that is in the cache, and that ends before an image, the rest sees what it would see at once.
        past = example.image_starts[-1] - 1
        rest = type(example)(
            *(t[past:] for t in (example.input_ids, example.labels, example.position_ids, example.branch_ids)),
            images=example.images[-1:],
            grids=example.grids[-1:],
            sizes=example.sizes[-1:],
        )
        later = model.masks(collate([[rest]], processor.pixels([rest])), past=past)
        for name, mask in masks.items():
            assert torch.equal(later[name], mask[:, :, past:])


@pytest.mark.parametrize("rename", LAYOUTS.values(), ids=LAYOUTS)
def test_the_published_layouts(
    theirs: Theirs, rename: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As google/gemma-3-4b-it is stored: few keys, the tower under `vision_model`, shards, image settings that are
    null, and a text configuration that leaves out what is Gemma's default."""
    values = json.loads((theirs.folder / "config.json").read_text())
    text = ("hidden_size", "intermediate_size", "model_type", "num_hidden_layers", "sliding_window", "head_dim")
    text = (*text, "num_attention_heads", "num_key_value_heads", "query_pre_attn_scalar", "vocab_size", "layer_types")
    vision = ("hidden_size", "image_size", "intermediate_size", "model_type", "num_attention_heads")
    vision = (*vision, "num_hidden_layers", "patch_size", "vision_use_head")
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        **{key: values[key] for key in ("boi_token_index", "eoi_token_index", "image_token_index")},
        "eos_token_id": [1, 106],
        "initializer_range": 0.02,
        "mm_tokens_per_image": TOKENS,
        "model_type": "gemma3",
        "text_config": {
            **{key: values["text_config"][key] for key in text},
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {key: values["vision_config"][key] for key in vision},
    }
    pan = dict.fromkeys(("max_num_crops", "min_crop_size", "min_ratio_to_activate"))
    images = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": TOKENS,
        "image_std": [0.5, 0.5, 0.5],
        **{f"pan_and_scan_{key}": value for key, value in pan.items()},
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 42, "width": 42},
    }
    folder = as_published(theirs.folder, tmp_path / "published", config, rename, json.dumps(images))
    own = {"image_seq_length": TOKENS, "processor_class": "Gemma3Processor"}
    (folder / "processor_config.json").write_text(json.dumps(own))
    check_logits(folder, theirs)
    assert "unknown keys" not in caplog.text


def test_the_same_answers(theirs: Theirs, tmp_path: Path) -> None:
    """Stops: decode steps with another window than the prompt, or whose local layers forget another token."""
    inputs = theirs.inputs([user(A, "What is this?")])
    out = theirs.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    check_answers(theirs.folder, A, "What is this?", out[inputs["input_ids"].shape[1] :].tolist(), tmp_path)


def test_answers_of_a_batch_and_of_a_conversation(theirs: Theirs) -> None:
    """Prompts with two, one and no images in one batch; then a second turn whose image comes after what is cached."""
    assistant = mm_gpt.load(theirs.folder, device="cpu")
    options: Any = {"max_new_tokens": 6, "logprobs": True}
    chats = [CHATS[2], CHATS[0], CHATS[1], CHATS[3]]
    documents = [assistant.processor.chat(chat) for chat in chats]
    answers = assistant.engine.generate(documents, assistant.chat_config(options))
    for chat, answer in zip(chats, answers, strict=True):
        inputs = theirs.inputs(chat)
        out = theirs.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert [token.id for token in answer.logprobs or ()] == out.tolist()
    talk = assistant.conversation(**options)
    first = talk.say([Image(C), "What colour?"])
    second = talk.say(["And ", Image(A), "here?"])
    said = [user(C, "What colour?"), {"role": "assistant", "content": first}, user("And ", A, "here?")]
    assert second == assistant.chat(said, **options)
    assert talk.tokens_read < second.prompt_tokens - TOKENS


def test_a_base_model_continues_what_is_there(theirs: Theirs, tmp_path: Path) -> None:
    """As google/gemma-3-4b-pt: no chat template. And `complete`, for any of them: text and images as they stand."""
    for path in theirs.folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    _, processor = load_model(tmp_path)
    text = "First <start_of_image>, then <start_of_image> is"
    expected = theirs.processor(text=text, images=[[A, B]], return_tensors="pt")["input_ids"][0].tolist()
    parts = ["First ", Image(A), ", then ", Image(B), " is"]
    assert processor(processor.chat([user(*parts)])).input_ids.tolist() == expected
    _, processor = load_model(theirs.folder)
    assert processor(Document(tuple(interleave(parts)))).input_ids.tolist() == expected


def test_training_labels(theirs: Theirs) -> None:
    """The answer and its end are learned; images and marks are not."""
    _, processor = load_model(theirs.folder)
    example = processor(processor.chat([user(A, "What?"), ANSWER], answer_starts=False))
    learned = example.labels[example.labels != IGNORE_INDEX].tolist()
    assert processor.tokenizer.decode(learned, keep_special=True) == "It is red.<end_of_turn>"


def test_captions_that_share_a_picture(theirs: Theirs) -> None:
    """In training the picture and the question are read once, and each caption as if it were alone behind them."""
    model, processor = load_model(theirs.folder)
    captions = ["a red ball", "it is blue"]
    example = processor(processor.captions(Image(A), "What is this?", captions))
    with torch.inference_mode():
        logits = model.decoder.logits(model(collate([[example]], processor.pixels([example]))))[0]
        for number, caption in enumerate(captions, start=1):
            alone = processor(
                processor.chat(
                    [user(A, "What is this?"), {"role": "assistant", "content": caption}], answer_starts=False
                )
            )
            images = (alone.input_ids == theirs.model.config.image_token_id).long()
            expected = theirs.model(
                input_ids=alone.input_ids[None], token_type_ids=images[None], pixel_values=processor.pixels([alone])
            ).logits[0]
            own = (example.branch_ids == number) & (example.labels != IGNORE_INDEX)
            assert own.sum() > 3
            torch.testing.assert_close(logits[own], expected[alone.labels != IGNORE_INDEX], **CLOSE)


@pytest.mark.parametrize("changes", [{}, {"decoder": "full", "vision_blocks": 1}], ids=["lora", "full"])
def test_finetuning(theirs: Theirs, tmp_path: Path, changes: dict[str, Any]) -> None:
    task = check_finetuning(theirs.folder, tmp_path, CHATS, **changes)
    assert task.model.config.bidirectional_images


def test_saved_and_loaded_again(theirs: Theirs, tmp_path: Path) -> None:
    model, processor = load_model(theirs.folder)
    save_model(model, processor, tmp_path)
    for ours, again in zip(logits_of(model, processor, CHATS), logits_of(*load_model(tmp_path), CHATS), strict=True):
        torch.testing.assert_close(again, ours, atol=2e-2, rtol=0.0)  # matrices are stored in half precision


def test_words_that_look_like_marks_stay_words(theirs: Theirs) -> None:
    model, processor = load_model(theirs.folder)
    (example,) = examples_of(processor, [[user(A, "What is <start_of_image> or <image_soft_token>?")]])
    assert example.image_tokens == TOKENS
    batch = collate([[example]], processor.pixels([example]))
    assert model(batch).isfinite().all()


def test_errors_name_what_does_not_fit(theirs: Theirs, tmp_path: Path) -> None:
    check_account(theirs.folder, tmp_path, "multi_modal_projector.mm_soft_emb_norm.weight")
    values = json.loads((theirs.folder / "config.json").read_text())
    for change, said in (
        ({"image_token_index": 7}, "image_token_index 7 is no special token"),
        ({"text_config": values["text_config"] | {"model_type": "gemma3"}}, "'gemma3'.*gemma3_text"),
        ({"mm_tokens_per_image": 16}, "mm_tokens_per_image 16 does not fit the 6 patches"),
        ({"mm_tokens_per_image": 4}, "processor_config.json: image_seq_length is 9, but the model makes 4 tokens"),
        ({"vision_config": values["vision_config"] | {"image_size": 28}}, "images of 42 pixels .* tower of 28"),
        ({"vision_config": values["vision_config"] | {"layer_norm_eps": 1e-5}}, "only layer_norm_eps 1e-06"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read(theirs.folder, values | change, Tokenizer.from_hf_folder(theirs.folder))


def test_pan_and_scan_is_refused(theirs: Theirs, tmp_path: Path) -> None:
    for path in theirs.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = json.loads((theirs.folder / "processor_config.json").read_text())
    settings["image_processor"]["do_pan_and_scan"] = True
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"processor_config\.json: do_pan_and_scan is True"):
        load_model(tmp_path)
