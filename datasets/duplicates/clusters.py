"""Clusters of what is the same, found without comparing everything with everything: union-find, and pairs to compare.

Both work on whole arrays. What is kept per item lies in memory while it is small and in files of the scratch folder
when it is not.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_gpt.datasets.duplicates.external_sort import U64

Index = NDArray[np.int64]


def make_array(size: int, dtype: Any, folder: Path, memory: int) -> NDArray[Any]:
    """Zeros: in memory when they take at most `memory` bytes, otherwise a file that goes when nothing uses it."""
    dtype = np.dtype(dtype)
    if size * dtype.itemsize <= memory:
        return np.zeros(size, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size * dtype.itemsize)
        return np.memmap(file, dtype=dtype, mode="r+", shape=(size,))


class Clusters:
    """Union-find over the numbers 0 to `size` - 1, with arrays of links at once. The root is the least of a cluster."""

    def __init__(self, size: int, folder: Path, memory: int) -> None:
        dtype = np.int32 if size < 2**31 else np.int64
        self._parent = make_array(size, dtype, folder, memory)
        for start in range(0, size, 1 << 20):
            end = min(size, start + (1 << 20))
            self._parent[start:end] = np.arange(start, end)

    def roots(self, items: Index) -> Index:
        """The root of each item's cluster."""
        found = self._parent[items]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[items] = found
        return np.asarray(found, dtype=np.int64)

    def link(self, first: Index, second: Index) -> None:
        """Unite each item of `first` with its partner in `second`."""
        while len(first):
            first, second = self.roots(first), self.roots(second)
            apart = first != second
            low, high = np.minimum(first, second)[apart], np.maximum(first, second)[apart]
            np.minimum.at(self._parent, high, low.astype(self._parent.dtype))
            first, second = low, high  # of several links of one root only the least was made: again


@dataclass(frozen=True)
class Bucket:
    """A block of rows that are sorted by bucket, without those that are alone in theirs."""

    rows: U64
    """(n, columns); the first column is the bucket."""
    num_old: int
    """The first so many were in the last block as well: not to be paired with one another again."""

    def pairs(self, window: int) -> Iterator[tuple[Index, Index]]:
        """Places (earlier, later) of pairs in one bucket at most `window` apart, nearest first.

        So every pair of a bucket of up to `window` + 1 rows, and never more than `window` per row.
        """
        keys = self.rows[:, 0]
        for shift in range(1, min(window, len(keys) - 1) + 1):
            later = np.arange(max(shift, self.num_old), len(keys))
            later = later[keys[later] == keys[later - shift]]
            if not len(later):
                return  # no bucket has more rows than this
            yield later - shift, later


def shared_buckets(blocks: Iterator[U64], window: int, max_rows: int) -> Iterator[Bucket]:
    """The rows of sorted `blocks` that share their first column with others, about `max_rows` at a time.

    Buckets go on over the end of a block: its last `window` rows come again with the next.
    """
    old: U64 | None = None
    for block in _cut(blocks, max_rows):
        num_old = 0
        if old is not None:
            old = old[old[:, 0] == block[0, 0]]  # other buckets are over
            num_old = len(old)
            block = np.concatenate([old, block])
        same = block[1:, 0] == block[:-1, 0]
        shared = np.append(same, False) | np.insert(same, 0, False)
        old = block[-window:]
        if shared.any():
            # Old rows share the first new row's bucket: the shared ones among them stay in front.
            yield Bucket(block[shared], int(np.count_nonzero(shared[:num_old])))


def _cut(blocks: Iterator[U64], max_rows: int) -> Iterator[U64]:
    for block in blocks:
        for start in range(0, len(block), max_rows):
            yield block[start : start + max_rows]
