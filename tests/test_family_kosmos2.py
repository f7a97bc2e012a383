"""KOSMOS-2 against transformers: logits, pixels, prompt ids, greedy answers; training; damaged folders."""

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
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from mm_gpt.document import Document, Image, interleave
from mm_gpt.errors import CheckpointError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.families.kosmos2 import read
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Processor
from mm_gpt.tokenizer import Tokenizer

QUERIES = 6
FIRST = 4
"""The id that their processor gives to an image's first token, the next ones to the others: ordinary words."""
A, B = make_picture(0, (40, 30)), make_picture(1, (31, 57))
GROUNDED = "<grounding> An image of<phrase> a ball</phrase><object><patch_index_0003><patch_index_0014></object> is"
CASES = [([], "What is red?"), ([A], "<grounding> An image of"), ([A, B], "a ball or a tree"), ([B], f"  {GROUNDED} ")]
CHATS = [[user(*images, prompt)] for images, prompt in CASES]


class Theirs(NamedTuple):
    folder: Path
    model: Any
    processor: Any

    def inputs(self, images: list[Any], prompt: str, **options: Any) -> dict[str, Tensor]:
        """What their processor makes of a prompt. It takes one image; further ones are put in behind the first."""
        given = self.processor(
            images=images[:1] or None, text=[prompt], num_image_tokens=QUERIES, return_tensors="pt", **options
        )
        inputs = {k: given[k] for k in ("input_ids", "image_embeds_position_mask", "pixel_values") if k in given}
        if len(images) > 1:
            inputs["pixel_values"] = self.processor.image_processor(images, return_tensors="pt").pixel_values
            for key in ("input_ids", "image_embeds_position_mask"):
                bos, image, rest = inputs[key][0].split([1, QUERIES + 2, inputs[key].shape[1] - QUERIES - 3])
                inputs[key] = torch.cat([bos, *[image] * len(images), rest])[None]
        return inputs

    @torch.inference_mode()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        model = self.model if "pixel_values" in inputs else self.model.text_model
        return model(**inputs).logits[0]


def make_tokenizer() -> Any:
    """XLM-R's: a Unigram vocabulary behind fairseq's four special tokens, and <mask> at its end."""
    from transformers import XLMRobertaTokenizer

    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    texts = ["An image of a ball.", "What is red? It is a tree.", "a picture of number 1, one more of it"]
    backend.train_from_iterator(texts * 3, trainer)
    pieces = [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"] if piece != "<unk>"]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*special, *pieces, ("<mask>", 0.0)])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    from transformers import CLIPImageProcessor, Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor

    images = CLIPImageProcessor(use_square_size=True)
    processor = Kosmos2Processor(images, make_tokenizer(), num_patch_index_tokens=16)
    config = Kosmos2Config(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "embed_dim": 32,
            "layers": 2,
            "ffn_dim": 48,
            "attention_heads": 4,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 224,
            "patch_size": 56,
        },
        latent_query_num=QUERIES,
    )
    torch.manual_seed(0)
    model = Kosmos2ForConditionalGeneration(config).eval()
    roughen(model)
    folder = tmp_path_factory.mktemp("kosmos2")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Theirs(folder, model, processor)


def check_logits(model: MMGPT, processor: Processor, theirs: Theirs) -> None:
    for ours, (images, prompt) in zip(logits_of(model, processor, CHATS), CASES, strict=True):
        expected = theirs.logits(theirs.inputs(images, prompt))
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **CLOSE)


def as_theirs(ids: Tensor, processor: Processor) -> list[int]:
    """Our ids with each image's places numbered as their processor does; <mask> stands there in ours."""
    numbers, count = ids.tolist(), 0
    for at, id in enumerate(numbers):
        if id == processor.tokenizer.special["<mask>"]:
            numbers[at] = FIRST + count % QUERIES
            count += 1
    return numbers


