"""What a run is trained on: the sources of a mixture, each a list of units in an order of its own for each pass."""

import hashlib
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.building.shards import ShardFolder
from mm_gpt.datasets.loading.draws import RecordSampling, choose, draw_documents
from mm_gpt.datasets.loading.holdout import held_out
from mm_gpt.datasets.loading.index import Measure, Table, index_tables
from mm_gpt.datasets.loading.pieces import Piece, piece_document
from mm_gpt.datasets.loading.plan import shuffled
from mm_gpt.datasets.loading.store import open_store
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, Record, Sample
from mm_gpt.datasets.sources import FORMATS
from mm_gpt.document import Document
from mm_gpt.errors import ConfigError, unknown_name

logger = logging.getLogger(__name__)

Unit = tuple[int, ...]
"""(sample, start_segment, start_char, end_segment, end_char) of a piece; (sample, pass, document) of a record."""
BLOCK_SHARDS = 8
"""Shards whose units are shuffled together: neighbours in a row are read from few files."""
CHUNK = 1024
ESTIMATE = 4096
"""Records that are drawn to estimate what a pass takes."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str
    """A corpus folder, a tar, a folder of tars or of captioned images, texts, chats, or any other format of
    `mm_gpt.datasets.sources`; relative to the data folder. Or a URL."""
    repeat: float = 1.0
    """How many times an epoch; 0.5 is half of it, another half each time."""
    weight: float | None = None
    """Relative share of the tokens while the source lasts; None: by its size, so that it lasts the epoch."""
    derived_share: float = 0.0
    """The share of captioned photos that also come with questions derived by rules from their captions."""
    format: str = "auto"
    """One of `mm_gpt.datasets.sources.FORMATS`; `auto` tells by the files."""
    images: str | None = None
    """The folder or URL that image names are relative to, where a format names files."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path is empty: a source is a file, a folder or a URL")
        if not (self.repeat >= 0 and math.isfinite(self.repeat)):
            raise ConfigError(f"{self.path}: repeat must be 0 or more, not {self.repeat}")
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(f"{self.path}: weight must be above 0, not {self.weight}")
        if not 0 <= self.derived_share <= 1:
            raise ConfigError(f"{self.path}: derived_share must be from 0 to 1, not {self.derived_share}")
        if self.format != "auto" and self.format not in FORMATS:
            raise ConfigError(unknown_name("format", self.format, ["auto", *FORMATS]))

    def location(self, folder: Path) -> str:
        """The path or URL of the source."""
        if "://" in self.path:
            return self.path
        return str(folder / self.path)

    def label(self, folder: Path) -> str:
        """What people call the source: "." has the name of its folder."""
        return self.path if self.path != "." else folder.resolve().name

    def open(self, folder: Path, errors: ErrorCounter) -> ShardFolder:
        """Raises MMGPTError when there is no such source, or it is of no known format."""
        return open_store(self.location(folder), errors, format=self.format, images=self.images)


