"""What a server allows, and what it serves."""

import time
from dataclasses import dataclass, field

from mm_gpt.config import check_numbers
from mm_gpt.errors import ConfigError

MAX_LOGPROBS = 20
"""Alternatives of each token that a client may ask for."""
MAX_STOPS = 4
MAX_PROMPTS = 2048
"""Prompts in one request for completions."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits of a server. Raises ConfigError naming a value out of range."""

    api_key: str = ""
    """What clients must send as `Authorization: Bearer KEY`; empty: nothing."""
    max_rows: int = 8
    """Answers that are generated at once."""
    max_waiting: int = 64
    """Answers that wait for a row; who comes later is told to try again."""
    max_images: int = 16
    """Images in one request."""
    max_body_bytes: int = 32 * 2**20
    """Of one request, and of the images that one request has fetched; four times as much are held for all together."""
    max_tokens: int | None = None
    """Longest answer in tokens; None: as long as the context."""
    timeout_s: float = 600.0
    """For one request, from its last byte to the answer's."""
    body_s: float = 60.0
    """For its body to come."""
    fetch_s: float = 10.0
    """For the downloads of one request's images together."""
    grace_s: float = 30.0
    """What is running may take so long to end after SIGTERM."""
    ping_s: float = 10.0
    """A stream on which nothing else happens gets a comment each so many seconds."""
    allow_origins: tuple[str, ...] = ()
    """Web pages that may use the server from a browser; `*` for all."""

    def __post_init__(self) -> None:
        check_numbers(self, "max_rows", "max_waiting", "max_body_bytes", "max_tokens", at_least=1)
        check_numbers(self, "max_images", "grace_s", at_least=0)
        check_numbers(self, "timeout_s", "body_s", "fetch_s", "ping_s", above=0)
        if not self.api_key.isascii() or self.api_key.strip() != self.api_key:
            raise ConfigError("the API key must be ASCII without spaces around it: HTTP headers carry nothing else")


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model of a server, as far as requests are concerned."""

    name: str
    context: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    end_ids: tuple[int, ...]
    takes_images: bool
    no_repeat_ngram_size: int
    """Of chats that ask for nothing else."""
    fingerprint: str
    """Changes with whatever may change answers."""
    created: int = field(default_factory=lambda: int(time.time()))
