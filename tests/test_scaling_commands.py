"""`mm-gpt scaling` from the plan of a ladder to the verdict on its prediction."""

import json
from pathlib import Path

import pytest
from ladder_data import RULES, fake_run, fake_rungs, law, text_recipe, write_texts

from mm_gpt.commands.cli import main
from mm_gpt.commands.command import EXIT_ERROR, EXIT_SOME_FAILED
from mm_gpt.config import to_dict
from mm_gpt.scaling.ladder import LadderPlan

OPTIONS = [f"--{name.replace('_', '-')}={value:g}" for name, value in RULES.items()]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_texts(tmp_path / "texts")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(to_dict(text_recipe(tmp_path / "texts"))))
    return path


def scaling(*arguments: object) -> int:
    return main(["scaling", *map(str, arguments)])


def test_from_a_plan_to_its_verdict(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check 10, small: five sizes are trained, the sixth is predicted before it runs, error and interval printed."""
    plan = tmp_path / "ladder/plan.json"
    made = ["--widths", "4,6,8,12,16", "--target", "24", "--out", plan, *OPTIONS]
    assert scaling("plan", recipe, *made, "train.weight_decay=0.01") == 0
    assert "w24" in capsys.readouterr().out
    assert LadderPlan.load(plan).recipe["train"]["weight_decay"] == 0.01
    assert all(run.seconds for run in LadderPlan.load(plan).runs)
    assert scaling("run", plan) == 0
    assert scaling("fit", plan, "--plot", tmp_path / "law.png") == 0
    printed = capsys.readouterr().out
    assert "L(C) = a C^b + c of 5 runs" in printed
    assert "largest rung held out" in printed
    assert scaling("predict", plan, "-o", tmp_path / "filed.json") == 0
    assert "largest rung held out" in capsys.readouterr().out
    assert scaling("run", plan, "--target") == 0
    assert scaling("predict", plan) == EXIT_ERROR
    assert "has begun" in capsys.readouterr().err
    assert scaling("verdict", plan, tmp_path / "filed.json", "--plot", tmp_path / "verdict.png") == 0
    printed = capsys.readouterr().out
    assert "measured" in printed
    assert "the interval" in printed
    for name in ("law.png", "verdict.png"):
        assert 1000 < (tmp_path / name).stat().st_size < 40_000


def test_mistakes_are_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    wrong = [
        (["run", plan], f"{plan}: no such plan"),
        (["plan", tmp_path / "other.json", "--widths", "8", "-o", plan], "other.json: no such file"),
        (["plan", "classify", "--widths", "8", "-o", plan, "--data", tmp_path], "a recipe of the language stage"),
        (["plan", recipe, "--widths", "16,8,8", "-o", plan], "widths must be different numbers"),
        (["plan", recipe, "--widths", "8", "--target", "8", "-o", plan], "must be wider than the widest rung"),
        (["plan", recipe, "row_lenght=8", "--widths", "8", "-o", plan], "did you mean 'row_length'"),
    ]
    for arguments, message in wrong:
        assert scaling(*arguments) == EXIT_ERROR
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1], arguments
        assert len(lines) == 1


def test_wrong_numbers_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling("plan", "tiny", "--widths", "a,b", "-o", "plan.json")
    assert "'a,b' is no list of numbers" in capsys.readouterr().err


def test_rungs_that_fail_are_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are trained all the same; the exit code says that some failed, and the fit names what is missing."""
    plan = tmp_path / "plan.json"
    assert scaling("plan", recipe, "--widths", "4,8", "-o", plan, "--untimed", *OPTIONS, "--lr", "1e30") == 0
    assert scaling("run", plan, "--only", "w4") == EXIT_SOME_FAILED
    assert "1 of 1 runs failed: w4" in capsys.readouterr().err
    assert scaling("fit", plan) == EXIT_ERROR
    assert "w4: not finished" in capsys.readouterr().err


def test_what_is_not_registered_is_said(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check 9, at the command line."""
    path = tmp_path / "plan.json"
    assert scaling("plan", recipe, "--widths", "4,8,12,16,24", "--target", "32", "-o", path, "--untimed", *OPTIONS) == 0
    plan = LadderPlan.load(path)
    fake_rungs(tmp_path, plan)
    assert scaling("predict", path) == 0
    filed = tmp_path / "prediction-w32.json"
    fake_run(tmp_path, plan, plan.run("w32"), law(plan.run("w32")))
    assert scaling("verdict", path, filed) == 0
    assert "error -0.00%" in capsys.readouterr().out.replace("+0.00%", "-0.00%")
    assert scaling("plan", recipe, "--widths", "4,8", "-o", path, "--untimed", *OPTIONS) == EXIT_ERROR
    assert "w4 has begun by it: choose another folder" in capsys.readouterr().err
    assert scaling("run", path, "--only", "") == EXIT_ERROR
    assert "the plan has no run ''" in capsys.readouterr().err
    log = tmp_path / "w8/log.jsonl"
    log.write_text(log.read_text().replace("1", "2", 1))
    assert scaling("verdict", path, filed) == EXIT_ERROR
    assert "not registered" in capsys.readouterr().err
