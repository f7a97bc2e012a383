"""Unsupported objects: what captions name, what other captions support, and scores that compare models with people."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_picture

from mm_gpt.eval.config import EvalConfig
from mm_gpt.eval.harness import evaluate
from mm_gpt.eval.objects import OBJECTS, Known, named_objects, object_scores
from mm_gpt.inference.assistant import Assistant


def _captions(captions: list[str]) -> bytes:
    return json.dumps({"captions": captions}).encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man and two dogs sit on a park bench.", ["man", "dogs", "bench"]),
        ("Two women in swimming pools, near a roller coaster", ["women", "swimming pools", "roller coaster"]),
        ("A surfer rides a wave.", ["surfer", "surfer", "wave"]),  # a person, and a surfboard
        ("He watches her.", []),
        ("A red shirt hangs on a wall under a tree.", []),  # nobody cares to name them
        ("An ice cream truck.", ["ice cream", "truck"]),
        ("", []),
    ],
)
def test_objects_that_a_text_names(text: str, words: list[str]) -> None:
    assert [named.words for named in named_objects(text)] == words
    assert all(name in OBJECTS for named in named_objects(text) for name in named.names)


@pytest.mark.parametrize("text", ["A horse statue.", "A toy cow.", "A boy dressed as a bear.", "A dog house."])
def test_what_only_looks_like_it_is_not_claimed(text: str) -> None:
    claimed = [named.words for named in named_objects(text) if named.is_real]
    assert set(claimed) <= {"statue", "boy"}


@pytest.mark.parametrize(
    ("known", "text", "unsupported"),
    [
        (["A puppy runs."], "A dog runs.", []),  # another word
        (["A dog runs."], "An animal runs.", []),  # a broader word
        (["An animal runs."], "A dog runs.", []),  # may be it
        (["A dog runs.", "An animal runs."], "A cat runs.", ["cat"]),  # the animal is the dog
        (["Someone skis."], "A woman on skis.", []),
        (["A man skis.", "Someone skis."], "A woman on skis.", ["woman"]),
        (["A man with other people."], "A woman.", []),  # may be among them
        (["A boy swims."], "A child swims.", []),
        (["A child swims."], "A girl swims.", []),
        (["A boy swims."], "A man swims.", []),  # people see age differently
        (["A boy swims."], "A woman swims.", ["woman"]),
        (["A man on a bike."], "A man on a motorcycle.", []),  # may be either
        (["A man on a bicycle."], "A man on a motorcycle.", ["motorcycle"]),
        (["A man surfs."], "A man on a surfboard in the ocean.", []),  # implied
        (["A dog jumps."], "A dog jumps for a frisbee.", ["frisbee"]),
        (["A dog in the snow."], "A dog on the beach with a boat.", ["beach", "boat"]),
        (["A dog."], "Two cats and a cat.", ["cats", "cat"]),
        (["A dog."], "A toy cat.", []),
    ],
)
def test_what_other_captions_support(known: list[str], text: str, unsupported: list[str]) -> None:
    assert Known(known).unsupported(text) == unsupported


def test_each_object_is_counted_once() -> None:
    assert Known(["A dog."]).counts("Two cats chase a cat and a dog.") == (2, 1)
    assert Known(["A dog."]).counts("It rains.") == (0, 0)


def test_common_objects_are_those_of_half_the_texts() -> None:
    known = Known(["A dog on a bench.", "A dog in the snow.", "A dog.", "Someone sits on a bench."])
    assert known.common() == {"dog", "bench"}


def test_scores_by_hand() -> None:
    known = [["A dog runs.", "A dog runs in the snow."]] * 3
    scores = object_scores(["A cat and a dog run.", "A dog runs.", "Rain."], known)
    assert scores["captions"].score == 1 / 3
    assert scores["objects"].score == 1 / 3  # cat, dog; dog
    assert scores["coverage"].score == 2 / 6  # the dog and the snow are common; two captions have the dog
    np.testing.assert_array_equal(scores["objects"].per_item, [0.5, 0, 0])


def test_the_task_scores_a_model_beside_people(
    tiny_assistant: Assistant, tiny_model_folder: Path, tmp_path: Path
) -> None:
    known = ["A dog runs.", "A dog runs in the snow.", "A cat runs."]
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for key, captions in (("a", known), ("b", known), ("c", known[:1])):
            picture = io.BytesIO()
            make_picture().save(picture, "PNG")
            for name, data in ((f"{key}.png", picture.getvalue()), (f"{key}.json", _captions(captions))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    config = EvalConfig(
        task="unsupported_objects",
        data=(str(tmp_path / "photos.tar"),),
        model=str(tiny_model_folder),
        num_beams=1,
        max_new_tokens=3,
    )
    results = evaluate(config, tmp_path / "results.json", assistant=tiny_assistant)
    assert results["counts"]["images"] == 2  # one caption can be held against no other
    json.loads(
        (tmp_path / "results.json").read_text(), parse_constant=pytest.fail
    )  # a model that names nothing: no NaN
    assert set(results["metrics"]) == {"captions", "objects", "coverage"}
    people = results["baselines"]["people"]["metrics"]
    assert people["captions"]["value"] == pytest.approx(2 / 3)  # the snow, and the cat
