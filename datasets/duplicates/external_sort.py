"""Sorting more rows of 64-bit numbers than fit into memory: sorted runs on disk, merged in blocks."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

COPIES = 6
"""How often the rows of a run are in memory while they are sorted: the parts, the whole, the order, the result."""
MIN_ROWS = 256
"""Least rows of a run, or of a run's buffer, however little memory there is."""


class Sorter:
    """Takes rows of `columns` 64-bit numbers and gives them back in lexical order, using about `memory` bytes."""

    def __init__(self, folder: Path, columns: int, memory: int) -> None:
        self._folder, self._columns, self._memory = folder, columns, memory
        self._run_rows = max(MIN_ROWS, memory // (8 * columns * COPIES))
        self._parts: list[U64] = []
        self._num_rows = 0
        self._runs: list[BinaryIO] = []

    def add(self, rows: U64) -> None:
        """Take (n, columns) rows, which are copied."""
        for start in range(0, len(rows), self._run_rows):
            part = rows[start : start + self._run_rows]
            if self._num_rows + len(part) > self._run_rows:
                self._spill()
            self._parts.append(part.copy())
            self._num_rows += len(part)

    def read(self) -> Iterator[U64]:
        """All rows in order, as blocks of (n, columns). May be read again from the start, one reader at a time."""
        if not self._runs:
            self._parts = [sort_rows(self._joined())]
            step = max(MIN_ROWS, self._run_rows // COPIES)
            yield from (self._parts[0][start : start + step] for start in range(0, self._num_rows, step))
            return
        self._spill()
        buffer_rows = max(MIN_ROWS, self._memory // (8 * self._columns * COPIES * len(self._runs)))
        for run in self._runs:
            run.seek(0)
        buffers = [self._next(run, buffer_rows) for run in self._runs]
        while any(len(buffer) for buffer in buffers):
            # What is up to the least last row of the buffers can be followed by no lesser row.
            bound = min(tuple(buffer[-1]) for buffer in buffers if len(buffer))
            pieces = []
            for index, (run, buffer) in enumerate(zip(self._runs, buffers, strict=True)):
                count = _count_up_to(buffer, bound)
                pieces.append(buffer[:count])
                exhausted = count == len(buffer) and count > 0
                buffers[index] = self._next(run, buffer_rows) if exhausted else buffer[count:]
            yield sort_rows(np.concatenate(pieces))

    def close(self) -> None:
        """Free memory and disk."""
        for run in self._runs:
            run.close()
        self._runs, self._parts, self._num_rows = [], [], 0

    def _joined(self) -> U64:
        return np.concatenate(self._parts) if self._parts else np.empty((0, self._columns), dtype=np.uint64)

    def _spill(self) -> None:
        if not self._num_rows:
            return
        run: BinaryIO = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        rows = self._joined()
        self._parts, self._num_rows = [], 0
        sort_rows(rows).tofile(run)
        self._runs.append(run)

    def _next(self, run: BinaryIO, num_rows: int) -> U64:
        data = run.read(num_rows * self._columns * 8)
        return np.frombuffer(data, dtype=np.uint64).reshape(-1, self._columns)


def sort_rows(rows: U64) -> U64:
    """The rows in lexical order."""
    if len(rows) < 2:
        return rows
    order = np.argsort(rows[:, 0])
    first = rows[order, 0]
    same = first[1:] == first[:-1]
    if same.any():  # a full sort only where the first column does not decide
        tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
        part = order[tied]
        order[tied] = part[np.lexsort(rows[part].T[::-1])]
    return np.ascontiguousarray(rows[order])


def _count_up_to(rows: U64, bound: tuple[np.uint64, ...]) -> int:
    """How many of the sorted rows are not greater than `bound`."""
    low, high = 0, len(rows)
    for column, value in enumerate(bound):
        part = rows[low:high, column]
        left, right = np.searchsorted(part, value, "left"), np.searchsorted(part, value, "right")
        low, high = low + int(left), low + int(right)
    return high
