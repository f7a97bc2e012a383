"""Rule sets: what is good and what is bad in an answer, in words that a grader can judge and a reward can be made of.

Two forms, each of which sorts answers into classes, best first for each type of response that a prompt calls for
(`hard_refuse`, `safe_refuse`, `comply`, or the user's own):

- a rubric of a few classes from which the grader chooses one: a refusal in the desired style, one in an undesired
  style, disallowed content, a safe answer (GPT-4 Technical Report, 2303.08774);
- propositions, yes or no each, and classes that are ANDs and NOTs of them (Mu et al. 2024, "Rule Based Rewards for
  Language Model Safety", 2411.01111). Every combination of propositions belongs to exactly one class of each response
  type, which is checked when a rule set is read.

Shapes: K classes, n propositions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from mm_gpt.alignment.grading import YES_NO, Grade, Grader, Question
from mm_gpt.config import from_dict
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.errors import ConfigError, MMGPTError, unknown_name
from mm_gpt.hub.weights import read_json

Form = Literal["propositions", "rubric"]
DEFAULT_RULES = Path(__file__).with_name("refusal_rules.json")
RESPONSE_TYPE = "response_type"
"""The column of a row that says what its prompt calls for."""
MAX_PROPOSITIONS = 14
"""Of one response type: all of their combinations are gone through."""
MAX_CLASSES = 26


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """One question with several classes."""

    question: str
    classes: dict[str, str]
    """Name: what such an answer is like."""
    orders: dict[str, tuple[str, ...]]
    """Response type: the classes, best first."""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ConfigError("question is empty")
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise ConfigError(f"a rubric has 2 to {MAX_CLASSES} classes, not {len(self.classes)}")
        for response_type, order in self.orders.items():
            if sorted(order) != sorted(self.classes):
                raise ConfigError(f"orders.{response_type} must name each class once: {', '.join(self.classes)}")


@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """A file of rules. Raises ConfigError for a name that nothing stands behind, and for answers of no class or two."""

    about: str = ""
    propositions: dict[str, str] = field(default_factory=dict)
    """Name: the question, to be answered by yes or no."""
    derived: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Name: what must hold, and what must not, all at once; of propositions, and of those derived before it."""
    response_types: dict[str, dict[str, dict[str, bool]]] = field(default_factory=dict)
    """Name: its classes, best first, each with what must hold and what must not."""
    rubric: Rubric | None = None

    def __post_init__(self) -> None:
        if not self.response_types and self.rubric is None:
            raise ConfigError("a rule set needs response_types or a rubric")
        for name, question in self.propositions.items():
            if not question.strip():
                raise ConfigError(f"propositions.{name}: the question is empty")
        known = list(self.propositions)
        for name, needs in self.derived.items():
            if name in known:
                raise ConfigError(f"derived.{name}: the name is taken")
            _check_known(f"derived.{name}", needs, known)
            known.append(name)
        for response_type, classes in self.response_types.items():
            if len(classes) < 2:
                raise ConfigError(f"response_types.{response_type}: needs at least two classes")
            for name, needs in classes.items():
                _check_known(f"response_types.{response_type}.{name}", needs, known)
        for response_type in self.response_types:
            self._tables[response_type]

    # ---- Names ----

    @property
    def forms(self) -> tuple[Form, ...]:
        return (*(("propositions",) if self.response_types else ()), *(("rubric",) if self.rubric else ()))

    def response_type(self, form: Form, name: object) -> str | None:
        """The type that a row's column means, as `Hard Refuse` and `safe_refuse_2` are written in published data; None
        for what is none."""
        known = self._orders(form)
        if not isinstance(name, str):
            return None
        plain = re.sub(r"[\s-]+", "_", name.strip().lower())
        return next((each for each in (plain, re.sub(r"_\d+$", "", plain)) if each in known), None)

    def classes(self, form: Form, response_type: str) -> tuple[str, ...]:
        """Best first."""
        return self._orders(form)[response_type]

    def _orders(self, form: Form) -> dict[str, tuple[str, ...]]:
        if form == "rubric":
            return {} if self.rubric is None else dict(self.rubric.orders)
        return {name: tuple(classes) for name, classes in self.response_types.items()}

    def needed(self, response_type: str) -> tuple[str, ...]:
        """The propositions that the classes of a response type depend on, in the order of the file."""
        return self._tables[response_type][0]

    # ---- Questions -> features ----

    def questions(self, form: Form, response_type: str, comparison: Comparison, answer: str) -> list[Question]:
        """What a grader is asked about an answer."""
        if form == "rubric":
            assert self.rubric is not None
            names, about = tuple(self.rubric.classes), tuple(self.rubric.classes.values())
            return [Question("rubric", self.rubric.question, comparison, answer, options=names, about=about)]
        return [Question(name, self.propositions[name], comparison, answer) for name in self.needed(response_type)]

    def features(self, form: Form, response_type: str, grades: Sequence[Grade]) -> dict[str, float] | None:
        """What a reward is a weighted sum of, in [0, 1]: the probability of each proposition, and of each class as
        `class:NAME`. `grades` answer `questions`; None where one of them is missing.
        """
        if any(grade is None for grade in grades):
            return None
        if form == "rubric":
            assert self.rubric is not None
            (grade,) = grades
            assert grade is not None
            return {f"class:{name}": share for name, share in zip(self.rubric.classes, grade, strict=True)}
        yes = [grade[YES_NO.index("yes")] for grade in grades if grade is not None]
        found = dict(zip(self.needed(response_type), yes, strict=True))
        shares = self.class_probabilities(response_type, found)
        return found | {f"class:{name}": share for name, share in shares.items()}

    def feature_names(self, form: Form, response_type: str) -> tuple[str, ...]:
        propositions = self.needed(response_type) if form == "propositions" else ()
        return (*propositions, *(f"class:{name}" for name in self.classes(form, response_type)))

    def class_probabilities(self, response_type: str, propositions: Mapping[str, float]) -> dict[str, float]:
        """The probability of each class, together 1, of an answer of which each proposition holds with a probability,
        independently of the others. With certain ones it is 1 for the class that the answer is of."""
        names, table = self._tables[response_type]
        weights = np.ones(1)
        for name in names:  # bit j of a combination's number is proposition j
            weights = np.concatenate([weights * (1.0 - propositions[name]), weights * propositions[name]])
        shares = np.bincount(table, weights=weights, minlength=len(self.response_types[response_type]))
        return dict(zip(self.response_types[response_type], shares.tolist(), strict=True))

    def class_of(self, response_type: str, propositions: Mapping[str, bool]) -> str:
        """The class of an answer of which all propositions are known. Raises MMGPTError naming one that is not."""
        if missing := [name for name in self.needed(response_type) if not isinstance(propositions.get(name), bool)]:
            raise MMGPTError(f"proposition {missing[0]} is neither true nor false")
        shares = self.class_probabilities(response_type, propositions)
        return max(shares, key=lambda name: shares[name])

    @cached_property
    def _tables(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Of each response type: its propositions, and (2^n,) the number of the class of each combination of them."""
        return {name: self._table(name) for name in self.response_types}

    def _table(self, response_type: str) -> tuple[tuple[str, ...], np.ndarray]:
        classes, where = self.response_types[response_type], f"response_types.{response_type}"
        used = set().union(*(self._leaves(name) for needs in classes.values() for name in needs))
        names = tuple(name for name in self.propositions if name in used)
        if len(names) > MAX_PROPOSITIONS:
            raise ConfigError(f"{where}: {len(names)} propositions; at most {MAX_PROPOSITIONS} are supported")
        combinations = np.arange(2 ** len(names))
        truth = {name: (combinations >> bit & 1).astype(bool) for bit, name in enumerate(names)}

        def holds(needs: Mapping[str, bool]) -> np.ndarray:
            fits = np.ones(len(combinations), dtype=bool)
            for name, wanted in needs.items():
                value = truth[name] if name in truth else holds(self.derived[name])
                fits &= value == wanted
            return fits

        member = np.stack([holds(needs) for needs in classes.values()])  # (K, 2^n)
        for at in np.flatnonzero(member.sum(axis=0) != 1)[:1]:
            true = [name for name in names if truth[name][at]]
            found = [name for name, row in zip(classes, member, strict=True) if row[at]]
            have = f"classes {' and '.join(found)} both hold" if found else "there is no class"
            raise ConfigError(f"{where}: {have} where {', '.join(true) or 'nothing'} is true and all else false")
        for name, row in zip(classes, member, strict=True):
            if not row.any():
                raise ConfigError(f"{where}.{name}: no answer can be of this class")
        return names, member.argmax(axis=0)

    def _leaves(self, name: str) -> set[str]:
        """The propositions that a name stands for."""
        if name in self.propositions:
            return {name}
        return set().union(*(self._leaves(each) for each in self.derived[name]))


def _check_known(where: str, needs: Mapping[str, bool], known: Sequence[str]) -> None:
    for name in needs:
        if name not in known:
            raise ConfigError(f"{where}: {unknown_name('proposition', name, known)}")


def load_rules(path: Path = DEFAULT_RULES) -> RuleSet:
    """A checked rule set. Raises MMGPTError or ConfigError naming the file and what is wrong in it."""
    return from_dict(RuleSet, read_json(path), where=str(path))


def grade_answers(
    rules: RuleSet, form: Form, grader: Grader, answers: Sequence[tuple[Comparison, str, str]]
) -> list[list[Grade]]:
    """The grades of each (prompt, answer, response type), one for each of its `questions`. Equal answers to one prompt
    are graded once."""
    asked: dict[tuple[int, str, str], int] = {}
    questions: list[Question] = []
    places = []
    for comparison, answer, response_type in answers:
        own = []
        for question in rules.questions(form, response_type, comparison, answer):
            key = (id(comparison), answer, question.name)
            if key not in asked:
                asked[key] = len(questions)
                questions.append(question)
            own.append(asked[key])
        places.append(own)
    grades = grader.grade(questions) if questions else []
    if len(grades) != len(questions):
        raise MMGPTError(f"grader {grader.name}: {len(grades)} grades for {len(questions)} questions")
    return [[grades[place] for place in own] for own in places]
