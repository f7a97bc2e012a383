"""The engine: Documents in, answers out. Rows join and leave a running batch; each is its own, whoever is beside it.

An answer depends on its prompt, its options and its seed. On the CPU the compiled steps give a row the same bits in any
company; elsewhere matrix products round differently with the size of the batch.

Shapes: R rows in one step, T prompt tokens, D width, V vocabulary.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mm_gpt.document import Document, check_document
from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.inference.beams import BeamSearch
from mm_gpt.inference.constraints import Grammars
from mm_gpt.inference.detokenizer import TokenBytes
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.inference.reading import Key, Prompt, Reader, Reading
from mm_gpt.inference.rows import Row, grammar_masks, prompt_logprobs, token_logprobs
from mm_gpt.inference.sampling import choose
from mm_gpt.inference.sequences import Sequences, TorchSequences
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Example, Processor

logger = logging.getLogger(__name__)

MAX_ROWS = 32
"""Rows that are generated side by side. More only take memory: at 32, two cores are as busy as they get."""


class Engine:
    """Generates from a model, for any number of threads, one step at a time."""

    def __init__(self, model: MMGPT, processor: Processor, *, compiled: bool = False, max_rows: int = MAX_ROWS):
        """`compiled`: steps as one compiled function, where the decoder has none of what it cannot do (`plain_because`
        says it); for models on the CPU whose weights stay as they are."""
        self.model, self.processor, self.max_rows = model, processor, max_rows
        self.plain_because: str | None = None
        self.sequences: Sequences = TorchSequences(model.decoder)
        if compiled:  # imported where it is used: its compiler takes a while to start
            from mm_gpt.inference.block_sequences import BlockSequences
            from mm_gpt.inference.compiled import missing

            self.plain_because = missing(model.decoder.config)
            if self.plain_because is None:
                self.sequences = BlockSequences(model.decoder, make_room=self._make_room)
            else:
                logger.warning("torch decodes, without the compiled step: %s", self.plain_because)
        self.reader = Reader(model, processor, self.sequences)
        self.tokens = TokenBytes(processor.tokenizer)
        self._grammars: Grammars | None = None
        self._making = threading.Lock()
        self.lock = threading.RLock()
        """Held while the model runs."""

    def generate(
        self, documents: Sequence[Document], config: GenerationConfig | Sequence[GenerationConfig]
    ) -> list[Answer]:
        """`n` answers for each document, one document after the other. Configurations: one for all, or one for each.

        Raises ContextOverflowError naming a prompt too long, ConfigError for a constraint that cannot be kept.
        """
        configs = [config] * len(documents) if isinstance(config, GenerationConfig) else list(config)
        jobs = [self.job(document, each) for document, each in zip(documents, configs, strict=True)]
        run = Run(self)
        run.waiting.extend(jobs)
        try:
            while run.is_busy:
                run.step()
                if wrong := next((job for job in jobs if job.error is not None), None):
                    raise wrong.error  # type: ignore[misc]
        finally:
            run.close()
        return [answer for job in jobs for answer in job.answers()]

    def each(
        self, documents: Iterable[Document | None], config: GenerationConfig, *, ahead: int
    ) -> Iterator[Answer | None]:
        """The answer to each of any number of documents, in their order; None for None. At most `ahead` of them are
        worked on at a time, and a place that is free is the next one's. Raises what `generate` does."""
        if config.n > 1:
            raise ConfigError(f"each document has one answer here: n cannot be {config.n}")
        run, jobs, left = Run(self, starts=ahead), deque[Job | None](), iter(documents)
        is_over = False
        try:
            while not is_over or jobs:
                while not is_over and sum(job is not None and not job.is_done for job in jobs) < ahead:
                    try:
                        document = next(left)
                    except StopIteration:
                        is_over = True
                        break
                    jobs.append(None if document is None else self.job(document, config))
                    if (job := jobs[-1]) is not None:
                        run.waiting.append(job)
                while jobs and (jobs[0] is None or jobs[0].is_done):
                    done = jobs.popleft()
                    yield None if done is None else done.answers()[0]
                if run.is_busy:
                    run.step()
        finally:
            run.close()

    def stream(self, document: Document, config: GenerationConfig) -> "Stream":
        """Pieces of the answer as they are generated."""
        if config.num_beams > 1:
            raise ConfigError("beam search cannot stream: it knows its answer only at the end")
        if config.n > 1:
            raise ConfigError(f"one answer is streamed at a time: n cannot be {config.n}")
        return Stream(self, self.job(document, config))

    def job(self, document: Document | Example, config: GenerationConfig) -> "Job":
        """What is to be generated, nothing of it done yet. Raises what is wrong with the prompt, its images aside."""
        if isinstance(document, Document):
            check_document(document)
            document = self.processor(document)
        return Job(self, document, config)

    def _make_room(self) -> bool:
        return self.reader.prompts.make_room()

    def grammars(self) -> Grammars:
        """What compiles constraints; made when the first one is asked for, for it looks at every token."""
        with self._making:
            if self._grammars is None:
                self._grammars = Grammars(self.processor.tokenizer, self.model.decoder.config.vocab_size)
            return self._grammars

    def forget(self) -> None:
        """To be called when the model's weights have changed: nothing that was read before is used any more."""
        with self.lock:
            self.reader.forget()


