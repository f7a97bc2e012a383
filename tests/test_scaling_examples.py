"""The experiment of docs/scaling.md, in small: its data, its recipe, a rung, and the questions it is asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mm_gpt.commands.cli import main
from mm_gpt.commands.command import EXIT_ERROR

FOLDER = Path(__file__).resolve().parents[1] / "examples/scaling"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_from_pictures_to_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run("picture_pages.py", tmp_path / "pages", "--pages", 300, "--held-out", 12, "--questions", 8)
    assert made.returncode == 0, made.stderr
    questions = [json.loads(row) for row in (tmp_path / "pages/questions.jsonl").read_text().splitlines()]
    assert len(questions) == 8
    texts = tmp_path / "manuals"
    texts.mkdir()
    for name, count in (("train.jsonl", 600), ("held_out.jsonl", 20)):
        rows = [
            {"text": f"Layer {n} is number {n * 7} of the image, beside brush {n % 13} and mask {n % 5}."}
            for n in range(count)
        ]
        (texts / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = run("experiment.py", tmp_path, "--held-out", 10)
    assert made.returncode == 0, made.stderr
    plan = tmp_path / "ladder/plan.json"
    options = ["--layers", "1", "--tokens-per-parameter", "0.3", "--batch-tokens", "512", "--untimed"]
    arguments = ["--widths", "16,24", "--target", "32", *options, "-o", str(plan)]
    assert main(["scaling", "plan", str(tmp_path / "recipe.json"), *arguments]) == 0
    assert main(["scaling", "run", str(plan), "--only", "w16"]) == 0
    asked = run("questions.py", plan, tmp_path / "pages")
    assert asked.returncode == 0, asked.stderr
    answers = json.loads((tmp_path / "ladder/w16/questions.json").read_text())
    assert len(json.dumps(answers)) > 100
    capsys.readouterr()
    assert main(["scaling", "predict", str(plan)]) == EXIT_ERROR
    assert "w24" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_each_script_says_how_it_is_used(script: str) -> None:
    told = run(script, "--help")
    assert told.returncode == 0, told.stderr
    assert "python examples/scaling/" in told.stdout
