"""One engine for many askers: their rows share its steps, in one thread of its own.

Who asks prepares the prompt in a thread of theirs (tokens, images decoded) and gets the answer's pieces by a callback.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from mm_gpt.document import Document
from mm_gpt.errors import MMGPTError
from mm_gpt.inference.engine import Engine, Job, Run
from mm_gpt.inference.generation import GenerationConfig, Piece, TokenLogprob
from mm_gpt.inference.rows import Row
from mm_gpt.processor import Example

logger = logging.getLogger(__name__)


class QueueFullError(MMGPTError):
    """As many prompts are waiting as are allowed to."""


class Ticket:
    """One prompt that was submitted."""

    def __init__(self, job: Job, on_piece: Callable[[Piece], None]):
        self._job, self._on_piece = job, on_piece
        self._ended: set[int] = set()
        """Indices of answers whose last piece was given."""
        self._asked_to_stop = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, images included."""
        return len(self._job.example)

    @property
    def image_tokens(self) -> int:
        return self._job.example.image_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that had been read before; known when the first piece comes."""
        return self._job.rows[0].cached_tokens if self._job.rows else 0

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, of all n answers."""
        return sum(len(row.ids) for row in self._job.rows)

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """Known when the first piece comes."""
        return self._job.rows[0].prompt_logprobs if self._job.rows else None

    def cancel(self) -> None:
        """Nobody waits any more: its rows are free within one step, and their last pieces say "cancelled"."""
        self._asked_to_stop = True

    def _give(self, piece: Piece) -> None:
        if piece.finish_reason is not None or piece.error is not None:
            self._ended.add(piece.index)
        try:
            self._on_piece(piece)
        except Exception:  # whoever asked is gone
            logger.exception("an answer could not be delivered")
            self._asked_to_stop = True

    def _end(self) -> None:
        """The last piece of every answer that had none yet."""
        job = self._job
        for index in range(job.config.n):
            if index in self._ended:
                continue
            if job.error is not None:
                self._give(Piece(index, error=job.error))
            elif job.beams is not None and job.beams.is_done and not job.cancelled:
                answer = job.beams.best.answer()
                self._give(Piece(index, answer.text, tuple(answer.logprobs or ()), answer.finish_reason))
            else:
                self._give(Piece(index, finish_reason="cancelled"))


@dataclass(frozen=True)
class Stats:
    running: int
    """Prompts that are being answered."""
    waiting: int
    kept_bytes: int
    """Of prompts and images that are kept for the next ones."""
    prompt_tokens_asked: int
    prompt_tokens_found: int
    """Of the tokens of all prompts: those that had been read before."""
    images_asked: int
    images_found: int
    """Of all images: those that had been encoded before."""
    sequence_bytes: int
    """Of the rows that are running."""


class Batcher:
    """Runs an engine until it is closed. All methods are for any thread."""

    def __init__(self, engine: Engine, *, max_rows: int = 8, max_waiting: int = 64):
        self.engine, self.max_rows, self.max_waiting = engine, max_rows, max_waiting
        self._run = Run(engine, max_rows)
        self._tickets: list[Ticket] = []
        self._new: list[Ticket] = []
        self._preparing = 0
        self._changed = threading.Condition()
        self._closed = self._finishing = False
        self.failure: Exception | None = None
        """Why the thread has ended, where it should not have."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self, document: Document | Example, config: GenerationConfig, on_piece: Callable[[Piece], None]
    ) -> Ticket:
        """Have a prompt answered. `on_piece` is called from the engine's thread and must not wait for anything; each of
        the `n` answers has one last piece, with a `finish_reason` or an `error`.

        Raises QueueFullError, and what is wrong with the prompt, its images, or the constraint.
        """
        with self._changed:
            if self._closed or self._finishing or not self.is_alive:
                raise MMGPTError("the engine is closed") from self.failure
            if self._preparing + len(self._new) + len(self._run.waiting) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} prompts are waiting already")
            self._preparing += 1
        try:
            job = self.engine.job(document, config)
            job.prepare()
        except BaseException:
            with self._changed:
                self._preparing -= 1
            raise
        ticket = Ticket(job, on_piece)
        with self._changed:
            self._preparing -= 1
            if self._closed or not self.is_alive:
                raise MMGPTError("the engine is closed") from self.failure
            self._new.append(ticket)
            self._changed.notify()
        return ticket

    def close(self, *, finish: bool = False) -> None:
        """End the thread. `finish` answers first what was submitted; else it is cancelled."""
        with self._changed:
            self._finishing = True
            self._closed = self._closed or not finish
            self._changed.notify()
        self._thread.join()

    def stats(self) -> Stats:
        engine, run = self.engine, self._run
        running = list(run.running)
        sequences = [row.sequence for job in running for row in job.rows]
        reader = engine.reader
        return Stats(
            running=len(running),
            waiting=self._preparing + len(self._new) + len(run.waiting),
            kept_bytes=reader.prompts.bytes + reader.images.bytes,
            prompt_tokens_asked=reader.prompts.queries,
            prompt_tokens_found=reader.prompts.hits,
            images_asked=reader.images.queries,
            images_found=reader.images.hits,
            sequence_bytes=sum(engine.sequences.bytes(s) for s in sequences if s is not None),
        )

    def _loop(self) -> None:
        try:
            while self._wait():
                self._step()
        except Exception as error:  # a fault of ours: whoever waits is told
            self.failure = error
            for ticket in self._tickets:
                ticket._job.error = ticket._job.error or error
        finally:
            with self._changed:
                self._closed = True
                self._tickets += self._new
                self._new = []
            self._run.close()
            for ticket in self._tickets:
                ticket._end()
            self._tickets = []

    def _wait(self) -> bool:
        """Take in what is new; False when it is time to end."""
        with self._changed:
            while not (self._closed or self._new or self._tickets):
                if self._finishing and not self._preparing:
                    return False
                self._changed.wait()
            self._tickets += self._new
            self._run.waiting.extend(ticket._job for ticket in self._new)
            self._new = []
            return not self._closed

    def _step(self) -> None:
        for ticket in self._tickets:
            if ticket._asked_to_stop:
                ticket._job.cancelled = True
        by_job = {id(ticket._job): ticket for ticket in self._tickets}
        for job, row, text in self._run.step():
            piece = _piece(row, text)
            if piece is not None:
                by_job[id(job)]._give(piece)
        for ticket in self._tickets:
            if ticket._job.is_done:
                ticket._end()
        self._tickets = [ticket for ticket in self._tickets if not ticket._job.is_done]


def _piece(row: Row, text: str) -> Piece | None:
    """What a step has added to a row, if that is anything to tell."""
    tokens = (row.logprobs[-1],) if row.config.logprobs else ()
    if not text and not tokens and not row.finish_reason:
        return None
    return Piece(row.index, text, tokens, row.finish_reason or None)
