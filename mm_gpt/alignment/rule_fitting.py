"""Weights of a rule set: fitted on gold answers, so that the better class of answer has the higher reward.

total = reward model + Σ w_i φ_i, where the features φ are the probabilities of the propositions and of the classes
(`mm_gpt.alignment.rules`). For each response type by itself, of two answers to one prompt the one of the better class
is to have the higher total, by a margin: hinge loss on these pairs, AdamW from zero (Mu et al. 2024, 2411.01111).

Shapes: E examples, F features, P pairs.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_gpt.alignment.grading import YES_NO, Grade, Grader
from mm_gpt.alignment.rules import RESPONSE_TYPE, Form, RuleSet, grade_answers
from mm_gpt.config import check_numbers
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Image
from mm_gpt.errors import MMGPTError, unknown_name

CLASS, PROPOSITIONS = "class", "propositions"
"""Columns of gold rows: what the completion is."""
BINS = 10
"""Of the calibration, equally wide."""

# ---- Gold ----


@dataclass(frozen=True)
class Gold:
    """An answer of which somebody has said what it is."""

    comparison: Comparison
    answer: str
    response_type: str
    rank: int
    """Of its class: 0 is the best."""
    propositions: Mapping[str, bool]
    """Those that are known."""


def read_gold(rows: Sequence[Comparison], rules: RuleSet, form: Form, errors: ErrorCounter) -> list[Gold]:
    """Rows of a prompt and one completion with the columns `response_type` and what the completion is: `propositions`
    ({name: bool}), or, for the rubric and where there are none, `class`. Rows that lack it are counted."""
    gold = []
    for row in rows:
        if len(row.completions) != 1:
            errors.add(f"{len(row.completions)} completions, not one", row.key)
            continue
        response_type = rules.response_type(form, row.columns.get(RESPONSE_TYPE))
        if response_type is None:
            errors.add(f"unknown {RESPONSE_TYPE} {row.columns.get(RESPONSE_TYPE)!r:.60}", row.key)
            continue
        given = row.columns.get(PROPOSITIONS)
        known = {k: v for k, v in given.items() if isinstance(v, bool)} if isinstance(given, Mapping) else {}
        classes = rules.classes(form, response_type)
        try:
            if form == "propositions" and isinstance(given, Mapping):
                name: object = rules.class_of(response_type, known)
            else:
                name = row.columns.get(CLASS)
            if name not in classes:
                raise MMGPTError("no class" if name is None else unknown_name("class", str(name), classes))
        except MMGPTError as error:
            errors.add(str(error), row.key)
            continue
        rank = classes.index(name)
        gold.append(Gold(row, row.completions[0].text, response_type, rank, known))
    return gold


# ---- Fitting ----


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How weights are fitted; the defaults are the published ones. Raises ConfigError naming a value out of range."""

    margin: float = 1.0
    lr: float = 1e-2
    iterations: int = 1000
    weight_decay: float = 0.0
    holdout: float = 0.05
    """The share of prompts, of each response type, that is kept to judge by; at least one where there are two."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, "margin", "weight_decay", at_least=0)
        check_numbers(self, "lr", above=0)
        check_numbers(self, "iterations", at_least=1)
        check_numbers(self, "holdout", at_least=0, below=1)


@dataclass(frozen=True)
class Example:
    """What the fit sees of a gold answer."""

    prompt: str
    """Equal for answers to the same prompt."""
    response_type: str
    rank: int
    features: Mapping[str, float]
    base: float = 0.0
    """What the reward model gives."""


def fit_weights(
    examples: Sequence[Example], config: FitConfig | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The weights of each response type's features, and a report about each.

    Only answers to one prompt are compared. Raises MMGPTError where a response type has no two of different classes.
    """
    config = config or FitConfig()
    weights, report = {}, {}
    for response_type in dict.fromkeys(example.response_type for example in examples):
        own = [example for example in examples if example.response_type == response_type]
        if not _pairs(own):
            raise MMGPTError(f"{response_type}: no prompt has two graded answers of different classes")
        held_out = _held_out(own, config)
        train = [example for example in own if example.prompt not in held_out]
        held = [example for example in own if example.prompt in held_out]
        names = tuple(own[0].features)
        fitted, loss = _fit(train, names, config)
        weights[response_type] = dict(zip(names, fitted.tolist(), strict=True))
        report[response_type] = {
            "prompts": len({example.prompt for example in train}),
            "pairs": len(_pairs(train)),
            "loss": loss,
            "accuracy": _accuracy(train, names, fitted),
            "accuracy of the reward model alone": _accuracy(train, names, torch.zeros_like(fitted)),
            "held-out prompts": len(held_out),
            "held-out pairs": len(_pairs(held)),
            "held-out accuracy": _accuracy(held, names, fitted),
            "held-out accuracy of the reward model alone": _accuracy(held, names, torch.zeros_like(fitted)),
        }
    return weights, report


def _held_out(examples: Sequence[Example], config: FitConfig) -> set[str]:
    """Prompts that have something to compare, by a shuffle of their names."""
    prompts = {examples[better].prompt for better, _ in _pairs(examples)}
    if len(prompts) < 2 or not config.holdout:
        return set()
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{config.seed} {prompt}".encode()).digest())
    return set(order[: min(len(order) - 1, max(1, round(config.holdout * len(order))))])


