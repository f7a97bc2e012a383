"""The order of training: which documents, in which rows, from which sources, as a pure function of the seed.

A source is an endless stream of passes over its units (pieces of documents, or records), each in an order of its own:
blocks of shards are shuffled, then the units of a block. A mixture takes units so that each source's share of the
tokens follows its weight. A window of units is packed into rows, first-fit decreasing, and its rows are shuffled. So
row n of a run follows from the seed and the sources alone: not from the number of workers or ranks, nor from what was
read before a stop. Where a window starts is a few numbers (`Cursor`), which a checkpoint keeps.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mm_gpt.datasets.loading.packing import pack
from mm_gpt.errors import ConfigError, MMGPTError


@dataclass(frozen=True)
class Item:
    """One document of a row: what the source needs to load it, and what it takes."""

    source: int
    unit: tuple[int, ...]
    tokens: int


Row = tuple[Item, ...]


class Source(Protocol):
    """A source of training documents with an order for each pass."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int:
        """Units in a pass."""

    @property
    def tokens(self) -> float:
        """Tokens in a pass, counted or estimated: the same number each time."""

    def units(self, number: int, start: int, seed: int) -> Iterator[list[tuple[tuple[int, ...], int]]]:
        """The units of pass `number` from its `start`-th on, in that pass's order: (unit, tokens) of each document.

        A unit may be no document at all (an empty list), and must come all the same: positions count units.
        """


@dataclass(frozen=True)
class SourceWeight:
    """How a source takes part in a mixture."""

    repeat: float = 1.0
    """Passes in an epoch; 0.5: half of it, the other half in the next."""
    weight: float | None = None
    """Relative share of the tokens while the source lasts; None: by its size, so that it lasts the epoch."""


def language_shares(counts: Sequence[float], alpha: float) -> list[float]:
    """XLM's sampling: q_i in proportion to p_i^alpha, summing to 1 (1901.07291). alpha 1: by size; 0: all alike."""
    total = sum(counts)
    powers = [(count / total) ** alpha if count else 0.0 for count in counts]
    return [power / sum(powers) for power in powers]


@dataclass
class Cursor:
    """Where a window starts."""

    row: int = 0
    """Rows of all windows before."""
    window: int = 0
    epoch: int = 0
    positions: list[int] = field(default_factory=list)
    """Units taken of each source since the start of the run."""
    served: list[float] = field(default_factory=list)
    """Tokens taken of each source in this epoch."""

    def copy(self) -> "Cursor":
        return Cursor(self.row, self.window, self.epoch, list(self.positions), list(self.served))


