"""PaliGemma against transformers: logits, pixels, prompt ids, greedy answers; training; damaged folders."""

import dataclasses
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
    captioned_folder,
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
from torch.nn import functional

from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.families.paligemma import read
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Processor
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.language import LanguageTask
from mm_gpt.training.recipes import finetune

A, B = make_picture(0, (40, 30)), make_picture(1, (31, 57))
CASES = [
    ([], "What is red?"),
    ([A], "caption en"),
    ([A, B], "Which is blue, é?"),
    ([B], "What colour is the ball? " * 2),
]
CHATS = [[user(*images, prompt)] for images, prompt in CASES]


class Theirs(NamedTuple):
    folder: Path
    model: Any
    processor: Any

    def inputs(self, images: list[Any], prompt: str, suffix: str | None = None) -> dict[str, Tensor]:
        """What their processor makes of a prompt. It takes none without an image, so that one is put together here."""
        if images:
            text = "<image>" * len(images) + prompt
            return dict(self.processor(images=images, text=text, suffix=suffix, return_tensors="pt"))
        tokenizer = self.processor.tokenizer
        ids = tokenizer(f"{tokenizer.bos_token}{prompt}\n", return_tensors="pt").input_ids
        return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}


def make_tokenizer() -> Any:
    """Gemma's: BPE with bytes for what it lacks, spaces as ▁, no split into words."""
    from transformers import GemmaTokenizer

    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁|\n"), "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=["\n"], show_progress=False)
    backend.train_from_iterator(["caption en", "What colour is the ball? It is red.", "a red circle"] * 3, trainer)
    state = json.loads(backend.to_str())["model"]
    return GemmaTokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]])


def make_theirs(folder: Path, kind: str, **text: Any) -> Theirs:
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=make_tokenizer())
    config = PaliGemmaConfig(
        text_config={
            "model_type": kind,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": len(processor.tokenizer) + 8,
            **text,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "patch_size": 14,
            "image_size": 28,
            "vision_use_head": False,
        },
        projection_dim=32,
        hidden_size=32,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    roughen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Theirs(folder, model, processor)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return make_theirs(tmp_path_factory.mktemp("paligemma"), "gemma")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """PaliGemma 2, with a window shorter than its prompts: its local layers see the whole prefix nevertheless."""
    text = {"query_pre_attn_scalar": 16, "sliding_window": 6, "final_logit_softcapping": 3.0}
    return make_theirs(tmp_path_factory.mktemp("paligemma2"), "gemma2", **text)


@pytest.fixture(params=["gemma", "gemma2"])
def theirs(request: pytest.FixtureRequest) -> Theirs:
    return request.getfixturevalue(request.param)


def check_logits(model: MMGPT, processor: Processor, theirs: Theirs) -> None:
    for ours, (images, prompt) in zip(logits_of(model, processor, CHATS), CASES, strict=True):
        with torch.inference_mode():
            expected = theirs.model(**theirs.inputs(images, prompt)).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_same_logits_pixels_and_ids(theirs: Theirs) -> None:
    """Stops: images scaled along with Gemma's words, a causal prompt, the image behind <bos>, positions or a mask that
    padding shifts, a window that cuts the prefix, a missing line end."""
    model, processor = load_model(theirs.folder)
    examples = examples_of(processor, CHATS)
    for example, (images, prompt) in zip(examples, CASES, strict=True):
        expected = theirs.inputs(images, prompt)
        assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
        if images:
            assert torch.equal(processor.pixels([example]), expected["pixel_values"])
    check_logits(model, processor, theirs)
    one, other = logits_of(model, processor, [[user(A, "caption en")], [user(B, "caption en")]])
    assert (one - other).abs().max() > 0.1  # the picture matters


def test_the_published_layout(gemma: Theirs, tmp_path: Path) -> None:
    """As google/paligemma-3b-pt-224 is stored: few keys, the tower under `vision_model`, shards, an image file."""
    values = json.loads((gemma.folder / "config.json").read_text())
    text = ("hidden_size", "intermediate_size", "model_type", "num_attention_heads", "num_hidden_layers", "head_dim")
    text = (*text, "num_image_tokens", "num_key_value_heads", "vocab_size")
    vision = ("hidden_size", "intermediate_size", "model_type", "num_attention_heads", "num_hidden_layers")
    vision = (*vision, "patch_size", "projection_dim", "image_size", "vision_use_head")
    config = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "image_token_index": values["image_token_index"],
        "model_type": "paligemma",
        "projection_dim": 32,
        "text_config": {key: values["text_config"][key] for key in text},
        "vision_config": {key: values["vision_config"][key] for key in vision},
    }
    images = json.dumps(json.loads((gemma.folder / "processor_config.json").read_text())["image_processor"])
    folder = tmp_path / "published"
    as_published(gemma.folder, folder, config, {"vision_tower.": "vision_tower.vision_model."}, images)
    check_logits(*load_model(folder), gemma)


