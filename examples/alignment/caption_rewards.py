"""Rewards of captions by what is known of a photo, for `mm-gpt train grpo` and `ppo`.

    mm-gpt train grpo --data prompts rewards=examples/alignment/caption_rewards.py:supported

Prompts have a column `known`: what people wrote about the photo, as `mm-gpt pairs` and caption_prompts.py write it.
"""

from collections.abc import Sequence
from typing import Any

from mm_gpt.eval.objects import Known

MOST = 3
"""Objects that are worth something: more are a list, not a caption."""
WORTH = 0.25
"""Of a supported object, where an unsupported one costs 1."""


def supported(completions: Sequence[Any], known: Sequence[Sequence[str]], **_: Any) -> list[float | None]:
    """Less 1 for each object that nothing known of the photo mentions or implies, and a little for each that it does:
    a caption that names nothing cannot be wrong, and would otherwise be the best. None where nothing is known."""
    return [_supported(completion[0]["content"], texts) for completion, texts in zip(completions, known, strict=True)]


def _supported(answer: str, texts: Sequence[str] | None) -> float | None:
    if not texts:
        return None
    named, unsupported = Known(texts).counts(answer)
    return WORTH * min(MOST, named - unsupported) - unsupported
