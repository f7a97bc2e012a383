"""Prompts with completions, and which of them are preferred."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_gpt.document import Message


@dataclass(frozen=True)
class Completion:
    """One answer to a prompt."""

    messages: tuple[Message, ...]
    """The assistant's turns, usually one; `content` is a list of strings."""
    rank: int = 0
    """Lower is better; completions of equal rank are not compared."""
    label: bool | None = None
    """Feedback without a pair: good or bad."""
    logprob: float | None = None
    """Nats, summed over its tokens: of the reference policy, where the data has it."""

    @property
    def text(self) -> str:
        """What the assistant says, without marks."""
        parts = [p for m in self.messages if m["role"] == "assistant" for p in _parts(m) if isinstance(p, str)]
        return "".join(parts)


@dataclass(frozen=True)
class Comparison:
    """A prompt and its completions. Images are not decoded."""

    key: str
    prompt: tuple[Message, ...]
    """`content` is a list of strings and `mm_gpt.document.Image`s."""
    completions: tuple[Completion, ...] = ()
    """None: a prompt alone; two: a pair, the better one first; K of them with ranks."""
    is_text: bool = False
    """The completion continues the text of the prompt's only message, without a chat template."""
    margin: float | None = None
    """By how much the first of a pair is better."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, JSON values: reward functions get them."""


def _parts(message: Message) -> list[Any]:
    content = message.get("content")
    return list(content) if isinstance(content, list | tuple) else [] if content is None else [content]
