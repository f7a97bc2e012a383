"""A server in a thread of the test's process, and a batcher that says what the test has written for it."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn

from mm_gpt.errors import ContextOverflowError
from mm_gpt.inference.batcher import QueueFullError, Stats
from mm_gpt.inference.generation import GenerationConfig, Piece, TokenLogprob
from mm_gpt.serving.server.app import App
from mm_gpt.serving.server.config import ServerConfig
from mm_gpt.serving.server.run import Server, listen
from mm_gpt.serving.server.service import Service

HTTP = httpx.Client(verify=False, timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
"""One for all: each new one would read the certificates that it has no use for."""


@contextmanager
def running(app: App, *, grace_s: float = 0.2) -> Iterator[str]:
    """The address of a server with this application."""
    sock = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    server = Server(config, grace_s=grace_s, cut_off=app.close)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        app.close()


@contextmanager
def serving(make: Callable[[ServerConfig], Service], **config: Any) -> Iterator[tuple[str, App]]:
    app = App(ServerConfig(**config))
    app.service = make(app.config)
    with running(app) as address:
        yield address, app


class ScriptedBatcher:
    """Answers every prompt with the pieces of a script."""

    def __init__(self, script: Sequence[Piece], *, held: int | None = None):
        """Pieces from number `held` on wait until `go` is set."""
        self.script, self.held = list(script), held
        self.go, self.closed = threading.Event(), threading.Event()
        self.tickets: list[Any] = []
        self.is_alive, self.is_full, self.context = True, False, 10_000
        self.configs: list[GenerationConfig] = []

    def submit(self, document: Any, config: GenerationConfig, on_piece: Callable[[Piece], None]) -> Any:
        if self.is_full:
            raise QueueFullError("3 prompts are waiting already")
        texts = "".join(getattr(segment, "text", "") for segment in document.segments)
        if len(texts) > self.context:
            raise ContextOverflowError(f"the prompt has {len(texts)} tokens; the context holds {self.context}")
        ticket = SimpleNamespace(prompt_tokens=7, image_tokens=2, cached_tokens=3, completion_tokens=0)
        ticket.prompt_logprobs, ticket.cancelled = None, threading.Event()
        ticket.cancel = ticket.cancelled.set
        self.tickets.append(ticket)
        self.configs.append(config)
        threading.Thread(target=self._run, args=(ticket, on_piece), daemon=True).start()
        return ticket

    def _run(self, ticket: Any, on_piece: Callable[[Piece], None]) -> None:
        for number, piece in enumerate(self.script):
            if number == self.held:
                while not self.go.wait(0.005):
                    if ticket.cancelled.is_set() or self.closed.is_set():
                        on_piece(Piece(0, finish_reason="cancelled"))
                        return
            ticket.completion_tokens += 1
            on_piece(piece)

    def stats(self) -> Stats:
        return Stats(**dict.fromkeys(Stats.__dataclass_fields__, 0))

    def close(self, *, finish: bool = False) -> None:
        self.closed.set()


def token(text: str, id: int = 5, logprob: float = -0.5) -> TokenLogprob:
    return TokenLogprob(text, id, logprob, text.encode())
