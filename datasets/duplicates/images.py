"""Images that come again and again over a corpus: logos, buttons, advertisements, and copies of one photo.

Images are the same when their looks (64-bit perceptual hashes) differ in few bits, or, without a look, when their bytes
or addresses are equal. Close hashes are found without comparing all (Norouzi et al., Fast search in Hamming space with
multi-index hashing, 2012): a hash is cut into d + k blocks; two hashes that differ in at most d bits agree in at least
k of them, so they meet when hashes are sorted by each choice of k blocks. The number of blocks follows that of hashes,
so that few meet by chance; where many do all the same, neighbours are compared only, and time stays linear.

An image in more than `max_documents` documents is decoration and goes everywhere, as OBELICS has it (Laurençon et al.
2023: more than 10). Within a document, only the first of equal images stays.
"""

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mm_gpt.datasets.duplicates.clusters import Clusters, make_array, shared_buckets
from mm_gpt.datasets.duplicates.documents import MIN_MEMORY
from mm_gpt.datasets.duplicates.external_sort import U64, Sorter
from mm_gpt.datasets.duplicates.fingerprints import IMAGE_ROW, Fingerprints
from mm_gpt.errors import ConfigError

FREQUENT = "image: in too many documents"
REPEATED = "image: again in the document"
BITS = 64
WINDOW = 64
"""Neighbours in a bucket that a hash is compared with."""
PER_BUCKET = 4
"""Hashes that share a bucket by chance, at most, as far as the number of blocks can be chosen so."""
MAX_CHOSEN = 4
MAX_DISTANCE = 8


@dataclass(frozen=True)
class RepeatedImage:
    """An image to drop."""

    document: str
    partition: str
    row: int
    """Which document of its partition holds it."""
    image: int
    """Which of `Document.images`."""
    reason: str
    num_documents: int
    """How many documents hold this image or its like."""


