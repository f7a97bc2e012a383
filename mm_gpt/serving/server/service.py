"""One model behind a server: its batcher, its worker threads, its limits, and its numbers."""

import asyncio
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import torch

from mm_gpt import __version__
from mm_gpt.config import to_dict
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.batcher import Batcher, Ticket
from mm_gpt.inference.generation import Piece
from mm_gpt.serving.server.config import Served, ServerConfig
from mm_gpt.serving.server.errors import ClientGoneError, busy, unavailable
from mm_gpt.serving.server.jobs import Job, too_late
from mm_gpt.serving.server.metrics import Metrics
from mm_gpt.serving.server.prompts import Held, Prompts

T = TypeVar("T")
Waiting = deque[Callable[[], Ticket]]
"""Prompts of a request that have yet to be submitted."""
BODIES_HELD = 4
"""Bodies of the largest size that may be in memory at once."""
PREPARED_IMAGES = 32
"""Images of all prompts that are in the model's pixels at once, or those of one request if it has more."""
FETCHERS, PREPARERS = 8, 2


def served_model(assistant: Assistant, name: str) -> Served:
    """What requests have to know about a model."""
    decoder, processor = assistant.model.decoder.config, assistant.processor
    parts = [__version__, torch.__version__, name, to_dict(assistant.model.config), processor.tokenizer.fingerprint]
    digest = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
    return Served(
        name=name,
        context=decoder.max_length,
        vocab_size=decoder.vocab_size,
        end_ids=tuple(processor.tokenizer.end_ids),
        takes_images=processor.config.image is not None,
        no_repeat_ngram_size=assistant.chat_config().no_repeat_ngram_size,
        fingerprint=f"fp_{digest[:12]}",
    )


class Service:
    """Close it at the end: it has threads."""

    def __init__(self, served: Served, batcher: Batcher, prompts: Prompts, config: ServerConfig):
        self.served, self.batcher, self.prompts, self.config = served, batcher, prompts, config
        self.metrics = Metrics(served.name, batcher.stats)
        self.held = Held(BODIES_HELD * config.max_body_bytes)
        self.active = 0
        """Requests that were let in and are not complete."""
        self._images = _Slots(PREPARED_IMAGES)
        # Apart, so that slow hosts of images hold up nobody else.
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetch")
        self._preparers = ThreadPoolExecutor(PREPARERS, "prepare")

    @classmethod
    def of(cls, assistant: Assistant, name: str, config: ServerConfig) -> "Service":
        batcher = Batcher(assistant.engine, max_rows=config.max_rows, max_waiting=config.max_waiting)
        return cls(served_model(assistant, name), batcher, Prompts(assistant.processor, config), config)

    def close(self) -> None:
        """Whoever still waits is told that the server stops."""
        self.batcher.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._preparers.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Raises RequestError (503) when the engine has died."""
        if not self.batcher.is_alive:
            raise unavailable("The engine has stopped; the server must be started again.")

    @contextmanager
    def admitted(self) -> Iterator["Admission"]:
        """A place for one request. Raises RequestError (429) when all are taken."""
        self.check()
        if self.active >= self.config.max_rows + self.config.max_waiting:
            raise busy(f"{self.active} requests are waiting already; try again later.")
        self.active += 1
        admission = Admission(self)
        try:
            yield admission
        finally:
            self.active -= 1
            admission.close()

    async def fetch(self, work: Callable[[], T]) -> T:
        """`work()` in a thread that may wait for the network."""
        return await asyncio.get_running_loop().run_in_executor(self._fetchers, work)

    async def prepare(self, work: Callable[[], T]) -> T:
        """`work()` in a thread that may compute."""
        return await asyncio.get_running_loop().run_in_executor(self._preparers, work)

    @asynccontextmanager
    async def image_slots(self, count: int) -> AsyncIterator[None]:
        """Waits until so many images may be in memory as pixels."""
        self.metrics.images(count)
        async with self._images.take(count):
            yield


class Admission:
    """A request that was let in: what it holds, and how much time it has."""

    def __init__(self, service: Service):
        self.service = service
        self._bytes, self._closed, self._lock = 0, False, threading.Lock()
        self.received()

    def received(self) -> None:
        """The request is complete: its time runs from here."""
        self.start = time.monotonic()
        self.deadline = self.start + self.service.config.timeout_s

    def hold(self, num_bytes: int) -> None:
        """Raises RequestError (429) when all requests together hold too much. A thread may ask when it is too late."""
        with self._lock:
            if self._closed:
                raise ClientGoneError
            self.service.held.take(num_bytes)
            self._bytes += num_bytes

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self.service.held.give_back(self._bytes)

    @property
    def remaining_s(self) -> float:
        """Raises RequestError (504) when there is none left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise too_late(self.service.config.timeout_s)
        return left

    async def start_job(self, job: Job, waiting: Waiting) -> None:
        """Submit as many of the prompts as may run at once."""
        while waiting and (not job.running or job.running + job.generation.n <= self.service.config.max_rows):
            await self.service.prepare(waiting.popleft())

    async def pieces(self, job: Job, waiting: Waiting) -> AsyncGenerator[tuple[int, Piece] | None, None]:
        """All pieces of a job with their choices; None when nothing came for a while. Submits what waits in its turn.

        Raises RequestError."""
        metrics, begun = self.service.metrics, False
        try:
            await self.start_job(job, waiting)
            while job.running:
                found = await job.next(min(self.remaining_s, self.service.config.ping_s))
                if found is not None and not begun:
                    metrics.time("time_to_first_token", time.monotonic() - self.start)
                    begun = True
                yield found
                if waiting:
                    await self.start_job(job, waiting)
            metrics.time("e2e_request_latency", time.monotonic() - self.start)
        finally:
            job.cancel()
            metrics.tokens("prompt", sum(ticket.prompt_tokens for ticket in job.tickets))
            metrics.tokens("generation", sum(ticket.completion_tokens for ticket in job.tickets))


class _Slots:
    """A number of things that tasks of one event loop share, first come, first served."""

    def __init__(self, size: int):
        self.size, self.taken = size, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[None]:
        """More than there are at all are given while nobody else has any."""
        count = min(count, self.size)
        if count:
            place = (count, asyncio.get_running_loop().create_future())
            self._waiting.append(place)
            self._serve()
            try:
                await place[1]
            except asyncio.CancelledError:
                if place in self._waiting:
                    self._waiting.remove(place)
                else:  # given at the very moment
                    self.taken -= count
                self._serve()
                raise
        try:
            yield
        finally:
            self.taken -= count
            self._serve()

    def _serve(self) -> None:
        while self._waiting and self.taken + self._waiting[0][0] <= self.size:
            count, future = self._waiting.popleft()
            self.taken += count
            if future.cancelled():
                self.taken -= count
            else:
                future.set_result(None)
