"""A reward of one's own, about the pictures of shape_comparisons.py.

mm-gpt train grpo --data comparisons --out runs/grpo start=runs/sft/best rewards=examples/shape_rewards.py:right
"""

from collections.abc import Sequence
from typing import Any


def right(completions: Sequence[Any], truth: Sequence[str | None], **columns: Any) -> list[float | None]:
    """Half a point each for the colour and for the shape, None for a prompt whose row does not say what is true.

    TRL's form: everything is a list with an entry for each answer. `truth` is a column of the prompts' rows.
    """
    found: list[float | None] = []
    for completion, true in zip(completions, truth, strict=True):
        words = completion[0]["content"].lower().rstrip(".").split()
        found.append(None if true is None else sum(word in words for word in true.split()) / 2)
    return found
