"""From a plan to batches: rows are read, decoded and collated in worker processes, and come out in the plan's order.

The workers only read: which rows make micro-batch n of rank r follows from the plan, so their number changes nothing.
A step takes `rows x accumulate x ranks` rows from the plan, and each rank its part of them: as long as that product
stays the same, a run may continue on another number of ranks with the same steps. If the product changes, the run still
continues with the first row that was not learned yet: no sample is lost or comes twice in its epoch.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mm_gpt.datasets.building.shards import Corpus, Shard
from mm_gpt.datasets.loading.pieces import (
    COLUMNS,
    fingerprint,
    load_table,
    make_table,
    piece_document,
    row_piece,
    save_table,
)
from mm_gpt.datasets.loading.plan import Cursor, Plan, Row, shuffled
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, Sample
from mm_gpt.document import Document
from mm_gpt.errors import MMGPTError
from mm_gpt.processor import Batch, Processor

logger = logging.getLogger(__name__)


class CorpusSource:
    """The pieces of a corpus of web documents or conversations, in shuffled blocks of shards.

    In memory are the tables of one block at a time. Passes differ in the order of shards and of pieces.
    """

    def __init__(
        self,
        corpus: Corpus,
        processor: Processor,
        *,
        max_tokens: int,
        errors: ErrorCounter,
        name: str = "",
        block_shards: int = 8,
        every: tuple[int, int] | None = None,
    ):
        """`every`: (k, n) takes each k-th sample in n for itself, (-k, n) all but those: a holdout.

        Raises MMGPTError when no shard holds anything to train on.
        """
        self.corpus, self.processor, self.errors = corpus, processor, errors
        self.max_tokens, self.block_shards, self.every = max_tokens, block_shards, every
        self.name = name or corpus.location
        self._folder = corpus.cache_folder() / fingerprint(processor, max_tokens)
        self.counts: list[int] = []
        self.tokens = 0.0
        self.images = 0
        for shard in range(len(corpus.shards)):
            table = self._table(shard)
            self.counts.append(len(table))
            self.tokens += float(table[:, 5].sum())
            self.images += int(table[:, 6].sum())
        self._last: tuple[tuple[int, int], Sample] | None = None
        self.digest = hashlib.sha256("".join(shard.digest for shard in corpus.shards).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(self.counts)

    def _table(self, shard: int) -> np.ndarray:
        """The shard's pieces; found now if nobody has yet. A shard that cannot be read is counted, and has none."""
        info = self.corpus.shards[shard]
        path = self._folder / f"{info.name}{info.digest and '.'}{info.digest}.npy"
        table = load_table(path)
        if table is None:
            try:
                samples = self._samples(self.corpus.shard(shard))
            except MMGPTError as error:
                self.errors.add("missing shard", str(error))
                return np.zeros((0, len(COLUMNS)), dtype=np.int32)
            table = make_table(samples, self.processor, self.max_tokens, self.errors, info.name)
            try:
                save_table(path, table)
            except OSError as error:
                raise MMGPTError(f"{path}: {error.strerror or error}") from None
        if self.every is not None:
            which, count = self.every
            held = table[:, 0] % count == abs(which) % count
            table = table[held if which >= 0 else ~held]
        return table

    def _samples(self, shard: Shard) -> Iterator[tuple[int, Sample]]:
        for number in range(len(shard)):
            try:
                yield number, shard.sample(number)
            except BadRecordError as error:
                self.errors.add(str(error), f"{shard.path.name}:{number}")

    def units(self, number: int, start: int, seed: int) -> Iterator[list[tuple[tuple[int, ...], int]]]:
        """See `Source`. Raises MMGPTError when a shard has other pieces than at the start of the run."""
        order = shuffled(len(self.counts), seed, self.name, number, "shards")
        for block in range(0, len(order), self.block_shards):
            shards = [shard for shard in order[block : block + self.block_shards] if self.counts[shard]]
            size = sum(self.counts[shard] for shard in shards)
            if start >= size:
                start -= size
                continue
            tables = [self._table(shard) for shard in shards]
            for shard, table in zip(shards, tables, strict=True):
                if len(table) != self.counts[shard]:
                    raise MMGPTError(f"{self.corpus.location}: {self.corpus.shards[shard].name} has changed")
            pieces = np.concatenate(tables)
            of_shard = np.repeat(shards, [len(table) for table in tables])
            for place in shuffled(size, seed, self.name, number, block)[start:]:
                sample, *span = (int(value) for value in pieces[place][:5])
                yield [((int(of_shard[place]), sample, *span), int(pieces[place, 5]))]
            start = 0

    def document(self, unit: tuple[int, ...]) -> Document:
        """Raises BadRecordError or MMGPTError when the sample cannot be read."""
        shard, number, *span = unit
        last = self._last
        if last is None or last[0] != (shard, number):
            self._last = last = (shard, number), self.corpus.shard(shard).sample(number)
        return piece_document(last[1], row_piece(np.array([number, *span, 0, 0])), self.processor)


