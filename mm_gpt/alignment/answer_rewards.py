"""Reward functions for answers whose truth is known, in the form that users write them.

Each is meant to be gained by the right answer alone: not by naming every option, nor by marks around nothing, nor by
saying two things of which one is right. Where the truth cannot be read they say nothing, rather than that all is well.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from mm_gpt.eval.metrics.vqa import exact_match as is_match

Chat = Sequence[Mapping[str, Any]]

_TRUTHS = ("answer", "answers", "solution")
"""Columns that hold what is right: a string, a number, or a list of those that are all right."""
_NUMBER = re.compile(r"[+-]?([0-9]{1,40})(\.[0-9]{1,40})?")
"""Longer ones are compared as text: to read 10,000 digits takes time, and no question has such an answer."""
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}|([+-]?)([0-9]{1,40})/([0-9]{1,40})")
_BOX = re.compile(r"\\boxed\s*\{")
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def exact_match(completions: Sequence[str | Chat], **columns: Any) -> list[float | None]:
    """1 for an answer that is one of the true ones but for case, punctuation and spaces; else 0."""
    return [
        None if truths is None else is_match(_text(completion), truths)
        for completion, truths in zip(completions, _truths(columns, len(completions)), strict=True)
    ]


def boxed_match(completions: Sequence[str | Chat], **columns: Any) -> list[float | None]:
    r"""1 for an answer with one `\boxed{...}` that holds a true value, as a number or as text; else 0."""
    rewards: list[float | None] = []
    for completion, truths in zip(completions, _truths(columns, len(completions)), strict=True):
        values = None if truths is None else [_value(truth) for truth in truths]
        if values is None or None in values:
            rewards.append(None)
            continue
        found = _boxed(_text(completion))
        is_right = len(found) == 1 and (value := _plain_value(found[0])) is not None and value in values
        rewards.append(float(is_right))
    return rewards


def think_format(completions: Sequence[str | Chat], **columns: Any) -> list[float | None]:
    """1 for `<think>`, some words, `</think>` and some words, with no other such mark; else 0."""
    rewards: list[float | None] = []
    for completion in completions:
        match = _THINK.fullmatch(_text(completion))
        parts = match.groups() if match else ()
        is_whole = all(re.search(r"\w", part) and "<think>" not in part and "</think>" not in part for part in parts)
        rewards.append(float(bool(parts) and is_whole))
    return rewards


ANSWER_REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "exact_match": exact_match,
    "boxed_match": boxed_match,
    "think_format": think_format,
}
"""By the name that `RewardConfig.source` takes."""


def _text(completion: str | Chat) -> str:
    return completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)


def _truths(columns: Mapping[str, Any], number: int) -> list[list[str] | None]:
    """What is right for each of the answers; None where the row does not say it."""
    name = next((name for name in _TRUTHS if name in columns), None)
    if name is None:
        return [None] * number
    found: list[list[str] | None] = []
    for value in columns[name]:
        values = value if isinstance(value, list | tuple) else [value]
        found.append([str(each) for each in values] if values and all(map(_is_known, values)) else None)
    return found


def _is_known(truth: Any) -> bool:
    if isinstance(truth, str):
        return bool(truth.strip())
    return isinstance(truth, int | float) and not isinstance(truth, bool) and math.isfinite(truth)


def _boxed(text: str) -> list[str]:
    """What stands in each box, braces matched; nothing of a box that is not closed."""
    found, end = [], 0
    while match := _BOX.search(text, end):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            found.append(text[match.end() : end - 1])
    return found


def _value(truth: str) -> Fraction | str | None:
    """A true answer, which may stand in a box itself; None where there is none, or several."""
    boxes = _boxed(truth)
    if len(boxes) > 1 or ("\\boxed" in truth and not boxes):
        return None
    return _plain_value(boxes[0] if boxes else truth)


def _plain_value(text: str) -> Fraction | str | None:
    """A number where it is one, else text without spaces and dollar signs; None for nothing."""
    plain = re.sub(r"\s|\$|\\[,;!]", "", text).rstrip(".")
    digits = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", plain)
    if _NUMBER.fullmatch(digits):
        return Fraction(digits)
    if match := _FRACTION.fullmatch(plain):
        sign, above, below = match.group(1, 2, 3) if match.group(2) else match.group(4, 5, 6)
        if int(below):
            return Fraction(int(above), int(below)) * (-1 if sign == "-" else 1)
    return plain or None
