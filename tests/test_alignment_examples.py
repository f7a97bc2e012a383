"""The experiments of alignment: the truth about scenes, raters, statistics, and that each command runs."""

import itertools
import json
import math
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from mm_gpt.eval.metrics.calibration import calibration_bins, expected_calibration_error

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/alignment"))
pytest.importorskip("scenes", reason="the examples are not installed")
import scenes
import world
from scenes import Scene, Thing, draw_scene, ranking, read_answer, reference, web_caption, worth

TWO = Scene((Thing("red", "circle", "top left"), Thing("blue", "square", "bottom right")))


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("A red circle and a blue square.", 1.0),
        ("A blue square and a red circle.", 1.0),
        ("A red circle.", 0.5),
        ("A red circle and a green square.", 0.0),
        ("A red circle, a blue square and a green triangle.", 0.5),
        ("A lovely red circle and a blue square.", 0.95),
        ("A red circle, a red circle and a blue square.", 0.5),  # named again: not there
        ("A circle and a square.", 0.0),  # without colours nothing is said
        ("a red circle and a blue square", 0.75),
        ("", -0.25),
        ("A red circle and a blue square. A red circle and a blue square.", -0.25),
        ("Lovely lovely lovely lovely.", -0.2),
        ("red circle red circle red circle red circle red circle red circle", -1.0),
    ],
)
def test_what_an_answer_is_worth(answer: str, value: float) -> None:
    assert worth(answer, TWO) == pytest.approx(value)


def test_every_reference_is_worth_one_and_nothing_is_worth_more() -> None:
    rng = random.Random(0)
    for number in range(200):
        scene = draw_scene(rng, held_out=number % 2 == 0)
        assert worth(reference(scene), scene) == 1.0
        assert -1 <= worth(web_caption(scene, rng), scene) <= 1


def test_captions_of_the_wild_are_often_wrong_and_demonstrations_are_not() -> None:
    rng = random.Random(1)
    drawn = [draw_scene(rng, held_out=False) for _ in range(400)]
    wild = statistics.mean(worth(web_caption(scene, rng), scene) for scene in drawn)
    shown = statistics.mean(worth(scenes.demonstration(scene, rng), scene) for scene in drawn)
    assert wild < 0.8 < 0.9 < shown < 1


def test_held_out_combinations_are_never_shown() -> None:
    rng = random.Random(2)
    seen = {draw_scene(rng, held_out=False).kinds for _ in range(500)}
    held = {draw_scene(rng, held_out=True).kinds for _ in range(500)}
    assert not seen & held
    assert {kind for kinds in held for kind in kinds} == set(scenes.KINDS)  # each thing alone is known