class Job:
    """What one asker waits for: the n answers to a prompt, or the best of its beams."""

    def __init__(
        self, engine: Engine, example: Example, config: GenerationConfig, *, known: dict[Any, Key] | None = None
    ):
        """`known`: digests of images that were met before, see `Reader.prompt`."""
        self.engine, self.example, self.config, self.known = engine, example, config, known
        self.context = self._room()
        vocab_size = engine.model.decoder.config.vocab_size
        if unknown := [id for id in config.logit_bias if id >= vocab_size]:
            raise ConfigError(f"logit_bias: there is no token {unknown[0]}; the model has {vocab_size}")
        self.grammar = None if config.constraint is None else engine.grammars().compile(config.constraint)
        self.rows: list[Row] = []
        """Those that are sampled; empty until the prompt was read."""
        self.beams: BeamSearch | None = None
        self.cancelled = False
        self.error: Exception | None = None
        self._prompt: Prompt | None = None

    def _room(self) -> int:
        """Tokens of the prompt and its answer together. Raises ContextOverflowError for a prompt that leaves none."""
        context = self.engine.model.decoder.config.max_length
        if len(self.example) >= context:
            raise ContextOverflowError(
                f"the prompt has {len(self.example)} tokens; the context holds {context} with the answer"
            )
        return context

    @property
    def num_rows(self) -> int:
        """Rows that it takes in a step."""
        return max(self.config.n, self.config.num_beams)

    @property
    def is_done(self) -> bool:
        if self.error is not None or self.cancelled:
            return True
        if self.beams is not None:
            return self.beams.is_done
        return bool(self.rows) and all(row.finish_reason for row in self.rows)

    def prepare(self) -> Prompt:
        """Decode the images, which any thread may do. Raises ImageError."""
        if self._prompt is None:
            self._prompt = self.engine.reader.prompt(self.example, self.known)
        return self._prompt

    def read(self, prompt: Prompt) -> Reading:
        return self.engine.reader.read(prompt, reuse=not self.config.prompt_logprobs)

    def finish(self, row: Row) -> None:
        """Let go of what a row has read; of the first, the engine keeps it for prompts that begin alike."""
        if row.index == 0 and self.error is None:
            self.engine.reader.prompts.keep(row.prompt, row.ids, row.sequence)
        else:
            self.engine.sequences.release(row.sequence)
        row.sequence = None

    def answers(self) -> list[Answer]:
        """In the order of their indices. Raises the job's error."""
        if self.error is not None:
            raise self.error
        rows = self.rows if self.beams is None else [self.beams.best]
        return [row.answer() for row in rows]

    def start(self) -> Tensor:
        """Read the prompt: logits (1, V) of what follows. What was read is in `rows` or `beams`, even if this fails."""
        engine, config, prompt = self.engine, self.config, self.prepare()
        self._prompt = None  # what holds its pixels
        end_ids = engine.processor.tokenizer.end_ids
        first = Row(prompt, config, engine.tokens, context=self.context, end_ids=end_ids, grammar=self.grammar)
        reading = self.read(prompt)
        first.sequence, first.cached_tokens = reading.sequence, reading.cached_tokens
        if config.num_beams > 1:
            self.beams = BeamSearch(first, engine.sequences)
        else:
            self.rows = [first]
        if config.prompt_logprobs:
            first.prompt_logprobs = prompt_logprobs(engine.model.decoder, prompt, reading.hidden, first)
        for index in range(1, config.n):
            self.rows.append(first.sibling(index, engine.sequences))
        return engine.sequences.logits(reading.hidden[-1:])


