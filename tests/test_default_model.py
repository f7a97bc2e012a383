"""What the packaged model says where people meet it first: the demo's cards, and the examples of README.md and docs/.

Another model is held to the same by `DEFAULT_MODEL=runs/default_concepts/best pytest -n 0 tests/test_default_model.py`.
"""

import json
import os
import re
from pathlib import Path

import pytest

import mm_gpt
from mm_gpt.document import Image, Message
from mm_gpt.errors import DownloadError
from mm_gpt.hub.checkpoint import model_folder, read_configs
from mm_gpt.hub.fetching import download
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.constraints import Constraint
from mm_gpt.inference.hints import beyond, known_words
from mm_gpt.serving.gradio_demo import EXAMPLES, SAMPLES
from mm_gpt.training.recipes import imagenet_concepts

MODEL = os.environ.get("DEFAULT_MODEL", "default")
ROOT = Path(__file__).resolve().parent.parent

CAT = r"(a |tabby )*(cat|kitten)"
CUP = r"(a )?(cup|mug|coffee|espresso|coffee cup|coffee mug|cup of coffee|cup of espresso)"
RIGHT = {
    ("cat.jpg", "What animal is in the picture?"): CAT,
    ("cat.jpg", "What animal is it?"): CAT,
    ("cat.jpg", "What is it?"): CAT,
    ("cat.jpg", "What is the main thing in the picture?"): CAT,
    ("cat.jpg", "What colour is the cat?"): "brown|orange|ginger|tan",
    ("cat.jpg", "Is there a dog in the picture?"): "no",
    ("coffee.jpg", "What is this?"): CUP,
    ("coffee.jpg", "What is the main thing in the picture?"): CUP,
    ("astronaut.jpg", "Is there a person in the picture?"): "yes",
    ("rocket.jpg", "Is this indoors or outdoors?"): "outdoors",
}
"""All that pages ask about the samples, and what of a short answer is right to whoever looks at them."""
CAPTIONS = {"cat.jpg": r"\b(cat|kitten)\b", "coffee.jpg": r"\b(cup|mug|coffee|espresso)\b"}
ELSEWHERE = {
    "What is a cat?", "What is a prism?", "What is the capital of France?",  # about no picture
    "What is red?",  # a model trained on shapes
    "What is the dog doing?",  # a photo of the reader's own
}  # fmt: skip
"""Questions on pages that are not about the samples, or not for this model."""
TESTED_BELOW = {"Is there a cat in one of the pictures?", "What colour is it?", "Cat or dog?"}


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    try:
        download.fetch("smollm2-135m-instruct")
    except DownloadError as error:
        pytest.skip(f"the default model's decoder is out of reach: {error}")
    return mm_gpt.load(MODEL, device="cpu")


def is_right(answer: object, wanted: str) -> bool:
    return re.fullmatch(rf"(?:{wanted})\.?", str(answer).strip(), re.I) is not None


@pytest.mark.parametrize(("name", "question"), RIGHT, ids=lambda value: value)
def test_examples_are_answered_right(name: str, question: str, assistant: Assistant) -> None:
    answer = assistant.ask(SAMPLES / name, question)
    assert is_right(answer, RIGHT[name, question]), answer


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_name_what_it_shows(name: str, assistant: Assistant) -> None:
    caption = assistant.caption(SAMPLES / name)
    assert re.search(CAPTIONS[name], str(caption), re.I), caption
    assert not re.search(r"\bdogs?\b", str(caption), re.I), caption


def test_pages_ask_what_is_tested_here() -> None:
    """Stops: a new example that nobody has looked at."""
    pages = [ROOT / "README.md", ROOT / ".ci/run", ROOT / "docs/make_screenshot.py", *(ROOT / "docs").glob("*.md")]
    asked = {question for page in pages for question in re.findall(r'"([^"\n]*\?)"', page.read_text(encoding="utf-8"))}
    known = {question for _, question in RIGHT}
    assert asked - known - ELSEWHERE - TESTED_BELOW == set()
    assert {(name, question) for name, question in EXAMPLES.items()} <= set(RIGHT)


def test_two_pictures_and_an_example(assistant: Assistant) -> None:
    """docs/api.md."""
    cat, coffee = SAMPLES / "cat.jpg", SAMPLES / "coffee.jpg"
    answer = assistant.ask(cat, "What is this?", examples=[(coffee, "What is this?", "A cup of coffee.")])
    assert re.search(r"\b(cat|kitten)\b", str(answer), re.I), answer
    assert is_right(assistant.ask([cat, coffee], "Is there a cat in one of the pictures?"), "yes")


def test_a_talk_about_a_picture(assistant: Assistant) -> None:
    talk = assistant.conversation()
    assert is_right(talk.say([Image(SAMPLES / "cat.jpg"), "What is it?"]), CAT)
    assert is_right(talk.say("What colour is it?"), RIGHT["cat.jpg", "What colour is the cat?"])
    message: Message = {"role": "user", "content": [Image(SAMPLES / "coffee.jpg"), "What is this?"]}
    assert is_right(assistant.chat([message]), CUP)


def test_forms_hold_the_right_answer(assistant: Assistant) -> None:
    """README.md, docs/structured_output.md and docs/server.md."""
    cat = SAMPLES / "cat.jpg"
    colours = Constraint(choices=("red", "brown", "green"))
    assert str(assistant.ask(cat, "What colour is the cat?", constraint=colours)) == "brown"
    assert str(assistant.ask(cat, "Cat or dog?", constraint=Constraint(choices=("a cat", "a dog")))) == "a cat"
    animals = Constraint(choices=("cat", "dog", "neither"))
    assert str(assistant.ask(cat, "What animal is it?", constraint=animals)) == "cat"
    schema = {
        "type": "object",
        "properties": {"animal": {"type": "string", "maxLength": 20}},
        "required": ["animal"],
        "additionalProperties": False,
    }
    said = json.loads(str(assistant.ask(cat, "Describe the animal.", constraint=Constraint(json_schema=schema))))
    assert "cat" in said["animal"].lower(), said


def test_what_a_picture_shows_is_likelier_than_what_it_does_not(assistant: Assistant) -> None:
    shown = [Image(SAMPLES / "cat.jpg"), "A photo of"]
    assert assistant.logprob(shown, " a cat") > assistant.logprob(shown, " a dog")


def test_no_hint_about_the_examples() -> None:
    words = known_words(model_folder("default"))
    assert {question: beyond(question, 1, words) for _, question in RIGHT if beyond(question, 1, words)} == {}


def test_the_package_stays_small_and_its_concepts_are_those_of_the_table() -> None:
    folder = model_folder(MODEL)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 36_000_000  # the whole package: under 40 MB
    vision = read_configs(folder)[0].vision
    assert vision is not None
    assert vision.concepts == imagenet_concepts()
