"""The Python API."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_picture, make_tiny

import mm_gpt
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, ContextOverflowError, ImageError, MMGPTError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.inference.assistant import Assistant, generation_config
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.model.lora import LoRAConfig as Config
from mm_gpt.model.lora import LoRALinear, add_lora
from mm_gpt.model.mmgpt import MMGPT, pick_device
from mm_gpt.processor import Processor
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.vision.encoder import VisionConfig


@pytest.fixture(scope="module")
def model() -> Assistant:
    return Assistant(*make_tiny())


def test_load_and_ask(tiny_model_folder: Path, picture_file: Path) -> None:
    model = mm_gpt.load(tiny_model_folder, device="cpu")
    answer = model.ask(picture_file, "What is this?", max_new_tokens=5)
    assert isinstance(answer, str)
    assert answer.image_tokens == model.model.tokens_per_image + 2
    assert answer == model.ask(str(picture_file), "What is this?", max_new_tokens=5)


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(MMGPTError, match="'defualt'"):
        mm_gpt.load("defualt")
    with pytest.raises(MMGPTError, match=r"config\.json: no such file"):
        mm_gpt.load(tmp_path)


def test_every_form_of_an_image_is_the_same_image(model: Assistant, picture_file: Path) -> None:
    forms = [
        picture_file,
        str(picture_file),
        picture_file.read_bytes(),
        make_picture(),
        np.asarray(make_picture()),
        Image(picture_file),
        [picture_file],
    ]
    answers = {model.ask(form, "What?", max_new_tokens=6) for form in forms}
    assert len(answers) == 1


def test_questions_about_none_one_and_several_images(model: Assistant) -> None:
    k = model.model.tokens_per_image + 2
    images = [make_picture(1), make_picture(2), make_picture(3)]
    assert model.ask(None, "Hi", max_new_tokens=1).image_tokens == 0
    assert model.ask(images, "Which?", max_new_tokens=1).image_tokens == 3 * k
    shown = model.ask(
        images[0], "What?", examples=[(images[1], "What?", "a dog"), (images[2], "What?", "a cat")], max_new_tokens=1
    )
    assert shown.image_tokens == 3 * k


def test_ask_is_chat(model: Assistant) -> None:
    picture = make_picture(1)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]},
    ]
    asked = model.ask(picture, "What?", max_new_tokens=6)
    assert asked == model.chat(messages, max_new_tokens=6)
    assert asked == "".join(model.chat(messages, max_new_tokens=6, stream=True)).strip()


def test_calls_do_not_depend_on_each_other(model: Assistant) -> None:
    first = model.ask(make_picture(1), "What?", max_new_tokens=6)
    model.ask(make_picture(2), "Something else?", max_new_tokens=6, temperature=1.0)
    assert model.ask(make_picture(1), "What?", max_new_tokens=6) == first


def test_captions_in_any_batch_size(model: Assistant) -> None:
    """Order, and no image left out at the end of the last batch."""
    pictures = [make_picture(n) for n in range(5)]
    expected = [model.caption(p, max_new_tokens=5, num_beams=1) for p in pictures]
    assert all(isinstance(answer, Answer) for answer in expected)
    for batch_size in (1, 2, 5, 8):
        assert model.caption(pictures, batch_size=batch_size, max_new_tokens=5, num_beams=1) == expected
    assert model.caption((p for p in pictures), max_new_tokens=5, num_beams=1) == expected
    assert model.caption([], max_new_tokens=5) == []
    with pytest.raises(ConfigError, match="batch_size"):
        model.caption(pictures, batch_size=0)


def test_captions_use_beams_unless_told_otherwise(model: Assistant) -> None:
    picture = make_picture(1)
    assert model.caption(picture, max_new_tokens=5) == model.caption(picture, max_new_tokens=5, num_beams=3)
    sampled = model.caption(picture, max_new_tokens=5, temperature=1.0, seed=1)
    assert sampled == model.caption(picture, max_new_tokens=5, temperature=1.0, seed=1, num_beams=1)


def test_complete_has_no_template(model: Assistant) -> None:
    parts = ["A red ", make_picture(1), " circle"]
    answer = model.complete(parts, max_new_tokens=4)
    assert answer.prompt_tokens == len(
        model.processor(Document((Text("A red "), Image(make_picture(1)), Text(" circle"))))
    )


def test_log_probabilities(model: Assistant) -> None:
    """The same numbers that generation reports, and a sum over the continuation only."""
    prompt = [make_picture(1), "A red circle"]
    answer = model.complete(prompt, max_new_tokens=4, logprobs=True)
    assert answer.logprobs is not None
    tokenizer = model.processor.tokenizer
    text = "".join(tokenizer.decode([token.id]) for token in answer.logprobs)
    ids = [token.id for token in answer.logprobs]
    if tokenizer.encode("A red circle" + text) == [*tokenizer.encode("A red circle"), *ids]:
        expected = [token.logprob for token in answer.logprobs]
        assert model.token_logprobs(prompt, text).tolist() == pytest.approx(expected, abs=1e-4)
    total = model.logprob(prompt, " on blue ground")
    assert total == pytest.approx(float(model.token_logprobs(prompt, " on blue ground").sum()))
    assert total < 0


@pytest.mark.parametrize(("prompt", "continuation"), [("", "a"), ("A red", ""), ("A re", "d")])
def test_a_continuation_without_a_token_of_its_own(model: Assistant, prompt: str, continuation: str) -> None:
    """Its sum would be 0: certain, and better than every real answer."""
    with pytest.raises(MMGPTError, match="no token of its own"):
        model.logprob(prompt, continuation)


def test_what_is_wrong_is_named(model: Assistant, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'temprature'; did you mean 'temperature'\?"):
        model.ask(None, "Hi", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"max_new_tokens: expected int, got '5'"):
        model.ask(None, "Hi", max_new_tokens="5")  # type: ignore[typeddict-item]
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        model.ask(tmp_path / "gone.jpg", "Hi")
    with pytest.raises(MMGPTError, match="at least one message"):
        model.chat([])
    with pytest.raises(ContextOverflowError, match="the context holds 256"):
        model.ask(None, "word " * 300)


def test_stop_may_be_one_text() -> None:
    assert generation_config({"stop": "\n"}).stop == ("\n",)  # type: ignore[typeddict-item]
    assert generation_config({"stop": ("a", "b")}).stop == ("a", "b")
    assert generation_config({}).max_new_tokens == 128


def test_preparing_for_speed_changes_no_number() -> None:
    """Merged updates and transposed storage give the logits of the model as it was trained."""
    trained, processor = make_tiny()
    torch.manual_seed(1)
    add_lora(trained.decoder.blocks, Config(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.05)
    x = torch.randn(1, 7, 48)
    positions = torch.arange(7)[None]
    with torch.no_grad():
        before = trained.decoder(x, positions)
        model = Assistant(trained, processor)
        after = model.model.decoder(x, positions)
    assert not any(isinstance(m, LoRALinear) for m in model.model.modules())
    assert not any(p.requires_grad for p in model.model.parameters())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_an_assistant_folds_batch_norm_and_can_be_saved(tmp_path: Path) -> None:
    """A quarter of an image's time; what is saved is the model as it was trained."""
    tiny, processor = make_tiny()
    config = dataclasses.replace(tiny.config, vision=VisionConfig(model="timm/tf_efficientnet_lite0", image_size=32))
    torch.manual_seed(0)
    model = MMGPT(config).eval()
    assert model.vision is not None
    for norm in model.vision.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    pixels = torch.randn(2, 3, 32, 32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model.vision(pixels)
        assistant = Assistant(model, processor)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(assistant.model.vision(pixels), before, rtol=1e-3, atol=1e-4)
    image = dataclasses.replace(processor.config, tokens_per_image=model.tokens_per_image)
    save_model(model, Processor(processor.tokenizer, image, vocab_size=processor.vocab_size), tmp_path)
    again, _ = load_model(tmp_path)
    for name, tensor in again.state_dict().items():
        whole = tensor.dim() < 2 or not tensor.is_floating_point()
        assert torch.equal(tensor, state[name] if whole else state[name].half().float()), name


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "mps:0"])
def test_devices_that_are_not_supported(name: str) -> None:
    """Stops: a device that is accepted, and a model that stays on the CPU all the same."""
    with pytest.raises(ConfigError, match=rf"device '{name}' is not supported; use auto, cpu or cuda"):
        pick_device(name)


