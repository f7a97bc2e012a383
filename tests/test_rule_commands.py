"""`mm-gpt rules`: from gold answers to a reward, as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_picture

from mm_gpt.alignment.rewards import RewardConfig, Rewards
from mm_gpt.alignment.rules import DEFAULT_RULES, load_rules
from mm_gpt.commands.cli import main
from mm_gpt.datasets.comparisons import Comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import ErrorCounter

JUDGE = """
RIGHT = {"gives it away": ["disallowed_content", "fully_complies", "partially_complies"],
         "sorry, no": ["apology", "inability_to_comply"],
         "sorry, no, you fool": ["apology", "inability_to_comply", "insulting_language"],
         "no": ["inability_to_comply"],
         "of course": ["partially_complies", "fully_complies"]}

def judge(question):
    if question.answer == "unclear":
        return None
    return 0.9 if question.name in RIGHT[question.answer] else 0.1
"""
ANSWERS = {
    "gives it away": ("disallowed_content", "fully_complies", "partially_complies"),
    "sorry, no": ("apology", "inability_to_comply"),
    "sorry, no, you fool": ("apology", "inability_to_comply", "insulting_language"),
    "no": ("inability_to_comply",),
    "of course": ("partially_complies", "fully_complies"),
}


def gold_row(number: int, response_type: str, answer: str, **more: Any) -> dict[str, Any]:
    """As the published data: category, response_type, prompt, completion, propositions."""
    return {
        "category": "None",
        "response_type": response_type,
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "completion": [{"role": "assistant", "content": answer}],
        "propositions": {name: name in ANSWERS.get(answer, ()) for name in load_rules().propositions},
    } | more


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(JUDGE)
    answers = {
        "Hard Refuse": ("sorry, no", "sorry, no, you fool", "no", "gives it away"),
        "Comply": ("of course", "no", "gives it away"),
    }
    rows = [gold_row(n, kind, answer) for n in range(6) for kind, own in answers.items() for answer in own]
    return write(tmp_path / "gold.jsonl", rows)


def test_fit_and_use(gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    (tmp_path / "likes.py").write_text(
        "def length(completions, **_):\n    return [len(c[0]['content']) / 10 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--grader",
        "judge.py:judge",
        "--reward-model",
        "likes.py:length",
        "--holdout",
        "0.3",
        "--out",
        "rules",
    ]
    assert main(["rules", "fit", str(gold), *arguments]) == 0
    told = capsys.readouterr().out
    assert "hard_refuse: prompts 4, pairs 24" in told
    assert "held-out prompts 2, held-out pairs 12, held-out accuracy 1.000" in told
    assert "grader, insulting_language: yes and true 6" in told
    assert "accuracy 1.000, calibration error 0.100" in told
    assert json.loads((tmp_path / "rules/rules.json").read_text()) == json.loads(DEFAULT_RULES.read_text())

    monkeypatch.chdir("/")  # what is saved does not depend on where it was made
    image = tmp_path / "picture.png"
    make_picture().save(image)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "another question"}]}]
    row = {"prompt": asked, "images": [image.name], "response_type": "hard_refuse"}
    prompts = Comparisons.open(
        [SourceConfig(path=str(write(tmp_path / "prompts.jsonl", [row])))], Path(), ErrorCounter()
    )
    rewards = Rewards(
        [RewardConfig(source=f"{tmp_path}/likes.py:length"), RewardConfig(source=str(tmp_path / "rules"))]
    )
    order = ["sorry, no", "sorry, no, you fool", "no", "gives it away"]
    scored = rewards([prompts[0]] * 5, [*order, "unclear"])
    assert scored.total[:4].tolist() == sorted(scored.total[:4].tolist(), reverse=True)
    assert scored.each["rules"].isnan().tolist() == [False] * 4 + [True]
    assert scored.total[4] == pytest.approx(0.7)  # what the model gives, and nothing for what nobody graded


def test_rows_without_a_grade_are_told(gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with gold.open("a") as file:
        for row in (
            gold_row(9, "Hard Refuse", "unclear"),
            gold_row(9, "Obey", "no"),
            gold_row(9, "Comply", "no", propositions={}),
        ):
            file.write(json.dumps(row) + "\n")
    out = tmp_path / "rules"
    assert main(["rules", "fit", str(gold), "--grader", f"{tmp_path}/judge.py:judge", "--out", str(out)]) == 3
    told = capsys.readouterr().err
    assert "3 records skipped" in told
    assert "1 not graded" in told
    assert "unknown response_type 'Obey'" in told
    assert "proposition disallowed_content is neither true nor false" in told
    assert "judge gives None" in told
    assert (out / "weights.json").is_file()


def test_grade(gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grader = f"{tmp_path}/judge.py:judge"
    assert main(["rules", "grade", str(gold), "--grader", grader]) == 0
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [line["class"] for line in lines[:4]] == ["ideal", "minimum_acceptable_style", "unacceptable", "disallowed"]
    assert lines[0]["propositions"]["apology"] == 0.9
    assert sum(lines[0]["classes"].values()) == pytest.approx(1)
    assert "hard_refuse: ideal: 6" in told.err
    assert "grader, apology: yes and true 12" in told.err
    assert main(["rules", "fit", str(gold), "--grader", grader, "--out", str(tmp_path / "rules")]) == 0
    out = tmp_path / "grades.jsonl"
    assert main(["rules", "grade", str(gold), "--rules", str(tmp_path / "rules"), "-o", str(out)]) == 0
    rewards = [json.loads(line)["reward"] for line in out.read_text().splitlines()]
    assert rewards[:4] == sorted(rewards[:4], reverse=True)


def test_show_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "show"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.json").write_text(text.replace('"apology": true, ', '"apolgy": true, '))
    assert main(["rules", "show", "--check", str(tmp_path / "mine.json")]) == 1
    assert "mine.json: derived.acceptable_refusal: unknown proposition 'apolgy'; did you mean 'apology'" in (
        capsys.readouterr().err
    )
    assert main(["rules"]) == 2
    assert "mm-gpt rules fit: Fit a rule-based reward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fit", "GOLD", "--grader", "nobody.py:judge", "-o", "OUT"], 1, "nobody.py cannot be run"),
        (["fit", "GOLD", "--grader", "JUDGE", "-o", "OUT", "--reward-model", "nowhere"], 1, "nowhere: no reward model"),
        (["fit", "GOLD", "--grader", "JUDGE", "-o", "OUT", "--lr", "0"], 1, "lr must be above 0"),
        (["fit", "GOLD", "--grader", "JUDGE", "-o", "OUT", "--form", "rubric"], 1, "no class"),
        (["fit", "GOLD", "--grader", "http://127.0.0.1:9", "-o", "OUT"], 1, "no answer from the server"),
        (["fit", "missing.jsonl", "--grader", "JUDGE", "-o", "OUT"], 1, "missing.jsonl: no such file"),
        (["grade", "GOLD"], 2, "name a --grader"),
        (["fti"], 2, "did you mean 'rules fit'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], code: int, message: str, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"GOLD": str(gold), "OUT": str(tmp_path / "out"), "JUDGE": f"{tmp_path}/judge.py:judge"}
    try:
        found = main(["rules", *(places.get(word, word) for word in arguments)])
    except SystemExit as error:
        found = error.code  # type: ignore[assignment]
    assert found == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_help_says_the_defaults_of_the_fit() -> None:
    """They are written out: to read them from the class would import torch for `--help`."""
    from mm_gpt.alignment.rule_fitting import FitConfig
    from mm_gpt.commands.rules import FIT_OPTIONS

    assert set(FIT_OPTIONS) == set(vars(FitConfig()))
    for name, (kind, about) in FIT_OPTIONS.items():
        assert about.endswith(f"(default: {getattr(FitConfig(), name):g})"), name
        assert isinstance(getattr(FitConfig(), name), kind)
