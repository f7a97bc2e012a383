"""Fingerprints: the little of each document that tells whether another one is the same, as fixed rows on disk.

The first phase of finding duplicates. Each process, on any machine, turns its part of the corpus into one folder, a
partition: `rows.bin`, `images.bin` (NumPy rows), `ids.bin` (text), `partition.json` (what was done, written last). The
second phase, `datasets.duplicates`, reads nothing else.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mm_gpt.datasets.duplicates.image_hash import perceptual_hash
from mm_gpt.datasets.duplicates.minhash import U32, MinHash, shingle_hashes, word_hashes
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ImageError, MMGPTError
from mm_gpt.images import Concepts, image_bytes, is_url, load_image

Rows = NDArray[np.void]

IMAGE_ROW = np.dtype([("row", "<u8"), ("index", "<u4"), ("has_look", "<u4"), ("content", "<u8"), ("look", "<u8")])
"""An image: its document's row, which one of `Document.images` it is, hashes of its content and of its look."""
SIGNATURE_SETTINGS = ("num_hashes", "shingle_words", "seed")
"""What of `MinHash` signatures depend on."""
SPAN = 1024
"""Most rows of a partition that are read at once."""
GAP = 8
"""Rows that are read and thrown away rather than to read twice."""


def row_type(num_hashes: int) -> np.dtype[np.void]:
    """A document: hashes of its id and of all its content, its score, its id's place in `ids.bin`, its signature."""
    fields: list[Any] = [
        ("id_hash", "<u8"),
        ("exact", "<u8", (2,)),
        ("score", "<f8"),
        ("id_start", "<u8"),
        ("id_length", "<u4"),
        ("num_words", "<u4"),
        ("signature", "<u4", (num_hashes,)),
    ]
    return np.dtype(fields)


@dataclass(frozen=True)
class ImageFingerprint:
    """What tells an image: a hash of its bytes (of its address when it is not fetched), the hash of its look if any."""

    content: bytes
    look: int | None


@dataclass(frozen=True)
class Fingerprint:
    """What tells a document."""

    exact: bytes
    """16 bytes, equal where all words and images are: case, punctuation and spaces make no difference."""
    num_words: int
    signature: U32
    images: tuple[ImageFingerprint, ...]


def fingerprint(document: Document, minhash: MinHash, errors: ErrorCounter, *, looks: bool = True) -> Fingerprint:
    """The document's fingerprint, from the document alone.

    `looks=False` decodes no image. One that cannot be decoded is counted in `errors` and told by its bytes only.
    """
    segments = [*document.segments, *(segment for branch in document.branches for segment in branch)]
    text = "\n\n".join(segment.text for segment in segments if isinstance(segment, Text))
    words = word_hashes(text)
    images = tuple(
        _image_fingerprint(image, f"{document.id}, image {index}", errors, looks)
        for index, image in enumerate(document.images)
    )
    # Without any word, what is written (such as "?!") tells.
    content = words.tobytes() if len(words) else "".join(text.split()).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(content, digest_size=16)
    for image in images:
        digest.update(b"image" + image.content)
    signature = minhash.signature_of(shingle_hashes(words, minhash.shingle_words))
    return Fingerprint(digest.digest(), len(words), signature, images)