@dataclass
class Loaded:
    """A micro-batch, and what was skipped while it was read."""

    batch: Batch
    skipped: list[tuple[str, str]]


class _Rows(Dataset[Loaded]):
    """What a worker runs: a list of numbered rows to a micro-batch."""

    def __init__(self, load: Callable[[Sequence[tuple[int, Row]]], Loaded]):
        self.load = load

    def __getitem__(self, rows: Sequence[tuple[int, Row]]) -> Loaded:
        return self.load(rows)


class Loader:
    """The micro-batches of one rank, in order, prefetched by worker processes."""

    def __init__(
        self,
        plan: Plan,
        load: Callable[[Sequence[tuple[int, Row]]], Loaded],
        *,
        rows: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        errors: ErrorCounter | None = None,
    ):
        """`load` gets (number of the row, row) pairs. `rows` of them are a micro-batch."""
        self.plan, self.load, self.num_rows, self.accumulate = plan, load, rows, accumulate
        self.rank, self.world, self.workers = rank, world, workers
        self.errors = errors if errors is not None else ErrorCounter()
        self._base = (0, 0)  # (step, its first row)
        self._cursors: list[Cursor] = [plan.start()]
        self._next = -1
        self._stream: Iterator[Loaded] | None = None

    @property
    def step_rows(self) -> int:
        """Rows of all ranks in a step."""
        return self.num_rows * self.accumulate * self.world

    def first_row(self, step: int) -> int:
        base_step, base_row = self._base
        return base_row + (step - base_step) * self.step_rows

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step. Steps in a row are fast; another one starts the workers anew."""
        if step != self._next or self._stream is None:
            self._stream = self._start(step)
        try:
            loaded = [next(self._stream) for _ in range(self.accumulate)]
        except BaseException as error:
            self._stream = None
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # killed, or out of memory
                raise MMGPTError(f"a process that reads the data has died ({error})") from None
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

    def _start(self, step: int) -> Iterator[Loaded]:
        self.close()  # or the new workers would hold what the old ones wait for
        first = self.first_row(step)
        behind = [cursor for cursor in self._cursors if cursor.row <= first]
        cursor = behind[-1] if behind else self.plan.start()
        self._cursors = [cursor]
        data = DataLoader(
            _Rows(self.load),
            batch_size=None,
            sampler=self._keys(cursor, first),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_quiet_worker,
            prefetch_factor=max(2, self.accumulate) if self.workers else None,
            generator=torch.Generator(),  # or it draws a number that dropout would have had
        )
        return iter(data)

    def _keys(self, cursor: Cursor, first: int) -> "_Keys":
        return _Keys(functools.partial(self._iterate, cursor, first))

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


class _Keys:
    """A sampler for DataLoader: iterated once."""

    def __init__(self, make: Callable[[], Iterator[list[tuple[int, Row]]]]):
        self._make = make

    def __iter__(self) -> Iterator[list[tuple[int, Row]]]:
        return self._make()


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _quiet_worker(number: int) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