def test_same_logits_pixels_and_ids(theirs: Theirs) -> None:
    """Stops: positions that do not begin at 2, images that are not scaled as words are, a class token left out, tokens
    normalised before the norm or not at all, sub-norms in another place, an image's marks written as its tokens."""
    model, processor = load_model(theirs.folder)
    for example, (images, prompt) in zip(examples_of(processor, CHATS), CASES, strict=True):
        expected = theirs.inputs(images, prompt)
        assert as_theirs(example.input_ids, processor) == expected["input_ids"][0].tolist()
        if images:
            places = example.input_ids == processor.tokenizer.special["<mask>"]
            assert places.tolist() == expected["image_embeds_position_mask"][0].bool().tolist()
            assert torch.equal(processor.pixels([example]), expected["pixel_values"])
    plain = processor(Document(tuple(interleave([Image(A), "An image of"]))))  # what `complete` continues
    assert as_theirs(plain.input_ids, processor) == theirs.inputs([A], "An image of")["input_ids"][0].tolist()
    check_logits(model, processor, theirs)
    one, other = logits_of(model, processor, [[user(A, "a ball")], [user(B, "a ball")]])
    assert (one - other).abs().max() > 0.1  # the picture matters


def test_the_published_layout(theirs: Theirs, tmp_path: Path) -> None:
    """As microsoft/kosmos-2-patch14-224 is stored: shards here, few keys, and an image file in which `use_square_size`
    decides over `size`."""
    values = json.loads((theirs.folder / "config.json").read_text())
    text = {k: values["text_config"][k] for k in ("vocab_size", "embed_dim", "layers", "ffn_dim", "attention_heads")}
    vision = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    config = {
        "architectures": ["Kosmos2ForConditionalGeneration"],
        "model_type": "kosmos-2",
        "latent_query_num": QUERIES,
        "text_config": text | {"model_type": "kosmos_2_text_model", "dropout": 0.1, "torch_dtype": "float32"},
        "vision_config": {k: values["vision_config"][k] for k in vision} | {"model_type": "kosmos_2_vision_model"},
    }
    images = {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "CLIPImageProcessor",
        "resample": 3,
        "size": {"shortest_edge": 224},
        "use_square_size": True,
    }
    folder = as_published(theirs.folder, tmp_path / "published", config, {}, json.dumps(images))
    check_logits(*load_model(folder), theirs)


def test_the_same_answers(theirs: Theirs, tmp_path: Path) -> None:
    inputs = theirs.inputs([A], "<grounding> An image of")
    out = theirs.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    expected = out[inputs["input_ids"].shape[1] :].tolist()
    check_answers(theirs.folder, A, "<grounding> An image of", expected, tmp_path)


def test_training_ids_and_labels(theirs: Theirs) -> None:
    """The answer is learned with </s> behind it; the prompt is not, and a word never grows together with the next."""
    _, processor = load_model(theirs.folder)
    chat = [user(A, "An image of"), {"role": "assistant", "content": "a ball"}]
    example = processor(processor.chat(chat, answer_starts=False))
    prompt, whole = (
        theirs.inputs([A], text)["input_ids"][0].tolist() for text in ("An image of", "An image of a ball")
    )
    assert as_theirs(example.input_ids, processor) == [*whole, 2]
    learned = [IGNORE_INDEX] * (len(prompt) - 1) + [*whole[len(prompt) :], 2, IGNORE_INDEX]
    assert example.labels.tolist() == learned


@pytest.mark.parametrize("changes", [{}, {"decoder": "full", "vision_blocks": 1}], ids=["lora", "full"])
def test_finetuning(changes: dict[str, Any], theirs: Theirs, tmp_path: Path) -> None:
    check_finetuning(theirs.folder, tmp_path, CHATS, **changes)


def test_no_text_opens_a_place_for_an_image(theirs: Theirs) -> None:
    """Someone's <mask> is text: as the special token it would stand for a token of an image that is not there."""
    _, processor = load_model(theirs.folder)
    (example,) = examples_of(processor, [[user(A, "a <mask> ball")]])
    assert (example.input_ids == processor.tokenizer.special["<mask>"]).sum() == QUERIES


def test_errors_name_what_does_not_fit(theirs: Theirs, tmp_path: Path) -> None:
    check_account(theirs.folder, tmp_path, "image_to_text_projection.latent_query")
    values = json.loads((theirs.folder / "config.json").read_text())
    for change, said in (
        ({"text_config": values["text_config"] | {"activation_function": "gellu"}}, "'gellu'.*gelu"),
        ({"text_config": values["text_config"] | {"add_cross_attention": True}}, "add_cross_attention"),
        ({"vision_config": values["vision_config"] | {"image_size": 112}}, "images of 224 pixels .* tower of 112"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read(theirs.folder, values | change, Tokenizer.from_hf_folder(theirs.folder))