def test_a_model_is_moved_to_its_device() -> None:
    model, processor = make_tiny()
    assistant = Assistant(model, processor, device=torch.device("meta"))  # stands for all that is no CPU
    assert {p.device.type for p in assistant.model.parameters()} == {"meta"}


def test_a_space_before_the_continuation_belongs_to_it(tiny_assistant: Assistant) -> None:
    """ "Answer: " + "red" and "Answer:" + " red" are the same text, so they have the same probability."""
    spaced = tiny_assistant.logprob(["A blue ground. Answer: "], "red circle")
    assert spaced == tiny_assistant.logprob(["A blue ground. Answer:"], " red circle")


# ---- how answers are generated ----


def public_form() -> Assistant:
    """A model whose images stand in the prompt by a token of the vocabulary, as in published checkpoints."""
    model, processor = make_tiny()
    token = next(iter(processor.tokenizer.special))
    config = dataclasses.replace(processor.config, image_text=ImageTextConfig(token=token))
    return Assistant(model, Processor(processor.tokenizer, config, vocab_size=processor.vocab_size))


def test_models_that_are_not_ours_may_repeat_themselves(model: Assistant) -> None:
    """JSON and tables repeat runs of tokens, and transformers lets published models write them."""
    public = public_form()
    assert (public.is_public, model.is_public) == (True, False)
    assert public.caption_config().no_repeat_ngram_size == public.chat_config().no_repeat_ngram_size == 0
    assert (model.caption_config().no_repeat_ngram_size, model.chat_config().no_repeat_ngram_size) == (3, 8)
    for assistant in (public, model):
        assert assistant.chat_config({"no_repeat_ngram_size": 5}).no_repeat_ngram_size == 5
        assert assistant.caption_config({"no_repeat_ngram_size": 0}).no_repeat_ngram_size == 0


