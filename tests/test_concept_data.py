"""What teaches a model with concepts: true whatever a picture of the class shows, and what captions support."""

import random
import re
import sys
from pathlib import Path

import pytest
import torch

from mm_gpt.datasets.formats.captioned import read_records
from mm_gpt.datasets.samples import ErrorCounter, QuestionAnswer
from mm_gpt.document import Concepts
from mm_gpt.vision.imagenet import CLASSES

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/concept_data"))
pytest.importorskip("concept_words", reason="the examples are not installed")

from concept_photos import Seen, answer_pairs, caption_pairs
from concept_words import KindNames, with_article
from make_concept_data import class_record, simulated_scores, write_tar

KINDS = KindNames(CLASSES)
NEARNESS = torch.rand(1000, generator=torch.Generator().manual_seed(0))
DOG = ["A yellow dog runs .", "A dog runs on grass .", "A dog in a field ."]
MAN = ["A man throws a ball .", "A man plays .", "A man in a park ."]


def seen(**scores: float) -> Seen:
    """By class: n207 is golden retriever, n208 the Labrador, n281 a tabby cat, n852 a tennis ball, n849 a teapot."""
    probabilities = torch.full((1000,), 1e-5)
    for index, score in scores.items():
        probabilities[int(index[1:])] = score
    return Seen(probabilities)


def asked(captions: list[str], what: Seen, rolls: int = 40) -> dict[str, set[str]]:
    """Answers by question, of many draws."""
    found: dict[str, set[str]] = {}
    for seed in range(rolls):
        for pair in caption_pairs(captions, what, KINDS, random.Random(seed)):
            found.setdefault(re.sub("photo|image", "picture", pair["question"]), set()).add(pair["answer"])
    return found


def test_scores_are_probabilities_with_the_class_first() -> None:
    rng = random.Random(0)
    for target in range(0, 1000, 7):
        scores = simulated_scores(target, NEARNESS, rng)
        assert max(scores, key=lambda name: scores[name]) == CLASSES[target].plain
        assert all(0 < score <= 1 for score in scores.values())
        assert sum(scores.values()) <= 1.001


def test_every_class_is_named() -> None:
    """Stops: a class whose words are never an answer or in a caption."""
    for target, own in enumerate(CLASSES):
        record = class_record(target, NEARNESS, random.Random(target))
        pairs = {pair["question"]: pair["answer"] for pair in record["qa"]}
        assert pairs["What is the main thing in the picture?"] == own.plain
        assert own.plain in record["concepts"]
        assert all(own.plain.lower() in text.lower() or own.kind in text for text in record["captions"])
        answers = [pair["answer"] for pair in record["qa"]]
        assert answers.count("yes") == answers.count("no")
        for text in (*pairs, *record["captions"]):
            assert "{" not in text
            assert not re.search(r"\ba [aeio]\w*|\ban [bcdfgjklmnpqtvwxyz]", text, re.IGNORECASE), text


def test_no_is_not_said_of_what_it_may_be_called() -> None:
    """Stops: "Is this a cat?" no, of a tabby cat, and of what stands in one picture with it."""
    for target in range(0, 1000, 3):
        own = CLASSES[target]
        called = {name.lower() for name in (own.plain, own.kind, *own.names)}
        called |= {name.rpartition(" ")[2] for name in called}
        for seed in range(5):
            for pair in class_record(target, NEARNESS, random.Random(seed))["qa"]:
                if pair["answer"] == "no":
                    assert not {f"{a} {name}" for a in ("a", "an") for name in called} & {
                        pair["question"][8:-1].lower()
                    }


def test_a_class_is_named_where_captions_support_it() -> None:
    found = asked(DOG, seen(n207=0.7, n208=0.2))
    assert found["What is the main thing in the picture?"] == {"golden retriever"}
    assert found["What kind of dog is this?"] == {"golden retriever"}
    assert found["Is this a golden retriever?"] == {"yes"}
    assert found["Is this a Labrador retriever?"] == {"no"}


@pytest.mark.parametrize(
    ("captions", "scores", "main"),
    [
        (DOG, {"n207": 0.4}, "dog"),  # not sure enough
        (DOG, {"n281": 0.9}, "dog"),  # a cat to the trunk: captions are right
        (DOG, {"n852": 0.9}, "dog"),  # the ball that nobody mentions
        (MAN, {"n207": 0.9}, "man"),
        (["Two dogs run .", "Two dogs .", "Dogs run ."], {"n207": 0.9}, "dogs"),
        (["A red teapot .", "A teapot on a table .", "A teapot ."], {"n849": 0.8}, "teapot"),
    ],
)
def test_captions_are_the_truth(captions: list[str], scores: dict[str, float], main: str) -> None:
    found = asked(captions, seen(**scores))
    assert found.get("What is the main thing in the picture?") == {main}
    for question, answers in found.items():
        if "retriever" in question or "tabby" in question or "ball" in question:
            assert answers == {"no"}


def test_an_animal_that_only_the_trunk_sees_is_not_there() -> None:
    found = asked(MAN, seen(n207=0.5), rolls=200)
    assert found["Is there a dog in the picture?"] == found["Is there a golden retriever in the picture?"] == {"no"}
    assert found["Can you see a person?"] == {"yes"}
    assert asked(DOG, seen(n207=0.3))["Is there a person in the picture?"] == {"no"}


def test_a_photo_without_captions_is_asked_what_its_answers_know() -> None:
    answers = [QuestionAnswer("what is on the table?", "teapot, cup", ("teapot", "cup"))]
    pairs = list(answer_pairs(answers, seen(n849=0.8), random.Random(0)))
    assert {"question": "What is the main thing in the picture?", "answer": "teapot"} in pairs
    assert not list(answer_pairs(answers, seen(n207=0.8), random.Random(0)))


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        *(("owl", "an owl"), ("dog", "a dog"), ("unicycle", "a unicycle"), ("hourglass", "an hourglass")),
        *(("RV", "an RV"), ("jeans", "jeans"), ("broccoli", "broccoli"), ("Airedale", "an Airedale")),
    ],
)
def test_articles(name: str, phrase: str) -> None:
    assert with_article(name) == phrase


def test_kinds_that_are_absent() -> None:
    rng = random.Random(0)
    for _ in range(200):
        assert KINDS.absent("dog", ["cat"], True, rng) not in ("dog", "cat", "wolf", "fox")
        assert KINDS.absent("truck", [], False, rng) not in ("truck", "car", "van", "bus")
    assert not KINDS.are_apart("tabby cat", "cat")
    assert KINDS.are_apart("golden retriever", "Labrador retriever")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """The same bytes for the same seed, and records of concepts beside photos."""
    record = class_record(207, NEARNESS, random.Random(0))
    photo = {"qa": [{"question": "What?", "answer": "dog"}]}
    for name in ("a.tar", "b.tar"):
        counts = write_tar(tmp_path / name, [("one", record, None), ("two", photo, b"\xff\xd8 a photo")])
        assert counts["records"] == 2
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    errors = ErrorCounter()
    one, two = read_records(tmp_path / "a.tar", errors)
    assert errors.total == 0
    assert one.image == Concepts(record["concepts"])
    assert len(one.captions) == 2
    assert two.image == b"\xff\xd8 a photo"
    assert two.questions == (QuestionAnswer("What?", "dog", ("dog",)),)
