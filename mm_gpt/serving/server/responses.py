"""What is sent: completions as a whole or as a stream of events, and usage, in OpenAI's shapes."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mm_gpt.inference.batcher import Ticket
from mm_gpt.inference.generation import Piece, TokenLogprob
from mm_gpt.serving.server.config import Served

DONE = b"data: [DONE]\n\n"
PING = b": still working\n\n"
"""A comment in the stream: clients skip it, and nobody on the way takes the connection for dead."""


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


class Choice:
    """One answer, put together from its pieces."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[TokenLogprob] = []
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Writer(Protocol):
    """Writes the choices of one kind of completion."""

    prefix: str
    """Of ids."""
    whole_object: str
    chunk_object: str

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """An answer as a whole."""

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece of an answer becomes in a stream."""


class Completion:
    """One response: what its choices and chunks have in common."""

    def __init__(self, writer: Writer, served: Served):
        self.writer = writer
        self._head = {
            "id": writer.prefix + secrets.token_hex(16),
            "object": writer.whole_object,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def whole(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        written = [self.writer.choice(index, choice) for index, choice in enumerate(choices)]
        return self._head | {"choices": written, "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]], **usage: Any) -> bytes:
        """`usage` is given where the client asked for it: None in all chunks but the last."""
        return event(self._head | {"object": self.writer.chunk_object, "choices": list(choices)} | usage)


def usage(tickets: Sequence[Ticket], *, answers: bool = True) -> dict[str, Any]:
    """Each prompt counts once, however many answers it had; `answers` says whether those were wanted."""
    completion = sum(ticket.completion_tokens for ticket in tickets) if answers else 0
    prompt = sum(ticket.prompt_tokens for ticket in tickets)
    image = sum(ticket.image_tokens for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(ticket.cached_tokens for ticket in tickets),
            "image_tokens": image,
            "text_tokens": prompt - image,
        },
    }