def find_repeated_images(
    partitions: Sequence[Path | str],
    *,
    max_documents: int | None = 10,
    once_per_document: bool = True,
    distance: int = 4,
    without: Iterable[tuple[str, int]] = (),
    memory: int = 1 << 30,
    scratch: Path | str | None = None,
) -> Iterator[RepeatedImage]:
    """The images to drop, those of one look together.

    `without` are documents that are dropped already, as (partition, row): twenty copies of a page are one document.

    `distance` is the most bits in which two looks of one image differ (0 to 8); likeness goes on from image to image.
    `max_documents=None` keeps frequent ones. Memory is about `memory` bytes. Raises MMGPTError for partitions that are
    not finished or do not fit together. The result does not depend on the order of documents.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"distance is {distance}; it lies between 0 and {MAX_DISTANCE}")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents is {max_documents}; it must be at least 1")
    if memory < MIN_MEMORY:
        raise ConfigError(f"memory is {memory} bytes; it must be at least {MIN_MEMORY}")
    return _find(Fingerprints(partitions), max_documents, once_per_document, distance, without, memory, scratch)


def _find(
    prints: Fingerprints,
    max_documents: int | None,
    once_per_document: bool,
    distance: int,
    without: Iterable[tuple[str, int]],
    memory: int,
    scratch: Path | str | None,
) -> Iterator[RepeatedImage]:
    max_rows = max(64, memory // (16 * IMAGE_ROW.itemsize))
    with tempfile.TemporaryDirectory(dir=scratch, prefix="images-") as name:
        folder = Path(name)
        is_gone = make_array(len(prints), np.bool_, folder, memory // 16)
        starts = {part.name: start for part, start in zip(prints.folders, prints.starts, strict=False)}
        for partition, row in without:
            is_gone[starts[partition] + row] = True
        looks = _distinct_looks(prints, folder, memory, max_rows)
        clusters = Clusters(len(looks), folder, memory // 8)
        if distance:
            _link_close(looks, clusters, distance, folder, memory)
        with closing(Sorter(folder, 4, memory // 4)) as sorter:
            num_images = 0
            for block in prints.images(max_rows):
                block = block[~is_gone[block["row"].astype(np.int64)]]
                num_images += len(block)
                seen = block["has_look"] == 1
                same = block["content"].copy()
                same[seen] = clusters.roots(np.searchsorted(looks, block["look"][seen])).astype(np.uint64)
                columns = (seen.astype(np.uint64), same, block["row"], block["index"].astype(np.uint64))
                sorter.add(np.column_stack(columns))
            counts = make_array(num_images, np.uint32, folder, memory // 8)  # documents, by image
            for _, images, first in _groups(sorter):
                np.add.at(counts, images, first.astype(np.uint32))
            for rows, images, first in _groups(sorter):
                too_many = counts[images] > (num_images if max_documents is None else max_documents)
                dropped = too_many | ~first if once_per_document else too_many
                for start in range(0, len(rows), max_rows):
                    part = start + np.flatnonzero(dropped[start : start + max_rows])
                    yield from _name(prints, rows[part], counts[images[part]], too_many[part])


def _distinct_looks(prints: Fingerprints, folder: Path, memory: int, max_rows: int) -> U64:
    """All different looks, ascending: in memory or a file of the scratch folder."""
    path, size, last = folder / "looks", 0, None
    with closing(Sorter(folder, 1, memory // 4)) as sorter, open(path, "wb") as file:
        for block in prints.images(max_rows):
            sorter.add(np.unique(block["look"][block["has_look"] == 1])[:, None])
        for rows in sorter.read():
            new = np.unique(rows[:, 0])
            new = new[new != last] if last is not None else new
            if len(new):
                file.write(new.tobytes())
                size, last = size + len(new), new[-1]
    looks = make_array(size, np.uint64, folder, memory // 8)
    with open(path, "rb") as file:
        for start in range(0, size, max_rows):
            part = np.fromfile(file, np.uint64, max_rows)
            looks[start : start + len(part)] = part
    return looks


def tables(distance: int, num_looks: int) -> list[int]:
    """Masks, each of k of distance + k blocks of the bits: within `distance`, two hashes agree under one of them.

    More blocks make smaller buckets and more tables: as few as the number of hashes allows.
    """
    for chosen in range(1, MAX_CHOSEN + 1):
        num_blocks = distance + chosen
        if num_looks <= PER_BUCKET << (BITS // num_blocks * chosen):
            break
    edges = [BITS * block // num_blocks for block in range(num_blocks + 1)]
    blocks = [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)]
    return [sum(choice) for choice in itertools.combinations(blocks, chosen)]


def _link_close(looks: U64, clusters: Clusters, distance: int, folder: Path, memory: int) -> None:
    max_rows = max(1024, memory // 512)
    for mask in tables(distance, len(looks)):
        with closing(Sorter(folder, 3, memory // 4)) as sorter:
            for start in range(0, len(looks), max_rows):
                part = np.asarray(looks[start : start + max_rows])
                index = np.arange(start, start + len(part), dtype=np.uint64)
                sorter.add(np.column_stack([part & np.uint64(mask), part, index]))
            for bucket in shared_buckets(sorter.read(), WINDOW, max_rows):
                part, index = bucket.rows[:, 1], bucket.rows[:, 2].astype(np.int64)
                for first, second in bucket.pairs(WINDOW):
                    close = np.bitwise_count(part[first] ^ part[second]) <= distance
                    clusters.link(index[first[close]], index[second[close]])


def _groups(sorter: Sorter) -> Iterator[tuple[U64, NDArray[np.int64], NDArray[np.bool_]]]:
    """Rows (has look, which image, document, index) in order, the number of each row's image, and whether the row is
    the image's first in its document."""
    last: U64 | None = None
    number = -1
    for rows in sorter.read():
        if not len(rows):
            continue
        before = np.concatenate([rows[:1] if last is None else last, rows[:-1]])
        new_image = (rows[:, :2] != before[:, :2]).any(axis=1)
        first = new_image | (rows[:, 2] != before[:, 2])
        if last is None:
            new_image[0] = first[0] = True
        images = number + np.cumsum(new_image)
        last, number = rows[-1:], int(images[-1])
        yield rows, images, first


def _name(
    prints: Fingerprints, rows: U64, num_documents: NDArray[np.uint32], too_many: NDArray[np.bool_]
) -> Iterator[RepeatedImage]:
    documents, places = np.unique(rows[:, 2].astype(np.int64), return_inverse=True)
    names = prints.ids(documents, prints.read(documents))
    for place, index, number, is_frequent in zip(
        places.tolist(), rows[:, 3].tolist(), num_documents.tolist(), too_many.tolist(), strict=True
    ):
        partition, row = prints.locate(int(documents[place]))
        yield RepeatedImage(names[place], partition, row, index, FREQUENT if is_frequent else REPEATED, number)