def test_a_picture_shows_its_things_where_they_are() -> None:
    pixels = np.asarray(TWO.draw())
    half = scenes.SIZE // 2
    assert tuple(pixels[half // 2, half // 2]) == scenes.COLOURS["red"]
    assert tuple(pixels[half + half // 2, half + half // 2]) == scenes.COLOURS["blue"]
    assert (pixels[:half, half:] == 255).all()


def test_raters_waver_and_like_flattery() -> None:
    rng = random.Random(3)
    good, bad, flattering = reference(TWO), "A green circle.", "A lovely red circle and a wonderful blue square."
    clear = statistics.mean(ranking([good, bad], TWO, rng) == [0, 1] for _ in range(2000))
    assert clear > 0.99
    # By what is worth more the plain one would win; the difference of ratings is 2 (0.15 - 0.05), the noise 0.2.
    flattered = statistics.mean(ranking([flattering, good], TWO, rng) == [0, 1] for _ in range(2000))
    assert flattered == pytest.approx(1 / (1 + math.exp(-0.2 / 0.2)), abs=0.03)
    assert worth(flattering, TWO) < worth(good, TWO)
    ranks = [ranking([bad, good, flattering], TWO, rng) for _ in range(300)]
    assert all(sorted(own) == [0, 1, 2] for own in ranks)
    assert statistics.mean(own[0] for own in ranks) > 1.8


def test_rewards_read_chats_and_columns() -> None:
    chat = [[{"role": "assistant", "content": [{"type": "text", "text": reference(TWO)}]}]]
    things = [TWO.row()["things"]]
    assert scenes.true_reward(chat, things=things, prompts=None) == [1.0]
    assert scenes.true_reward(["A red circle."], things=things) == [0.5]
    other = [[["green", "triangle", "top left"]]]
    assert scenes.shuffled_reward(chat, other_things=other, things=things) == [-1.0]


def test_questions_are_answered_rightly_and_evenly() -> None:
    rng = random.Random(4)
    asked = scenes.presence_questions(TWO, rng, 40)
    for question, answer in asked:
        said = read_answer(question.removeprefix("Is there ").replace("?", "."), TWO)
        assert (said.right, said.unsupported) == ((1, 0) if answer == "Yes." else (0, 1))
    assert sum(answer == "Yes." for _, answer in asked) == 20
    assert ("What is at the top left?", "A red circle.") in scenes.place_questions(TWO)
    assert ("What is at the top right?", "Nothing.") in scenes.place_questions(TWO)


# ---- Statistics ----


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    rng = np.random.default_rng(0)
    scores, values = rng.random((2, 5)), rng.random((2, 5))
    for row in range(2):
        draws = [max(draw, key=lambda at: scores[row, at]) for draw in itertools.combinations(range(5), n)]
        expected = statistics.mean(values[row, at] for at in draws)
        assert world.best_of(scores, values, n)[row] == pytest.approx(expected)


def test_the_line_of_best_of_n() -> None:
    assert [round(world.best_of_kl(n), 6) for n in (1, 4, 16, 64)] == [0, 0.636294, 1.835089, 3.174508]


def test_an_interval_knows_how_much_seeds_differ() -> None:
    prompts = np.random.default_rng(0).normal(0, 1, 200)
    same = world.interval([prompts, prompts, prompts])
    other = world.interval([prompts, prompts + 1, prompts - 1])
    width = lambda found: found["ci95"][1] - found["ci95"][0]  # noqa: E731
    assert 0.2 < width(same) < 0.35  # 2 · 1.96 / √200
    assert width(other) > 3 * width(same)
    assert "no effect shown" in world.verdict(other, "x")
    assert "no effect" not in world.verdict({"mean": 1, "ci95": [0.5, 1.5]}, "x")


def test_calibration_error_of_draws_that_are_calibrated_and_of_some_that_are_not() -> None:
    rng = np.random.default_rng(0)
    sure = rng.random(200_000)
    right = rng.random(200_000) < sure
    assert expected_calibration_error(sure, right) < 0.004
    assert expected_calibration_error(sure**0.5, right) == pytest.approx(0.168, abs=0.003)


def test_bins_of_calibration_are_fixed() -> None:
    assert calibration_bins([0.95, 1.0, 0.05], [True, False, False]) == [
        (pytest.approx(0.05), 0.0, 1),
        (pytest.approx(0.975), 0.5, 2),
    ]
    assert expected_calibration_error([1.0, 1.0], [True, True]) == 0
    for confidences, right in (([], []), ([0.5], [True, False]), ([1.5], [True]), ([math.nan], [True])):
        with pytest.raises(ValueError, match=r"calibration|confidence"):
            expected_calibration_error(confidences, right)


# ---- The commands, in a few steps ----


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.build_world(folder, world.QUICK)
    return folder


def run(module: str, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    plot = out.with_suffix(".png")
    own = ["--quick", "--seeds", "1", "-o", str(out), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", [module, str(folder), *own])
    __import__(module).main()
    assert plot.stat().st_size > 10_000
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_finished_part_is_not_made_again(small_world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_world.rglob("*.safetensors")}
    world.build_world(small_world, world.QUICK)
    assert before == {path: path.stat().st_mtime_ns for path in small_world.rglob("*.safetensors")}
    (small_world / "reward/done").unlink()
    world.build_world(small_world, world.QUICK)  # all of its steps are done: it is only seen to be
    assert (small_world / "reward/done").exists()


@pytest.mark.slow
def test_comparison_of_methods(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("compare", small_world, tmp_path / "compare.json", monkeypatch)
    ways = result["ways"]
    assert set(ways) >= {"base", "sft", "dpo", "grpo", "ppo", "ppo_ptx", "grpo_truth", "grpo_shuffled", "best_of_4"}
    assert ways["sft"]["change"]["truth"]["mean"] == 0
    assert ways["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert ways["best_of_4"]["proxy"]["mean"] >= ways["best_of_1"]["proxy"]["mean"]


@pytest.mark.slow
def test_over_optimisation(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("over_optimisation", small_world, tmp_path / "over.json", monkeypatch)
    assert set(result["paths"]) == {"0.0", "0.02", "0.1", "0.5"}
    assert all(len(path["kl"]) == 2 for path in result["paths"].values())
    assert result["best_of_n"][0]["kl"] == 0


@pytest.mark.slow
def test_calibration_before_and_after(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("calibration", small_world, tmp_path / "calibration.json", monkeypatch)
    assert set(result["ways"]) == {"base", "sft", "ppo", "ppo, beta 0"}
    assert result["ways"]["sft"]["change"]["mean"] == 0
    assert all(0 <= way["ece"]["mean"] <= 1 for way in result["ways"].values())