def _image_fingerprint(image: Image, name: str, errors: ErrorCounter, looks: bool) -> ImageFingerprint:
    source = image.source
    if isinstance(source, str) and is_url(source) and source[:5].lower() != "data:":
        return ImageFingerprint(_digest(b"url" + source.encode("utf-8", "surrogatepass")), None)
    try:
        if isinstance(source, PILImage.Image | np.ndarray | Concepts):
            picture = load_image(source)
            content = _digest(b"%d %d" % picture.size + picture.tobytes())
            return ImageFingerprint(content, perceptual_hash(picture) if looks else None)
        data = image_bytes(source)
    except (ImageError, OSError):
        errors.add("unreadable image", name)
        return ImageFingerprint(_digest(repr(source).encode("utf-8", "backslashreplace")), None)
    look = None
    if looks:
        try:
            look = perceptual_hash(load_image(data))
        except ImageError:
            errors.add("undecodable image", name)
    return ImageFingerprint(_digest(data), look)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def write_fingerprints(
    documents: Iterable[Document],
    folder: Path | str,
    errors: ErrorCounter,
    *,
    minhash: MinHash | None = None,
    score: Callable[[Document], float] | None = None,
    looks: bool = True,
) -> int:
    """Write the fingerprints of `documents` as the partition `folder`, which is replaced; returns how many.

    `score` tells which of duplicates is the best, for `find_duplicates(keep="best")`. A document without an id cannot
    be named later: raises MMGPTError.
    """
    folder, minhash = Path(folder), minhash or MinHash()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    row = np.zeros((), dtype=row_type(minhash.num_hashes))
    count = id_start = 0
    with (
        open(part / "rows.bin", "wb") as row_file,
        open(part / "images.bin", "wb") as image_file,
        open(part / "ids.bin", "wb") as id_file,
    ):
        for document in documents:
            if not document.id:
                raise MMGPTError(f"{folder}: document {count} has no id, so nothing could say that it is a duplicate")
            found = fingerprint(document, minhash, errors, looks=looks)
            name = document.id.encode("utf-8", "surrogatepass")
            row["id_hash"] = int.from_bytes(_digest(name), "little")
            row["exact"] = np.frombuffer(found.exact, dtype="<u8")
            row["score"] = score(document) if score else 0.0
            if np.isnan(row["score"]):
                raise MMGPTError(f"{folder}: the score of document {document.id!r} is not a number")
            row["id_start"], row["id_length"] = id_start, len(name)
            row["num_words"], row["signature"] = found.num_words, found.signature
            row_file.write(row.tobytes())
            id_file.write(name)
            for index, image in enumerate(found.images):
                content = int.from_bytes(image.content, "little")
                entry = (count, index, image.look is not None, content, image.look or 0)
                image_file.write(np.array(entry, dtype=IMAGE_ROW).tobytes())
            count += 1
            id_start += len(name)
    about = {"documents": count, "minhash": _settings(minhash), "looks": looks}
    (part / "partition.json").write_text(json.dumps(about, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return count


def _settings(minhash: MinHash) -> dict[str, Any]:
    return {**asdict(minhash), "shape": list(minhash.shape)}


class Fingerprints:
    """The rows of many partitions, numbered through in the order of the partitions' names. Never more in memory than
    what is asked for.

    They are compared by `minhash`, by default as the first partition says. What the signatures depend on must be as it
    was when they were made; threshold and bands may differ.
    """

    def __init__(self, partitions: Sequence[Path | str], minhash: MinHash | None = None) -> None:
        self.folders = sorted((Path(folder) for folder in partitions), key=lambda folder: folder.name)
        if not self.folders:
            raise MMGPTError("no partitions: write some with write_fingerprints")
        for first, second in zip(self.folders, self.folders[1:], strict=False):
            if first.name == second.name:
                raise MMGPTError(f"{first} and {second} have the same name; partitions are told by their names")
        about = [_read_about(folder) for folder in self.folders]
        for folder, values in zip(self.folders, about, strict=True):
            if any(values["minhash"][name] != about[0]["minhash"][name] for name in SIGNATURE_SETTINGS):
                raise MMGPTError(f"{folder}: made with other MinHash settings than {self.folders[0]}")
        settings = {name: value for name, value in about[0]["minhash"].items() if name != "shape"}
        self.minhash = minhash or MinHash(**settings)
        for name in SIGNATURE_SETTINGS:
            if getattr(self.minhash, name) != settings[name]:
                found = getattr(self.minhash, name)
                raise MMGPTError(f"{self.folders[0]}: made with {name} {settings[name]}, not {found}")
        self.dtype = row_type(self.minhash.num_hashes)
        self.starts = [0]
        for folder, values in zip(self.folders, about, strict=True):
            size = (folder / "rows.bin").stat().st_size
            if size != values["documents"] * self.dtype.itemsize:
                raise MMGPTError(f"{folder / 'rows.bin'}: {size} bytes for {values['documents']} documents")
            self.starts.append(self.starts[-1] + values["documents"])

    def __len__(self) -> int:
        return self.starts[-1]

    def blocks(self, num_rows: int) -> Iterator[tuple[int, Rows]]:
        """All rows in order, at most `num_rows` at a time, each block with its first number; of one partition."""
        for folder, start in zip(self.folders, self.starts, strict=False):
            with open(folder / "rows.bin", "rb") as file:
                while data := file.read(num_rows * self.dtype.itemsize):
                    yield start, np.frombuffer(data, dtype=self.dtype)
                    start += len(data) // self.dtype.itemsize

    def images(self, num_rows: int) -> Iterator[Rows]:
        """All images, at most `num_rows` at a time; `row` is numbered through."""
        for folder, start in zip(self.folders, self.starts, strict=False):
            with open(folder / "images.bin", "rb") as file:
                while data := file.read(num_rows * IMAGE_ROW.itemsize):
                    block = np.frombuffer(data, dtype=IMAGE_ROW).copy()
                    block["row"] += np.uint64(start)
                    yield block

    def read(self, rows: NDArray[np.int64]) -> Rows:
        """These rows, whose numbers ascend."""
        found = np.empty(len(rows), dtype=self.dtype)
        size = self.dtype.itemsize
        for folder, start, first, last in self._parts(rows):
            local = rows[first:last] - start
            with open(folder / "rows.bin", "rb") as file:
                for low, high in _spans(local):
                    begin = int(local[low])
                    data = os.pread(file.fileno(), (int(local[high - 1]) - begin + 1) * size, begin * size)
                    found[first + low : first + high] = np.frombuffer(data, dtype=self.dtype)[local[low:high] - begin]
        return found

    def ids(self, rows: NDArray[np.int64], found: Rows) -> list[str]:
        """The ids of these rows, whose numbers ascend; `found` is what `read` gave for them."""
        names: list[str] = []
        for folder, _, first, last in self._parts(rows):
            with open(folder / "ids.bin", "rb") as file:
                for start, length in found[["id_start", "id_length"]][first:last].tolist():
                    names.append(os.pread(file.fileno(), length, start).decode("utf-8", "surrogatepass"))
        return names

    def locate(self, row: int) -> tuple[str, int]:
        """The name of a row's partition, and which row of it this is."""
        index = self.partition(row)
        return self.folders[index].name, row - self.starts[index]

    def partition(self, row: int) -> int:
        """Which of `folders` holds a row."""
        return bisect_right(self.starts, row) - 1

    def _parts(self, rows: NDArray[np.int64]) -> Iterator[tuple[Path, int, int, int]]:
        """Each partition of these ascending rows: folder, first row, and from where to where `rows` lie in it."""
        bounds = np.searchsorted(rows, self.starts)
        for index in np.flatnonzero(np.diff(bounds)):
            yield self.folders[index], self.starts[index], int(bounds[index]), int(bounds[index + 1])


def _spans(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Slices of ascending rows to read at once."""
    breaks = np.flatnonzero((np.diff(rows) > GAP) | (np.diff(rows // SPAN) != 0)) + 1
    yield from zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True)


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "partition.json"
    try:
        about = json.loads(path.read_text())
        if not isinstance(about["documents"], int) or not isinstance(about["minhash"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise MMGPTError(f"{path}: missing or not a finished partition") from None
    return dict(about)
