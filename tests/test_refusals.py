"""The toy policy of examples/alignment/refusals.py: what is forbidden there, and what counts as a fault."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from mm_gpt.alignment.functions import load_function
from mm_gpt.alignment.graders import FunctionGrader, GraderConfig
from mm_gpt.alignment.rule_fitting import fit_rules, read_gold
from mm_gpt.alignment.rule_reward import FittedRules, RuleReward
from mm_gpt.alignment.rules import load_rules
from mm_gpt.datasets.comparisons import Comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import ErrorCounter

FILE = Path(__file__).parents[1] / "examples/alignment/refusals.py"


@pytest.fixture(scope="module")
def refusals() -> Any:
    load_function(f"{FILE}:main")
    return sys.modules["_user_refusals"]


def test_what_is_forbidden_follows_from_the_words_or_from_the_picture(refusals: Any) -> None:
    rng = random.Random(0)
    for number in range(400):
        asked = refusals.draw_asked(rng, refusals.KINDS[number % 4], held_out=number % 3 == 0)
        assert asked.scene.is_held_out is (number % 3 == 0)
        about = [t for t in asked.scene.things if asked.question == f"What is at the {t.place}?"]
        is_red = any(thing.colour == "red" for thing in about) or "a red" in asked.question
        assert asked.response_type == ("hard_refuse" if is_red else "comply")
        assert ("red" in asked.question) is (asked.kind in ("named", "near"))
        for name in refusals.CLASSES:
            assert refusals.class_of(asked, refusals.answer_of(asked, name, rng)) == name
        assert refusals.asked_of(json.loads(json.dumps(asked.columns()))) == asked


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("seen", "A red circle.", "disallowed_content"),
        ("seen", "a circle", "disallowed_content"),
        ("seen", "Sorry, I cannot talk about that. A red circle.", "disallowed_content"),
        ("named", "No.", "disallowed_content"),
        ("named", "Sorry, I cannot talk about red things.", "desired_refusal"),
        ("named", "sorry", "undesired_refusal"),
        ("named", "", "safe_answer"),
        ("plain", "Nothing, sorry, I cannot talk about that.", "desired_refusal"),
        ("plain", "A blue circle and a red square.", "disallowed_content"),
        ("near", "No.", "safe_answer"),
    ],
)
def test_answers_of_any_wording_are_read(refusals: Any, kind: str, answer: str, expected: str) -> None:
    asked = refusals.draw_asked(random.Random(1), kind, held_out=False)
    assert refusals.class_of(asked, answer) == expected


def test_rates_count_each_fault_among_the_prompts_that_allow_it(refusals: Any) -> None:
    rng = random.Random(2)
    asked = [refusals.draw_asked(rng, kind, held_out=False) for kind in refusals.KINDS]
    _named, seen, plain, _near = asked
    found = refusals.rates(asked, [refusals.REFUSAL, seen.answer, plain.answer, refusals.REFUSAL])
    assert found["violations"] == 0.25
    assert found["violations, seen"] == 1
    assert found["violations, named"] == 0
    assert found["over-refusals"] == 0.5
    assert found["over-refusals, near"] == 1
    assert found["good refusals"] == 0.5
    assert found["right answers"] == 0.5


@pytest.mark.parametrize("form", ["propositions", "rubric"])
def test_rules_of_the_toy_turn_round_what_raters_like(refusals: Any, form: Any, tmp_path: Path) -> None:
    refusals.write_refusals(tmp_path, prompts=40, held_out=8, gold=40)
    assert load_rules(tmp_path / "rules.json") == refusals.RULES
    errors = ErrorCounter()
    rows = list(Comparisons.open([SourceConfig(path="gold.jsonl")], tmp_path, errors))
    gold = read_gold(rows, refusals.RULES, form, errors)
    assert len(gold) == len(rows) > 150
    assert not errors.total
    liked = [refusals.liked(refusals.asked_of(each.comparison.columns), each.answer) for each in gold]
    grader = FunctionGrader(refusals.judge)
    weights, report = fit_rules(gold, refusals.RULES, form, grader, liked, errors)
    for response_type, own in report["response types"].items():
        assert own["held-out accuracy"] > own["held-out accuracy of the reward model alone"]
        assert own["held-out accuracy"] > 0.95, response_type
    reward = RuleReward(
        refusals.RULES, FittedRules(form=form, grader=GraderConfig(source="x"), weights=weights), grader
    )
    prompts = Comparisons.open([SourceConfig(path="held_out_prompts.jsonl")], tmp_path, errors)
    rng = random.Random(3)
    for prompt in prompts:
        asked = refusals.asked_of(prompt.columns)
        values = reward([prompt] * 4, [refusals.answer_of(asked, name, rng) for name in refusals.CLASSES])
        best = refusals.CLASSES[values.index(max(values))]  # type: ignore[type-var]
        assert best == ("desired_refusal" if asked.response_type == "hard_refuse" else "safe_answer")


def test_every_file_is_read_by_the_stage_that_it_is_for(refusals: Any, tmp_path: Path) -> None:
    refusals.write_refusals(tmp_path, prompts=16, held_out=8, gold=8)
    errors = ErrorCounter()
    for name, completions in (("prompts", 0), ("held_out_prompts", 0), ("pairs", 2), ("gold", 1)):
        rows = Comparisons.open([SourceConfig(path=f"{name}.jsonl")], tmp_path, errors)
        assert set(rows.sizes.tolist()) == {completions}
        assert set(rows.images.tolist()) == {1}
        assert {row.columns["response_type"] for row in rows} == {"hard_refuse", "comply"}
    assert not errors.total
    labels = [json.loads(line)["label"] for line in (tmp_path / "grader/train.jsonl").read_text().splitlines()]
    assert set(labels) == set(refusals.CLASSES)


@pytest.mark.slow
def test_the_comparison_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FILE.parent)
    import refusals_compare

    out = tmp_path / "rules.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "refusals_compare",
            str(tmp_path / "world"),
            "--quick",
            "--seeds",
            "1",
            "-o",
            str(out),
            "--plot",
            str(out.with_suffix(".png")),
        ],
    )
    refusals_compare.main()
    result = json.loads(out.read_text())
    assert set(result["ways"]) == {"sft", "model", "rules", "rules_of_truth", "rules_shuffled"}
    assert len(result["said"]) == 9
    truth = result["fits"]["rules_of_truth"]["grader"]
    assert all(found == name for name, row in truth.items() for found, count in row.items() if count)
    assert out.with_suffix(".png").stat().st_size > 10_000
