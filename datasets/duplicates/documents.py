"""Duplicates over a whole corpus: the same documents and nearly the same ones, whatever the corpus's size.

First each process turns its part of the corpus into fingerprints (`duplicates.fingerprints`). Then `find_duplicates`
looks at all of them:

1. Documents with equal words and images are linked, and so are those with equal MinHash signatures.
2. Of each signature the first document goes on. For each band, documents are sorted by the band's hash; in each bucket
   neighbours are compared by their whole signatures, and linked from the threshold on. A document has at most `window`
   neighbours, so that time grows with documents, not with pairs.
3. Of each cluster of linked documents one is kept.

Sorting is external and reading goes block by block: memory stays near the given limit. The result depends on the
documents alone: not on their order, how they were split, or how many processes there were.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mm_gpt.datasets.duplicates.clusters import Clusters, Index, make_array, shared_buckets
from mm_gpt.datasets.duplicates.external_sort import U64, Sorter
from mm_gpt.datasets.duplicates.fingerprints import Fingerprints, Rows
from mm_gpt.datasets.duplicates.minhash import MinHash, agreement, hash_rows
from mm_gpt.errors import ConfigError

Keep = Literal["first", "longest", "best"]

EXACT = "duplicate"
NEAR = "near duplicate"
WINDOW = 32
"""Neighbours in a bucket that a document is compared with. Buckets up to this size are compared completely."""
MIN_MEMORY = 1 << 24


@dataclass(frozen=True)
class Duplicate:
    """A document to drop, and the document that stays in its place."""

    document: str
    partition: str
    row: int
    """Which document of its partition it is. Where two documents have the same id, this tells them apart."""
    reason: str
    """`duplicate` (equal words and images) or `near duplicate`."""
    duplicate_of: str


def find_duplicates(
    partitions: Sequence[Path | str],
    *,
    keep: Keep = "first",
    near: bool = True,
    minhash: MinHash | None = None,
    window: int = WINDOW,
    memory: int = 1 << 30,
    scratch: Path | str | None = None,
) -> Iterator[Duplicate]:
    """The documents to drop, in the order of partitions' names and rows.

    Of duplicates stays the `first` by id (a string), the `longest` in words, or the `best` by the score that was given
    with the fingerprints; of equal ones the first. `near=False` finds exact duplicates only; `minhash` sets another
    threshold or other bands than the fingerprints were made with.

    Memory is `memory` bytes besides the interpreter's; disk in `scratch` (default: the system's temporary folder) is
    about 8 bytes per document and band and 200 per document. Raises MMGPTError for partitions that are not finished
    or do not fit together.
    """
    if keep not in ("first", "longest", "best"):
        raise ConfigError(f"keep is {keep!r}; it is one of first, longest, best")
    if window < 1:
        raise ConfigError(f"window is {window}; it must be at least 1")
    if memory < MIN_MEMORY:
        raise ConfigError(f"memory is {memory} bytes; it must be at least {MIN_MEMORY}")
    return _find(Fingerprints(partitions, minhash), keep, near, window, memory, scratch)


def _find(
    prints: Fingerprints,
    keep: Keep,
    near: bool,
    window: int,
    memory: int,
    scratch: Path | str | None,
) -> Iterator[Duplicate]:
    with tempfile.TemporaryDirectory(dir=scratch, prefix="duplicates-") as name:
        folder = Path(name)
        clusters = Clusters(len(prints), folder, memory // 8)
        columns = _link_equal(prints, clusters, near, folder, memory)
        if near:
            for band in range(prints.minhash.shape[0]):
                _link_band(prints, clusters, columns, band, window, folder, memory)
        yield from _drop(prints, clusters, keep, folder, memory)


def _block_rows(prints: Fingerprints, memory: int) -> int:
    """Rows of which a block takes about an eighth of `memory`, with what is computed from it."""
    return max(64, memory // (8 * 4 * prints.dtype.itemsize))


# ---- equal documents ----


@dataclass(frozen=True)
class _Columns:
    """What the bands need of each document, one file of numbers each."""

    folder: Path
    takes_part: NDArray[np.bool_]
    """(documents,): the first of its signature, and long enough."""

    def write(self, name: str, values: U64) -> None:
        with open(self.folder / name, "ab") as file:
            file.write(np.ascontiguousarray(values).tobytes())

    def read(self, names: Sequence[str], num_rows: int) -> Iterator[tuple[int, U64]]:
        """(number of the first row, (n, names)) blocks."""
        for start in range(0, len(self.takes_part), num_rows):
            yield (
                start,
                np.stack([np.fromfile(self.folder / name, np.uint64, num_rows, offset=8 * start) for name in names], 1),
            )


def _link_equal(prints: Fingerprints, clusters: Clusters, near: bool, folder: Path, memory: int) -> _Columns:
    """Link equal contents and equal signatures; write what the bands need."""
    columns = _Columns(folder, make_array(len(prints), np.bool_, folder, memory // 16))
    exact, signatures = Sorter(folder, 3, memory // 4), Sorter(folder, 3, memory // 4)
    with closing(exact), closing(signatures):
        for start, block in prints.blocks(_block_rows(prints, memory)):
            rows = np.arange(start, start + len(block), dtype=np.uint64)
            exact.add(np.column_stack([block["exact"], rows]))
            if not near:
                continue
            long = block["num_words"] >= prints.minhash.min_words
            whole = hash_rows(block["signature"])
            signatures.add(np.column_stack([whole, block["id_hash"], rows])[long])
            columns.write("id_hash", block["id_hash"])
            for band, hashes in enumerate(prints.minhash.band_hashes(block["signature"]).T):
                columns.write(f"band-{band}", hashes)
        _link_neighbours(exact, 2, clusters)
        _link_neighbours(signatures, 1, clusters, columns.takes_part)
    return columns


def _link_neighbours(
    sorter: Sorter, num_keys: int, clusters: Clusters, firsts: NDArray[np.bool_] | None = None
) -> None:
    """Link rows (keys..., document) whose keys are equal; mark the first document of each key in `firsts`."""
    last: U64 | None = None
    for block in sorter.read():
        if not len(block):
            continue
        rows = block if last is None else np.concatenate([last, block])
        same = (rows[1:, :num_keys] == rows[:-1, :num_keys]).all(axis=1)
        documents = rows[:, -1].astype(np.int64)
        clusters.link(documents[:-1][same], documents[1:][same])
        if firsts is not None:
            if last is None:
                firsts[documents[0]] = True
            firsts[documents[1:][~same]] = True
        last = block[-1:]


# ---- nearly equal documents ----


def _link_band(
    prints: Fingerprints, clusters: Clusters, columns: _Columns, band: int, window: int, folder: Path, memory: int
) -> None:
    """Link the documents that share this band and agree in enough of the whole signature."""
    # In a large bucket those that share the next band as well become neighbours.
    following = (band + 1) % prints.minhash.shape[0]
    names = [f"band-{band}", f"band-{following}", "id_hash"]
    max_rows = _block_rows(prints, memory)
    with closing(Sorter(folder, 4, memory // 4)) as sorter:
        for start, block in columns.read(names, max_rows):
            rows = np.arange(start, start + len(block), dtype=np.uint64)
            sorter.add(np.column_stack([block, rows])[columns.takes_part[start : start + len(block)]])
        for bucket in shared_buckets(sorter.read(), window, max_rows):
            documents = bucket.rows[:, -1].astype(np.int64)
            signatures: Any = None
            for first, second in bucket.pairs(window):
                apart = clusters.roots(documents[first]) != clusters.roots(documents[second])
                first, second = first[apart], second[apart]
                if not len(first):
                    continue
                if signatures is None:
                    signatures = _signatures(prints, documents)
                same = agreement(signatures[first], signatures[second]) >= prints.minhash.threshold
                clusters.link(documents[first[same]], documents[second[same]])


def _signatures(prints: Fingerprints, documents: Index) -> NDArray[np.uint32]:
    order = np.argsort(documents)
    found = np.empty((len(documents), prints.minhash.num_hashes), dtype=np.uint32)
    found[order] = prints.read(documents[order])["signature"]
    return found


# ---- which to keep ----


def _drop(
    prints: Fingerprints,
    clusters: Clusters,
    keep: Keep,
    folder: Path,
    memory: int,
) -> Iterator[Duplicate]:
    """Choose the document to keep of each cluster; name the others."""
    max_rows = _block_rows(prints, memory)
    size = len(prints)
    kept = make_array(size, np.int32 if size < 2**31 else np.int64, folder, memory // 8)  # by root, of clusters of many
    many = make_array(size, np.bool_, folder, memory // 16)  # by root: has other members
    for start in range(0, size, max_rows):
        rows = np.arange(start, min(size, start + max_rows))
        roots = clusters.roots(rows)
        many[roots[roots != rows]] = True
    with closing(Sorter(folder, 3, memory // 4)) as sorter:
        for start, block in prints.blocks(max_rows):
            rows = np.arange(start, start + len(block))
            roots = clusters.roots(rows)
            members = np.flatnonzero(many[roots])
            ranks = _ranks(block[members], keep)
            sorter.add(np.column_stack([roots[members].astype(np.uint64), ranks, rows[members].astype(np.uint64)]))
        for root, row in _choose(prints, sorter.read(), max_rows):
            kept[root] = row
    for start, block in prints.blocks(max_rows):
        rows = np.arange(start, start + len(block))
        roots = clusters.roots(rows)
        dropped = np.flatnonzero(many[roots] & (kept[roots] != rows))
        if not len(dropped):
            continue
        stays = np.asarray(kept[roots[dropped]], dtype=np.int64)
        originals, places = np.unique(stays, return_inverse=True)
        found = prints.read(originals)
        equal = (found["exact"][places] == block["exact"][dropped]).all(axis=1)
        names, original_names = prints.ids(rows[dropped], block[dropped]), prints.ids(originals, found)
        for row, name, place, is_equal in zip(rows[dropped].tolist(), names, places.tolist(), equal, strict=True):
            partition, local = prints.locate(row)
            yield Duplicate(name, partition, local, EXACT if is_equal else NEAR, original_names[place])


def _ranks(rows: Rows, keep: Keep) -> U64:
    """Numbers of which the least is best."""
    if keep == "longest":
        return np.uint64(2**32) - rows["num_words"].astype(np.uint64)
    if keep == "best":
        # Adding 0 makes -0 a 0. Turned like this, floats order as their bits do.
        bits = (rows["score"] + 0.0).view(np.uint64)
        negative = bits >> np.uint64(63) == 1
        return np.where(negative, bits, ~bits ^ np.uint64(1 << 63))
    return np.ones(len(rows), dtype=np.uint64)


def _choose(prints: Fingerprints, blocks: Iterator[U64], max_rows: int) -> Iterator[tuple[int, int]]:
    """(root, row to keep) of each cluster, of rows (root, rank, row) in order: the least rank, then the first id."""
    root, rank, best = -1, -1, ("", -1)
    for block in blocks:
        for start in range(0, len(block), max_rows):
            part = block[start : start + max_rows]
            # What is worse than the row before it in the same cluster is worse than the best.
            worse = np.insert((part[1:, 0] == part[:-1, 0]) & (part[1:, 1] != part[:-1, 1]), 0, False)
            part = part[~worse]
            documents = part[:, 2].astype(np.int64)
            order = np.argsort(documents)
            names = np.empty(len(part), dtype=object)
            names[order] = prints.ids(documents[order], prints.read(documents[order]))
            for (new_root, new_rank, row), name in zip(part.tolist(), names, strict=True):
                if new_root != root:
                    if root >= 0:
                        yield root, best[1]
                    root, rank, best = new_root, new_rank, (name, row)
                elif new_rank == rank:
                    best = min(best, (name, row))
    if root >= 0:
        yield root, best[1]