class Plan:
    """The rows of a mixture of sources, endless."""

    def __init__(
        self,
        sources: Sequence[Source],
        shares: Sequence[SourceWeight] | None = None,
        *,
        row_length: int,
        seed: int = 0,
        window_rows: int = 256,
        exponent: float | None = None,
        wait: bool = True,
    ):
        """`window_rows`: about how many rows are packed and shuffled at a time. `exponent`: XLM's, over the sources'
        tokens; takes the place of weights. `wait`: a source that has run out waits for the end of the epoch; without
        it, it begins its next pass at once, and repeats while larger ones still have news: shares hold to the end.

        Raises ConfigError for impossible settings, MMGPTError when the sources hold nothing.
        """
        for setting, value in (("row_length", row_length), ("window_rows", window_rows)):
            if value < 1:
                raise ConfigError(f"{setting} must be at least 1, not {value}")
        self.sources, self.row_length, self.seed, self.window_rows = list(sources), row_length, seed, window_rows
        self.shares = list(shares or [SourceWeight() for _ in sources])
        self.wait = wait
        for source, share in zip(self.sources, self.shares, strict=True):
            if not (share.repeat >= 0 and math.isfinite(share.repeat)):
                raise ConfigError(f"{source.name}: repeat must be 0 or more, not {share.repeat}")
            if share.weight is not None and not (share.weight > 0 and math.isfinite(share.weight)):
                raise ConfigError(f"{source.name}: weight must be above 0, not {share.weight}")
        # What is thought to hold no token is asked for all the same: that may be an estimate, and is to be counted.
        tokens = [max(source.tokens, 1.0) if len(source) else 0.0 for source in self.sources]
        sizes = [size * share.repeat for size, share in zip(tokens, self.shares, strict=True)]
        if not any(sizes):
            raise MMGPTError("the sources hold nothing to train on")
        if exponent is not None:
            if any(share.weight is not None for share in self.shares):
                raise ConfigError("give weights or an exponent, not both")
            weights = language_shares(sizes, exponent)
        elif any(share.weight is not None for share in self.shares):
            # What has no weight of its own is weighed by its size, in the unit of those that have one.
            weights = [
                share.weight if share.weight is not None else size / sum(sizes)
                for share, size in zip(self.shares, sizes, strict=True)
            ]
        else:
            weights = sizes
        self.weights = [weight if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]

    def start(self) -> Cursor:
        return Cursor(positions=[0] * len(self.sources), served=[0.0] * len(self.sources))

    def epoch_units(self, source: int, epoch: int) -> int:
        """Units of a source that all epochs up to and with `epoch` hold."""
        return round(self.shares[source].repeat * len(self.sources[source]) * (epoch + 1))

    def rows(self, cursor: Cursor | None = None) -> Iterator[tuple[Row, Cursor]]:
        """Each row with the cursor of its window; from that cursor's first row on."""
        cursor = (cursor or self.start()).copy()
        streams = [self._stream(number, position) for number, position in enumerate(cursor.positions)]
        idle = 0  # epochs in a row without a document: of a small source with a small share, many have no unit
        wanted = [self.shares[n].repeat * len(self.sources[n]) for n, weight in enumerate(self.weights) if weight]
        patience = 1 + math.ceil(1 / max(wanted))
        while True:
            begin = cursor.copy()
            items = self._window(cursor, streams)
            idle = 0 if items else idle + (cursor.epoch > begin.epoch)
            if idle > patience:
                raise MMGPTError("the sources hold nothing to train on")
            rows = self._pack(items)
            random.Random(f"{self.seed}/rows/{begin.window}").shuffle(rows)
            cursor.row += len(rows)
            cursor.window += 1
            for row in rows:
                yield row, begin

    def _window(self, cursor: Cursor, streams: Sequence[Iterator[list[tuple[tuple[int, ...], int]]]]) -> list[Item]:
        """Draw units until their tokens fill the window or the epoch ends, whose end it is then."""
        items: list[Item] = []
        tokens, drawn = 0, 0
        limit = self.window_rows * self.row_length
        units = sum(len(source) for source, weight in zip(self.sources, self.weights, strict=True) if weight)
        while tokens < limit:
            ready = [
                number
                for number, weight in enumerate(self.weights)
                if weight and (not self.wait or cursor.positions[number] < self.epoch_units(number, cursor.epoch))
            ]
            if not ready:
                cursor.epoch += 1
                cursor.served = [0.0] * len(self.sources)
                break
            number = min(ready, key=lambda n: (cursor.served[n] / self.weights[n], n))
            documents = next(streams[number])
            cursor.positions[number] += 1
            used = sum(length for _, length in documents)
            # A unit without a document counts as something, or a source of nothing but those would never let go.
            cursor.served[number] += used or 1
            tokens, drawn = tokens + used, drawn + 1
            if tokens == 0 and drawn > 2 * units:
                raise MMGPTError("the sources hold nothing to train on")
            items += [Item(number, unit, length) for unit, length in documents]
        return items

    def _stream(self, number: int, position: int) -> Iterator[list[tuple[tuple[int, ...], int]]]:
        source = self.sources[number]
        size = len(source)
        while size:
            yield from source.units(position // size, position % size, self.seed)
            position += size - position % size

    def _pack(self, items: Sequence[Item]) -> list[Row]:
        fits = [item for item in items if item.tokens <= self.row_length]
        longer = [(item,) for item in items if item.tokens > self.row_length]  # some models' images alone are
        packed = pack([item.tokens for item in fits], self.row_length, window=max(1, len(fits)))
        return [*longer, *(tuple(fits[i] for i in row) for row in packed)]


def shuffled(count: int, *key: Any) -> list[int]:
    """0 ... count-1 in an order that follows from `key`."""
    order = list(range(count))
    random.Random("/".join(map(str, key))).shuffle(order)
    return order
