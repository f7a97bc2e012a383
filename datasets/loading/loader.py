"""From a plan to batches: rows are read, decoded and collated in worker processes, and come out in the plan's order.

The workers only read: which rows make micro-batch n of rank r follows from the plan, so their number changes nothing.
A step takes `rows x accumulate x ranks` rows from the plan, and each rank its part of them: as long as that product
stays the same, a run may continue on another number of ranks with the same steps. If the product changes, the run still
continues with the first row that was not learned yet: no sample is lost or comes twice in its epoch. The same holds
where `accumulate` grows from step to step (`StepSizes`).
"""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mm_gpt.datasets.loading.plan import Cursor, Plan, Row
from mm_gpt.datasets.loading.step_sizes import StepSizes
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.processor import Batch
from mm_gpt.system.processes import watch_parent


@dataclass
class Loaded:
    """A micro-batch, and what was skipped while it was read."""

    batch: Batch
    skipped: list[tuple[str, str]]


Read = Callable[[Sequence[tuple[int, Row]]], Loaded]
"""(number of the row, row) pairs to a micro-batch. Worker processes get a copy: it holds no model and no pixels."""


class Loader:
    """The micro-batches of one rank, in order, prefetched by worker processes."""

    def __init__(
        self,
        plan: Plan,
        read: Read,
        *,
        rows: int,
        accumulate: int | StepSizes = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_method: str | None = None,
        errors: ErrorCounter | None = None,
    ):
        """`rows` of the plan are a micro-batch. `start_method`: how workers start, see `multiprocessing`; None: as
        this system does.

        Raises ConfigError for settings out of range.
        """
        full = accumulate.full if isinstance(accumulate, StepSizes) else accumulate
        for setting, value, least in (("rows", rows, 1), ("accumulate", full, 1), ("workers", workers, 0)):
            if value < least:
                raise ConfigError(f"{setting} must be at least {least}, not {value}")
        self.plan, self.read, self.num_rows = plan, read, rows
        self.sizes = accumulate if isinstance(accumulate, StepSizes) else StepSizes(accumulate)
        self.rank, self.world, self.workers, self._start_method = rank, world, workers, start_method
        self.errors = errors if errors is not None else ErrorCounter()
        self._base = (0, 0)  # (step, its first row)
        self._cursors: list[Cursor] = [plan.start()]
        self._next = -1
        self._stream: Iterator[Loaded] | None = None
        self._pool: ProcessPoolExecutor | None = None

    def first_row(self, step: int) -> int:
        """The number in the plan of the first row of all ranks in a step."""
        base_step, base_row = self._base
        between = self.sizes.before(step) - self.sizes.before(base_step)
        return base_row + between * self.num_rows * self.world

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step. Steps in a row are fast; another one starts the workers anew."""
        if step != self._next or self._stream is None:
            self._stream = self._start(step)
        try:
            loaded = list(itertools.islice(self._stream, self.sizes.count(step)))
        except BrokenProcessPool:  # killed, or out of memory
            self.close()
            raise MMGPTError("a process that reads the data has died, for want of memory perhaps") from None
        except BaseException:
            self.close()
            raise
        self._next = step + 1
        for micro in loaded:
            for reason, record in micro.skipped:
                self.errors.add(reason, record)
        keep = [cursor for cursor in self._cursors if cursor.row <= self.first_row(step)]
        self._cursors = [*keep[-1:], *(c for c in self._cursors if c.row > self.first_row(step))]
        return [micro.batch for micro in loaded]

    def close(self) -> None:
        """End the workers. The next step starts others."""
        self._stream = None
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _start(self, step: int) -> Iterator[Loaded]:
        self.close()
        first = self.first_row(step)
        behind = [cursor for cursor in self._cursors if cursor.row <= first]
        cursor = behind[-1] if behind else self.plan.start()
        self._cursors = [cursor]
        rows = self._iterate(cursor, first)
        if not self.workers:
            return map(self.read, rows)
        context = multiprocessing.get_context(self._start_method)
        self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=(self.read,))
        return _in_order(self._pool, rows, ahead=max(2 * self.workers, self.sizes.full))

    def _iterate(self, cursor: Cursor, first: int) -> Iterator[list[tuple[int, Row]]]:
        """The row lists of this rank's micro-batches, from row `first` on. Remembers where windows start."""
        window: list[tuple[int, Row]] = []
        number, current = cursor.row, -1
        for row, begin in self.plan.rows(cursor):
            if begin.window != current:
                current = begin.window
                if begin.row > self._cursors[-1].row:
                    self._cursors.append(begin)
            if number >= first:
                window.append((number, row))
            number += 1
            if len(window) == self.num_rows * self.world:
                # Micro-batch j of all ranks together: rank r has the r-th part.
                yield window[self.rank * self.num_rows : (self.rank + 1) * self.num_rows]
                window = []

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must keep to go on with `step`: JSON values, a few numbers a source."""
        first = self.first_row(step)
        behind = [cursor for cursor in self._cursors if cursor.row <= first]
        return {
            "step": step,
            "row": first,
            "cursor": asdict(behind[-1] if behind else self.plan.start()),
            **self._about(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises MMGPTError when the sources are not those it was made with."""
        try:
            cursor = Cursor(**state["cursor"])
            step, row = int(state["step"]), int(state["row"])
            about = {key: state[key] for key in self._about()}
            if not 0 <= cursor.row <= row:
                raise ValueError(f"row {row} before {cursor.row}")
        except (KeyError, TypeError, ValueError) as error:
            raise MMGPTError(f"the data position of the checkpoint is broken ({error})") from None
        for key, now in self._about().items():
            if about[key] != now:
                raise MMGPTError(f"the data has changed since the checkpoint ({key}: {about[key]}, now {now})")
        if not len(cursor.positions) == len(cursor.served) == len(self.plan.sources):
            raise MMGPTError("the data position of the checkpoint is broken (not of these sources)")
        self._base, self._cursors, self._next, self._stream = (step, row), [cursor], -1, None

    def _about(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "sources": [
                [source.name, len(source), round(source.tokens), getattr(source, "digest", "")]
                for source in plan.sources
            ],
            "weights": plan.weights,
            "repeats": [share.repeat for share in plan.shares],
            "wait": plan.wait,
            "row_length": plan.row_length,
            "window_rows": plan.window_rows,
            "seed": plan.seed,
        }


_read: Read | None = None
"""In a worker: what it runs."""


def _start_worker(read: Read) -> None:
    global _read
    _read = read
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which finishes its step first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    watch_parent()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _run(rows: list[tuple[int, Row]]) -> Loaded:
    assert _read is not None
    return _read(rows)


def _in_order(pool: ProcessPoolExecutor, rows: Iterator[list[tuple[int, Row]]], *, ahead: int) -> Iterator[Loaded]:
    """What the workers make of `rows`, at most `ahead` of them at once: memory stays bounded."""
    waiting: deque[Future[Loaded]] = deque()
    while True:
        while len(waiting) < ahead:
            waiting.append(pool.submit(_run, next(rows)))
        yield waiting.popleft().result()
