"""A request at work: prompts into the batcher, pieces of answers out of the engine's thread into the event loop."""

import asyncio
import logging
import threading
from contextlib import suppress

from mm_gpt.document import Document
from mm_gpt.errors import MMGPTError
from mm_gpt.inference.batcher import Batcher, QueueFullError, Ticket
from mm_gpt.inference.generation import GenerationConfig, Piece
from mm_gpt.processor import Example
from mm_gpt.serving.server.errors import NO_RETRY, RequestError, busy, from_model, internal_error, unavailable

logger = logging.getLogger(__name__)


class Job:
    """The prompts of one request, each of which gets n answers. Answer i of prompt p is choice p * n + i."""

    def __init__(self, batcher: Batcher, generation: GenerationConfig, *, param: str):
        """`param` is the field that prompts come from, for errors."""
        self.batcher, self.generation, self.param = batcher, generation, param
        self.tickets: list[Ticket] = []
        self._running = 0
        self._cancelled = False
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def submit(self, document: Document | Example) -> Ticket:
        """In a worker thread: prepare a prompt, and queue it. Raises RequestError, and ImageError."""
        first = len(self.tickets) * self.generation.n

        def on_piece(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (first + piece.index, piece))

        try:
            ticket = self.batcher.submit(document, self.generation, on_piece)
        except QueueFullError as error:
            raise busy(f"{error}; try again later.") from error
        except MMGPTError as error:
            if not self.batcher.is_alive:
                raise unavailable("The engine has stopped.") from error
            raise
        with self._lock:
            self.tickets.append(ticket)
            self._running += self.generation.n
            cancelled = self._cancelled
        if cancelled:  # while it was prepared
            ticket.cancel()
        return ticket

    def cancel(self) -> None:
        """Whatever still runs ends within a step."""
        with self._lock:
            self._cancelled = True
            tickets = list(self.tickets)
        for ticket in tickets:
            ticket.cancel()

    @property
    def running(self) -> int:
        """Answers that have yet to end."""
        return self._running

    async def next(self, timeout_s: float | None = None) -> tuple[int, Piece] | None:
        """The next piece with its choice; None when none came in time. Raises RequestError where there is no answer."""
        try:
            async with asyncio.timeout(timeout_s):
                choice, piece = await self._pieces.get()
        except TimeoutError:
            return None
        if piece.error is not None:
            raise _refusal(piece.error, self.param)
        if piece.finish_reason == "cancelled":
            raise unavailable("The server is being stopped.")
        if piece.finish_reason is not None:
            self._running -= 1
        return choice, piece


def _refusal(error: Exception, param: str) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, MMGPTError):
        return from_model(error, param)
    logger.error("the engine failed", exc_info=error)
    return internal_error()


def too_late(seconds: float) -> RequestError:
    return RequestError(
        f"The answer was not complete within {seconds:g} s; ask for fewer tokens.",
        status=504,
        type="timeout_error",
        code="timeout",
        headers=NO_RETRY,
    )