class IndexedSource:
    """A source of a plan: units by number, and their samples where they are needed.

    Planning needs the tables alone, reading everything but the tables: a copy in another process has none.
    """

    def __init__(
        self,
        name: str,
        store: ShardFolder,
        tables: Sequence[Table],
        measure: Measure,
        sampling: RecordSampling,
        *,
        seed: int = 0,
        errors: ErrorCounter | None = None,
    ):
        self.name, self.store, self.measure, self.sampling, self.seed = name, store, measure, sampling, seed
        self.tables: Sequence[Table] = tables
        self.errors = errors if errors is not None else ErrorCounter()
        sizes = [shard.samples for shard in store.shards]
        self._starts: list[int] = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
        self.digest = hashlib.sha256("".join(shard.digest for shard in store.shards).encode()).hexdigest()[:16]
        self.images = sum(int(table.pieces[:, 6].sum()) + len(table.records) for table in tables)
        self.tokens = self._count_tokens()
        self._last: tuple[int, Sample] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tables": (), "errors": ErrorCounter(), "_last": None}

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def split(self, share: float) -> "tuple[IndexedSource, IndexedSource]":
        """What is trained on, and the held-out `share` of the samples, whose images are not augmented.

        Of a source with few samples, such as a book, it is that share of the units.
        """
        parts: list[list[Table]] = [[], []]
        few = self._starts[-1] * min(share, 1 - share) < 1
        first = 0
        for start, table in zip(self._starts, self.tables, strict=False):
            held = held_out(np.arange(first, first + len(table)) if few else start + table.samples, share)
            first += len(table)
            parts[0].append(table.only(~held))
            parts[1].append(table.only(held))
        return self._of(parts[0], self.sampling), self._of(parts[1], self.sampling).plain()

    def plain(self) -> "IndexedSource":
        """Without augmentation."""
        own = vars(self.sampling) | {"augment": False}
        return self._of(self.tables, RecordSampling(**own))

    def _of(self, tables: Sequence[Table], sampling: RecordSampling) -> "IndexedSource":
        settings = {"seed": self.seed, "errors": self.errors}
        return IndexedSource(self.name, self.store, tables, self.measure, sampling, **settings)  # type: ignore[arg-type]

    # ---- planning ----

    def units(self, number: int, start: int, seed: int) -> Iterator[list[tuple[Unit, int]]]:
        """See `plan.Source`."""
        counts = list(map(len, self.tables))
        order = shuffled(len(counts), seed, self.name, number, "shards")
        for block in range(0, len(order), BLOCK_SHARDS):
            shards = [shard for shard in order[block : block + BLOCK_SHARDS] if counts[shard]]
            size = sum(counts[shard] for shard in shards)
            if start >= size:
                start -= size
                continue
            ends = np.cumsum([counts[shard] for shard in shards])
            places = np.array(shuffled(size, seed, self.name, number, block)[start:])
            for at in range(0, len(places), CHUNK):
                chunk = places[at : at + CHUNK]
                which = np.searchsorted(ends, chunk, side="right")
                rows = chunk - ends[which] + np.array(counts)[np.array(shards)[which]]
                for own, row in zip(which.tolist(), rows.tolist(), strict=True):
                    yield self._unit(shards[own], row, number)
            start = 0

    def _unit(self, shard: int, row: int, number: int) -> list[tuple[Unit, int]]:
        table, first = self.tables[shard], self._starts[shard]
        if row < len(table.pieces):
            sample, *span, tokens, _ = table.pieces[row].tolist()
            return [((first + sample, *span), tokens)]
        record = table.records[row - len(table.pieces)].tolist()
        sample = first + record[0]
        found: list[tuple[Unit, int]] = []
        for part, tokens in enumerate(self._lengths(table, record, sample, number)):
            if tokens <= self.measure.processor.config.max_length:
                found.append(((sample, number, part), tokens))
            elif number == 0:
                self.errors.add("longer than the context", f"{self.name}:{sample}")
        return found

    def _lengths(self, table: Table, record: list[int], sample: int, number: int) -> list[int]:
        """Tokens of each document that pass `number` draws from a record."""
        measure, how = self.measure, self.sampling
        _, image, _, _, first, num_captions, num_questions, *num_derived = record
        used = number % len(num_derived)
        drawn = choose(
            self._rng(number, sample), num_captions, num_questions, num_derived[used] if how.derived_share else 0, how
        )
        texts = table.texts[first : first + num_captions + num_questions + sum(num_derived)].tolist()
        behind = sum(num_derived[:used])  # the sets before this one
        captions = [texts[n] for n in drawn.captions]
        questions = [texts[num_captions + n + (behind if n >= num_questions else 0)] for n in drawn.questions]
        heads = (measure.caption_heads[drawn.prompt] + image, measure.question_head + image)
        if how.separate:
            parts = zip(heads, (captions, questions), strict=True)
            return [head + own + measure.tail for head, owns in parts for own in owns]
        return [head + sum(owns) for head, owns in zip(heads, (captions, questions), strict=True) if owns]

    def _rng(self, number: int, sample: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.name}/{number}/{sample}")

    def _count_tokens(self) -> float:
        """Tokens of a pass: counted for pieces, estimated for records."""
        total = float(sum(int(table.pieces[:, 5].sum()) for table in self.tables))
        num_records = sum(len(table.records) for table in self.tables)
        stride = max(1, num_records // ESTIMATE)
        drawn, at = [], 0
        for first, table in zip(self._starts, self.tables, strict=False):
            for row in range(-at % stride, len(table.records), stride):
                record = table.records[row].tolist()
                lengths = self._lengths(table, record, first + record[0], 0)
                drawn.append(sum(t for t in lengths if t <= self.measure.processor.config.max_length))
            at += len(table.records)
        return total + (sum(drawn) / len(drawn) * num_records if drawn else 0.0)

    # ---- reading ----

    def sample(self, number: int) -> Sample:
        """Raises BadRecordError or MMGPTError when it cannot be read."""
        if self._last is None or self._last[0] != number:
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            if not 0 <= shard < len(self.store.shards):
                raise BadRecordError("no such sample")
            self._last = number, self.store.shard(shard).sample(number - self._starts[shard])
        return self._last[1]

    def document(self, unit: Unit) -> Document:
        """Raises BadRecordError or MMGPTError when it cannot be read."""
        number, *rest = unit
        sample = self.sample(number)
        processor = self.measure.processor
        if isinstance(sample, Record):
            pass_number, part = rest
            rng = self._rng(pass_number, number)
            documents = draw_documents(sample, rng, pass_number, processor, self.sampling)
            if part >= len(documents):
                raise BadRecordError("not the sample that was indexed")
            return documents[part]
        first, first_char, last, last_char = rest
        return piece_document(sample, Piece((first, first_char), (last, last_char)), processor)

    def some(self, count: int) -> list[tuple[Unit, int]]:
        """Up to `count` units with their tokens, evenly from all, the same each time, with every document of each."""
        size = len(self)
        ends = np.cumsum(list(map(len, self.tables)))
        found: list[tuple[Unit, int]] = []
        for n in range(min(count, size)):
            place = n * size // min(count, size)
            shard = int(np.searchsorted(ends, place, side="right"))
            row = place - int(ends[shard]) + len(self.tables[shard])
            found += self._unit(shard, row, 0)
        return found


class StoredRecords(Sequence[Record]):
    """The captioned images of several stores, read one at a time.

    Raises BadRecordError or MMGPTError for one that cannot be read.
    """

    def __init__(self, stores: Sequence[ShardFolder], tables: Sequence[Sequence[Table]]):
        self._stores = stores
        places = [
            np.stack([np.full(len(table.records), n), np.full(len(table.records), shard), table.records[:, 0]])
            for n, of_store in enumerate(tables)
            for shard, table in enumerate(of_store)
        ]
        self._places = np.concatenate([np.zeros((3, 0), dtype=np.int64), *places], axis=1).T  # (N, 3)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        store, shard, number = (int(value) for value in self._places[place])
        record = self._stores[store].shard(shard).sample(number)
        if not isinstance(record, Record):
            raise BadRecordError("not the sample that was indexed")
        return record


def open_sources(
    configs: Sequence[SourceConfig],
    stores: Sequence[ShardFolder],
    measure: Measure,
    sampling: RecordSampling = RecordSampling(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    folder: Path = Path(),
    errors: ErrorCounter,
) -> list[IndexedSource]:
    """The sources of a mixture below `folder`, indexed. Raises MMGPTError when an index cannot be made or kept."""
    found = []
    for config, store in zip(configs, stores, strict=True):
        name = config.path
        own = Measure(measure.processor, measure.max_tokens, sampling.max_questions if config.derived_share else 0)
        how = RecordSampling(**(vars(sampling) | {"derived_share": config.derived_share}))
        tables = index_tables(store, own, config.label(folder), errors)
        source = IndexedSource(name, store, tables, own, how, seed=seed, errors=errors)
        about = (config.label(folder), len(source), source.tokens, source.images)
        logger.info("%s: %d units, about %.0f tokens, %d images", *about)
        found.append(source)
    return found