def test_the_same_answers(theirs: Theirs, tmp_path: Path) -> None:
    """Stops: what is generated read in both directions, or a cache whose local layers forget another token."""
    inputs = theirs.inputs([A], "caption en")
    out = theirs.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    check_answers(theirs.folder, A, "caption en", out[inputs["input_ids"].shape[1] :].tolist(), tmp_path)


def test_training_ids_and_labels(gemma: Theirs) -> None:
    """The answer and <eos> are learned; what stands before is not, and is the prefix that is read both ways."""
    _, processor = load_model(gemma.folder)
    example = processor(
        processor.chat([user(A, "caption en"), {"role": "assistant", "content": "a red ball"}], answer_starts=False)
    )
    expected = gemma.inputs([A], "caption en", suffix="a red ball")
    assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
    labels = expected["labels"][0].tolist()
    assert example.labels.tolist() == [*labels[1:], IGNORE_INDEX]


def test_finetuning(gemma: Theirs, gemma2: Theirs, tmp_path: Path) -> None:
    for name, start, changes in (("lora", gemma, {}), ("full", gemma2, {"decoder": "full", "vision_blocks": 1})):
        (tmp_path / name).mkdir()
        task = check_finetuning(start.folder, tmp_path / name, CHATS, **changes)
        assert task.model.config.prefix_lm


def test_the_loss_of_packed_rows(gemma2: Theirs, tmp_path: Path) -> None:
    """Several documents in a row, two of them of one picture with two captions: each is read as if it were alone. In a
    document that several captions share, the picture would not see the end of the prompt."""
    recipe = finetune(str(captioned_folder(tmp_path / "pictures")))
    task = LanguageTask(dataclasses.replace(recipe, start=str(gemma2.folder), lora=None, decoder="full"))
    (batch,) = task.micro_batches(0, 1)
    pixels, expected, documents = iter(batch.pixel_values), [], 0
    for ids, labels, numbers in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        for number in range(1, int(numbers.max()) + 1):
            own, wanted = ids[numbers == number], labels[numbers == number]
            suffix = torch.cat([torch.tensor([False]), wanted[:-1] != IGNORE_INDEX])
            with torch.inference_mode():
                logits = gemma2.model(
                    input_ids=own[None], token_type_ids=suffix.long()[None], pixel_values=next(pixels)[None]
                ).logits[0]
            expected.append(functional.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum"))
            documents += 1
    assert documents > len(batch.input_ids)
    loss = task.loss(batch)["loss"].total
    torch.testing.assert_close(loss, sum(expected), atol=1e-3, rtol=1e-5)  # a sum over 100 targets


def test_chats_are_refused(gemma: Theirs) -> None:
    _, processor = load_model(gemma.folder)
    answer = {"role": "assistant", "content": "red"}
    for chat in ([user(A, "a"), answer, user("b")], [{"role": "system", "content": "a"}, user("b")]):
        with pytest.raises(MMGPTError, match="one prompt and its answer"):
            processor.chat(chat)


def test_errors_name_what_does_not_fit(gemma: Theirs, tmp_path: Path) -> None:
    check_account(gemma.folder, tmp_path, "multi_modal_projector.linear.weight")
    config = gemma.folder / "config.json"
    values = json.loads(config.read_text())
    for change, said in (
        ({"image_token_index": 7}, "image_token_index 7 is not the tokenizer's <image>"),
        ({"text_config": values["text_config"] | {"model_type": "gema"}}, "'gema'.*gemma"),
        ({"vision_config": values["vision_config"] | {"image_size": 42}}, "images of 28 pixels .* tower of 42"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read(gemma.folder, values | change, Tokenizer.from_hf_folder(gemma.folder))