def _pairs(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Numbers of a better and a worse answer to the same prompt."""
    groups = defaultdict(list)
    for number, example in enumerate(examples):
        groups[example.prompt].append(number)
    return [
        (better, worse)
        for group in groups.values()
        for better in group
        for worse in group
        if examples[better].rank < examples[worse].rank
    ]


def _tensors(examples: Sequence[Example], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Features (E, F) and what the reward model gives (E,)."""
    values = torch.tensor([[example.features[name] for name in names] for example in examples], dtype=torch.float64)
    return values.reshape(len(examples), len(names)), torch.tensor([e.base for e in examples], dtype=torch.float64)


def _fit(examples: Sequence[Example], names: Sequence[str], config: FitConfig) -> tuple[Tensor, float]:
    """Weights (F,) and the last loss."""
    values, base = _tensors(examples, names)
    better, worse = torch.tensor(_pairs(examples)).T  # (P,) each
    steps, gaps = values[better] - values[worse], base[better] - base[worse]
    weights = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=config.lr, weight_decay=config.weight_decay)
    for _ in range(config.iterations):
        loss = torch.relu(config.margin - gaps - steps @ weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return weights.detach(), float(torch.relu(config.margin - gaps - steps @ weights).mean())


def _accuracy(examples: Sequence[Example], names: Sequence[str], weights: Tensor) -> float | None:
    """The share of pairs in the right order, equal totals not being one; None where there are no pairs."""
    if not (pairs := _pairs(examples)):
        return None
    values, base = _tensors(examples, names)
    totals = (base + values @ weights).tolist()
    return sum(totals[better] > totals[worse] for better, worse in pairs) / len(pairs)


def fit_rules(
    gold: Sequence[Gold],
    rules: RuleSet,
    form: Form,
    grader: Grader,
    base: Sequence[float | None],
    errors: ErrorCounter,
    config: FitConfig | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Grade gold answers and fit weights to them, beside what a reward model gives (`base`, of each answer).

    The report holds what `fit_weights` says and what the grader is worth, held against the gold propositions. Answers
    that are not graded, or to which the reward model gives nothing, are counted and left out.
    """
    grades = grade_answers(rules, form, grader, [(each.comparison, each.answer, each.response_type) for each in gold])
    examples = []
    for each, own, value in zip(gold, grades, base, strict=True):
        features = rules.features(form, each.response_type, own)
        if features is None:
            errors.add("not graded", each.comparison.key)
        elif value is None or value != value:
            errors.add("no reward of the model that the rules are fitted beside", each.comparison.key)
        else:
            prompt = prompt_key(each.comparison)
            examples.append(Example(prompt, each.response_type, each.rank, features, value))
    if not examples:
        raise MMGPTError(f"grader {grader.name}: no answer is graded ({grader.errors.summary()})")
    weights, report = fit_weights(examples, config)
    return weights, {"response types": report, "grader": grader_report(gold, rules, form, grades)}


def prompt_key(comparison: Comparison) -> str:
    """A digest of a prompt: its turns and where its images come from."""
    told = []
    for message in comparison.prompt:
        content = message["content"]
        parts = [content] if isinstance(content, str) else content
        told.append([message["role"], *(_source(part) if isinstance(part, Image) else part for part in parts)])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _source(image: Image) -> str:
    source = image.source
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return str(source) if isinstance(source, str | Path) else str(id(source))


# ---- What a grader is worth ----


def grader_report(gold: Sequence[Gold], rules: RuleSet, form: Form, grades: Sequence[Sequence[Grade]]) -> Any:
    """What a grader is worth. Of each proposition: how often it says yes and no where the truth is yes and no, where it
    says nothing, the accuracy, and the calibration of its probabilities (expected calibration error over ten equal
    bins). Of the rubric: the classes that it finds, by the true one."""
    if form == "rubric":
        assert rules.rubric is not None
        names = tuple(rules.rubric.classes)
        table = {name: dict.fromkeys([*names, "none"], 0) for name in names}
        for each, own in zip(gold, grades, strict=True):
            true = rules.classes(form, each.response_type)[each.rank]
            grade = own[0]
            table[true]["none" if grade is None else names[grade.index(max(grade))]] += 1
        return table
    found: dict[str, list[tuple[bool, float | None]]] = {name: [] for name in rules.propositions}
    for each, own in zip(gold, grades, strict=True):
        for name, grade in zip(rules.needed(each.response_type), own, strict=True):
            if name in each.propositions:
                found[name].append((each.propositions[name], None if grade is None else grade[YES_NO.index("yes")]))
    return {name: _judged(pairs) for name, pairs in found.items() if pairs}


def _judged(pairs: Sequence[tuple[bool, float | None]]) -> dict[str, float | int | None]:
    """Of (truth, probability of yes)."""
    said = [(truth, share) for truth, share in pairs if share is not None]
    counts = {
        "yes and true": sum(truth and share > 0.5 for truth, share in said),
        "yes but false": sum(not truth and share > 0.5 for truth, share in said),
        "no but true": sum(truth and share <= 0.5 for truth, share in said),
        "no and false": sum(not truth and share <= 0.5 for truth, share in said),
        "unanswered": len(pairs) - len(said),
    }
    if not said:
        return {**counts, "accuracy": None, "calibration error": None}
    bins: dict[int, list[tuple[bool, float]]] = defaultdict(list)
    for truth, share in said:
        bins[min(int(share * BINS), BINS - 1)].append((truth, share))
    error = sum(abs(sum(truth - share for truth, share in inside)) for inside in bins.values()) / len(said)
    right = counts["yes and true"] + counts["no and false"]
    return {**counts, "accuracy": right / len(said), "calibration error": error}