class Run:
    """Jobs that are generated together. Others may be added between two steps."""

    def __init__(self, engine: Engine, max_rows: int | None = None, *, starts: int = 1):
        """`starts`: prompts that are read between two steps while rows are running, for they wait meanwhile."""
        self.engine, self.max_rows, self.starts = engine, max_rows or engine.max_rows, starts
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_rows(self) -> int:
        """Rows that are running; those that have ended have left their place to others."""
        return sum(len(_live(job)) if job.beams is None else job.num_rows for job in self.running)

    @torch.inference_mode()
    def step(self) -> list[tuple[Job, Row, str]]:
        """One token for each row: the rows that got one, and the text that it makes certain.

        Waiting jobs start where there is room. What is wrong with a job is its `error`, and the others go on."""
        with self.engine.lock:
            self._leave()
            running = list(self.running)
            after: list[tuple[Job, Tensor]] = []
            while running:
                try:
                    after = self._next(running)
                    break
                except MMGPTError as error:  # no memory for one more token of each: the youngest makes room
                    running.pop().error = error
                    self._leave()
            started = self._start()
            added = self._add([*after, *started])
            self._leave()
            return added

    def close(self) -> None:
        """Let go of everything that is not finished."""
        with self.engine.lock:
            for job in (*self.waiting, *self.running):
                job.cancelled = True
            self._leave()

    def _next(self, jobs: list[Job]) -> list[tuple[Job, Tensor]]:
        """The tokens chosen last are read; each job's logits (rows, V) of what follows."""
        rows = [_live(job) for job in jobs]
        flat = [row for group in rows for row in group]
        if not flat:
            return []
        logits = self.engine.sequences.step([row.sequence for row in flat], [row.ids[-1] for row in flat])
        return list(zip(jobs, logits.split([len(group) for group in rows]), strict=True))

    def _start(self) -> list[tuple[Job, Tensor]]:
        """Read the prompts for which there is room."""
        jobs: list[Job] = []
        room, most = self.max_rows - self.num_rows, self.starts if self.running else len(self.waiting)
        while self.waiting and len(jobs) < most:
            rows = self.waiting[0].num_rows
            if rows > room and (self.running or jobs):
                break
            room -= rows
            jobs.append(self.waiting.popleft())
        prompts = [prompt for job in jobs if (prompt := _tried(job, job.prepare)) is not None]
        if len(prompts) > 1:  # their images together; one alone is read with those that it needs
            self.engine.reader.see(prompts)
        started: list[tuple[Job, Tensor]] = []
        for job in jobs:
            if job.error is not None:
                continue
            self.running.append(job)  # also if it fails: then it leaves, with what it has read
            logits = _tried(job, job.start)
            if logits is not None:
                started.append((job, logits.expand(len(_live(job)), -1)))
        return started

    def _add(self, after: Sequence[tuple[Job, Tensor]]) -> list[tuple[Job, Row, str]]:
        """Choose the next token of every row: all that are sampled at once, beams prompt by prompt."""
        added: list[tuple[Job, Row, str]] = []
        rows: list[tuple[Job, Row]] = []
        masks: list[np.ndarray | None] = []
        parts: list[Tensor] = []
        for job, logits in after:
            if job.beams is None:
                allowed = _tried(job, partial(grammar_masks, _live(job), logits.shape[-1]))
                if allowed is not None:  # a grammar that has grown too large is the matter of its own answer
                    rows += [(job, row) for row in _live(job)]
                    masks += allowed
                    parts.append(logits)
        if rows:
            logits = torch.cat(parts)
            ids = choose(logits, [row.sampler for _, row in rows], masks).tolist()
            logprobs = token_logprobs(logits, ids, [row for _, row in rows])
            for (job, row), id, logprob in zip(rows, ids, logprobs, strict=True):
                text = _tried(job, partial(row.add, id, logprob))
                if text is not None:
                    added.append((job, row, text))
        for job, logits in after:
            if job.beams is not None:
                _tried(job, partial(job.beams.advance, logits))
        return added

    def _leave(self) -> None:
        """Let go of what finished rows hold, and of jobs that are done."""
        for job in self.running:
            for row in job.rows:
                if row.sequence is not None and (row.finish_reason or job.is_done):
                    job.finish(row)
            if job.is_done and job.beams is not None:
                job.beams.close()
        self.running = [job for job in self.running if not job.is_done]
        self.waiting = deque(job for job in self.waiting if not job.is_done)


def _live(job: Job) -> list[Row]:
    """The rows of a job that go on."""
    return job.beams.rows if job.beams is not None else [row for row in job.rows if not row.finish_reason]


_T = TypeVar("_T")


def _tried(job: Job, do: Callable[[], _T]) -> _T | None:
    """What `do` gives; None where it fails, which is the job's error."""
    try:
        return do()
    except Exception as error:
        job.error = error
        return None


class Stream(Iterator[str]):
    """Pieces of text; when they are used up, `answer` holds the whole."""

    def __init__(self, engine: Engine, job: Job):
        self._job = job
        self._pieces = self._run(engine)

    def _run(self, engine: Engine) -> Iterator[str]:
        run = Run(engine)
        run.waiting.append(self._job)
        try:
            while run.is_busy:
                for _, _, piece in run.step():
                    if piece:
                        yield piece
            if self._job.error is not None:
                raise self._job.error
        finally:
            run.close()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End it where it is."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def answer(self) -> Answer:
        """The answer so far; complete when the pieces are used up."""
        return self._job.rows[0].answer()