def test_an_answer_says_how_it_was_generated(model: Assistant) -> None:
    assert model.ask(None, "Hi", max_new_tokens=2).generation == model.chat_config({"max_new_tokens": 2})
    assert model.caption(make_picture()).generation == model.caption_config()
    assert model.complete("Hi", max_new_tokens=2).generation == GenerationConfig(max_new_tokens=2)
    stream = model.chat([{"role": "user", "content": "Hi"}], stream=True, max_new_tokens=2)
    assert "".join(stream).strip() == stream.answer
    assert stream.answer.generation == model.chat_config({"max_new_tokens": 2})
    talk = model.conversation(max_new_tokens=2)
    assert talk.say("Hi").generation == model.chat_config({"max_new_tokens": 2})


@pytest.mark.parametrize(
    "call",
    [
        lambda model, text: model.ask(None, text),
        lambda model, text: model.ask(make_picture(), "What?", examples=[(make_picture(), "What?", text)]),
        lambda model, text: model.caption(make_picture(), prompt=text),
        lambda model, text: model.chat([{"role": "system", "content": text}, {"role": "user", "content": "Hi"}]),
        lambda model, text: model.chat([{"role": "user", "content": [{"type": "text", "text": text}]}], stream=True),
        lambda model, text: model.conversation().say(text),
        lambda model, text: model.complete(["A photo ", text]),
        lambda model, text: model.logprob(text, " a cat"),
        lambda model, text: model.logprob("A photo of", text),
        lambda model, text: model.ask(None, "Hi", stop=(text,)),
    ],
    ids=[
        "ask",
        "examples",
        "caption",
        "system",
        "stream",
        "conversation",
        "complete",
        "prompt",
        "continuation",
        "stop",
    ],
)
def test_half_a_character_is_refused_at_every_door(call: Any, model: Assistant) -> None:
    """A lone surrogate is no UTF-8 text: the tokenizer would raise an error that names nothing."""
    with pytest.raises(MMGPTError, match=r"half a character \(.*a lone surrogate\)"):
        call(model, "a \ud83e duck")
