"""Rule-based rewards: grades by a rule set, as a number that adds up with a reward model.

The weights are worth something beside the reward model that they were fitted beside (`mm_gpt.alignment.rule_fitting`),
and beside that one alone: its checksum is kept with them.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_gpt.alignment.graders import GraderConfig, load_grader
from mm_gpt.alignment.grading import Grader
from mm_gpt.alignment.rules import RESPONSE_TYPE, Form, RuleSet, grade_answers, load_rules
from mm_gpt.config import from_dict, to_dict
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.weights import read_json, write_json

logger = logging.getLogger(__name__)

RULES, WEIGHTS = "rules.json", "weights.json"
"""A folder with the first of these is a rule-based reward."""


@dataclass(frozen=True, kw_only=True)
class FittedRules:
    """What `weights.json` holds."""

    form: Form
    grader: GraderConfig
    weights: dict[str, dict[str, float]]
    """Response type: feature: weight."""
    beside: str = ""
    """The reward model that they were fitted beside."""
    checksum: str = ""
    """Of that model."""
    report: dict[str, Any] = field(default_factory=dict)


class RuleReward:
    """A rule-based reward: Σ w_i φ_i of each answer. Its prompts have the column `response_type`; where there is none,
    or where a grade is missing, it says nothing (None)."""

    def __init__(self, rules: RuleSet, fitted: FittedRules, grader: Grader, *, name: str = "rules"):
        """Raises ConfigError for weights of other features than the rules have."""
        for response_type, weights in fitted.weights.items():
            if response_type not in rules._orders(fitted.form):
                raise ConfigError(f"{name}: weights of {response_type}, which the rules do not have")
            if set(weights) != set(rules.feature_names(fitted.form, response_type)):
                raise ConfigError(f"{name}: the weights of {response_type} are not those of the rules; fit them again")
        self.name, self.rules, self.fitted, self.grader = name, rules, fitted, grader

    @property
    def errors(self) -> ErrorCounter:
        """What is not graded, and why: the grader's."""
        return self.grader.errors

    @errors.setter
    def errors(self, errors: ErrorCounter) -> None:
        self.grader.errors = errors

    def __call__(
        self,
        comparisons: Sequence[Comparison],
        answers: Sequence[str],
        ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float | None]:
        """The reward of each answer to the prompt in its place."""
        types = [self._type_of(comparison) for comparison in comparisons]
        asked = [n for n, response_type in enumerate(types) if response_type]
        told = [(comparisons[n], answers[n], str(types[n])) for n in asked]
        rewards: list[float | None] = [None] * len(answers)
        for n, grades in zip(asked, grade_answers(self.rules, self.fitted.form, self.grader, told), strict=True):
            features = self.rules.features(self.fitted.form, str(types[n]), grades)
            if features is not None:
                rewards[n] = self.weighted(str(types[n]), features)
        return rewards

    def _type_of(self, comparison: Comparison) -> str | None:
        """Raises nothing: a prompt whose type has no weights is counted."""
        given = comparison.columns.get(RESPONSE_TYPE)
        if given is None:
            return None
        found = self.rules.response_type(self.fitted.form, given)
        if found not in self.fitted.weights:
            self.errors.add(f"{self.name}: no weights for {RESPONSE_TYPE} {given!r:.60}", comparison.key)
            return None
        return found

    def weighted(self, response_type: str, features: Mapping[str, float]) -> float:
        """Σ w_i φ_i."""
        weights = self.fitted.weights[response_type]
        return sum(weights[name] * value for name, value in features.items())

    def check_beside(self, sources: Sequence[str]) -> bool:
        """Whether, of the other rewards that it is added to, one is what it was fitted beside, or none is there where
        it was fitted alone; a warning says what to do where it is not so."""
        now = [_checksum_or_none(source) for source in sources]
        if self.fitted.checksum in now or not (sources or self.fitted.checksum):
            return True
        if self.fitted.beside in map(os.path.abspath, sources):
            how = f"{self.fitted.beside} has changed since they were fitted"
        else:
            was = f"beside {self.fitted.beside}" if self.fitted.beside else "alone"
            how = f"they were fitted {was} and are used {f'beside {sources[0]}' if sources else 'alone'}"
        logger.warning("%s: its weights hold for another scale: %s; fit them again", self.name, how)
        return False


def checksum(source: str) -> str:
    """Of a reward model's weights, by their names and bytes, or of the file of a reward function. Raises MMGPTError."""
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
    else:
        files = [Path(source.rpartition(":")[0])] if ":" in source else [path]
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise MMGPTError(f"{source}: no reward model there ({error.strerror})") from None
    if not files:
        raise MMGPTError(f"{source}: no weights (*.safetensors) in this folder")
    return digest.hexdigest()


def _checksum_or_none(source: str) -> str | None:
    """None where there is nothing to read: `package.module:function`, say."""
    try:
        return checksum(source)
    except MMGPTError:
        return None


def save_rule_reward(rules: RuleSet, fitted: FittedRules, folder: Path) -> None:
    """Write `rules.json` and `weights.json` into a folder, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / WEIGHTS, to_dict(fitted))
    write_json(folder / RULES, to_dict(rules))


def load_rule_reward(folder: str | Path, *, device: str = "auto", grader: Grader | None = None) -> RuleReward:
    """A fitted rule-based reward, with the grader that it was fitted with; `grader` is another one.

    Raises MMGPTError naming the file that is missing or wrong.
    """
    folder = Path(folder)
    rules = load_rules(folder / RULES)
    if not (folder / WEIGHTS).is_file():
        raise MMGPTError(f"{folder}: rules without weights; `mm-gpt rules fit` makes them")
    fitted = from_dict(FittedRules, read_json(folder / WEIGHTS), where=str(folder / WEIGHTS))
    return RuleReward(rules, fitted, grader or load_grader(fitted.grader, device=device), name=folder.name)
