"""Corpora on disk: webdataset tars of samples with an index beside each, read at random.

    corpus/corpus.json                 what is in it: shards, counts, how it was made
           shard-00000.tar             key.json and key.0.jpg, key.1.png, ... for each sample
           shard-00000.index.npy       int64 (N + 1,): where each sample begins, and where the last ends

How a sample stands in a tar, see `members`; webdataset itself reads these tars as well. Tars that others wrote
(images with captions, as img2dataset does) have no index; theirs is made in memory when they are opened.

Only JSON, text and image members are read, never a pickle; sizes are checked before memory is taken.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.building.members import from_members, to_members
from mm_gpt.datasets.formats.captioned import MAX_MEMBER_BYTES
from mm_gpt.datasets.reading import files
from mm_gpt.datasets.reading.archives import TAR_ERRORS, Tar
from mm_gpt.datasets.samples import STORED_IMAGE_SUFFIXES, BadRecordError, ErrorCounter, Sample, split_name
from mm_gpt.errors import MMGPTError

CORPUS_FILE = "corpus.json"
VERSION = 1
BLOCK = 512
MAX_SAMPLE_BYTES = 512 * 2**20
SAFE_SUFFIXES = (*STORED_IMAGE_SUFFIXES, "json", "txt")


# ---- Reading ----


class Shard:
    """One tar, with each sample a read away. Safe to share between forked processes and threads."""

    def __init__(self, path: Path, errors: ErrorCounter | None = None, *, index: Path | None = None):
        """The index is used that is given or beside the tar; without one the headers are read now, and what is broken
        is counted.

        Raises MMGPTError when there is no such tar, it is compressed, or its index is broken.
        """
        self.path = path
        index = index or index_path(path)
        if index.is_file():
            self.offsets = _read_index(index)
        else:
            self.offsets = index_tar(path, errors if errors is not None else ErrorCounter())
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise MMGPTError(f"{path}: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound here: at exit `os` may be gone
        if (file := getattr(self, "_file", None)) is not None:
            close(file)

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Key and members (suffix -> bytes) of a sample. Raises BadRecordError, also where a tar was cut short."""
        if not 0 <= number < len(self):
            raise BadRecordError("no such sample")
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        if end - start > MAX_SAMPLE_BYTES:
            raise BadRecordError("sample too large")
        data = os.pread(self._file, end - start, start)
        if len(data) < end - start:
            raise BadRecordError("the tar is cut short")
        return _split(data)

    def sample(self, number: int) -> Sample:
        """The sample, its images still encoded. Raises BadRecordError."""
        key, members = self.read(number)
        return from_members(key, members, self.path.stem)


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.npy")


def read_array(path: Path) -> np.ndarray:
    """A `.npy` file, wherever it is from: nothing is unpickled, no memory is taken that the file does not fill.

    Raises OSError or ValueError.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, zipfile.BadZipFile) as error:
        raise ValueError(str(error)) from None
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays")
    return np.array(array)


def _read_index(path: Path) -> np.ndarray:
    try:
        offsets = read_array(path)
    except (OSError, ValueError) as error:
        raise MMGPTError(f"{path}: broken index ({error})") from None
    if offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
        raise MMGPTError(f"{path}: broken index")
    if offsets[0] < 0 or (np.diff(offsets) <= 0).any():
        raise MMGPTError(f"{path}: broken index")
    return offsets


def index_tar(path: Path, errors: ErrorCounter) -> np.ndarray:
    """Where the samples of an uncompressed tar begin and end, from its headers alone: int64 (N + 1,).

    Members that belong together stand together; a key that comes again later is another sample. What is cut off at the
    end is counted. Raises MMGPTError when the file is missing or no tar.
    """
    with files.open_file(str(path)) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            tar = Tar(file, jumps=True)
        except TAR_ERRORS:
            raise MMGPTError(f"{path}: not an uncompressed tar") from None
        offsets: list[int] = []
        current: str | None = None
        end = 0
        while True:
            try:
                member = tar.next()
            except TAR_ERRORS as error:
                errors.add("broken tar, rest of it unread", f"{path.name}:{len(offsets)} ({error})")
                break
            if member is None:
                break
            key = split_name(member.name)[0] if member.isreg() else current
            if tar.offset > size:
                errors.add("broken tar, rest of it unread", f"{path.name}:{len(offsets)} (cut short)")
                if offsets and key == current:
                    end = offsets.pop()  # its sample is not whole
                break
            if key is not None and key != current:
                offsets.append(member.offset)
                current = key
            end = tar.offset
    return np.array([*offsets, end], dtype=np.int64)


def _split(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and members of the piece of a tar that holds one sample.

    Plain headers are read here: tarfile takes ten times as long. Anything else goes to tarfile.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    at = 0
    while at + BLOCK <= len(data):
        header = data[at : at + BLOCK]
        if header[156:157] not in (b"0", b"\0") or header[124] & 0x80:
            return _split_slowly(data)
        try:
            size = int(header[124:136].rstrip(b"\0 "), 8)
        except ValueError:
            raise BadRecordError("broken tar header") from None
        if size < 0:
            raise BadRecordError("broken tar header")
        name = header[:100].partition(b"\0")[0].decode(errors="replace")
        if header[345]:
            name = f"{header[345:500].partition(bytes(1))[0].decode(errors='replace')}/{name}"
        own, suffix = split_name(name)
        if key is None:
            key = own
        if own == key:
            _add(members, suffix, size, data[at + BLOCK : at + BLOCK + size])
        at += BLOCK + -(-size // BLOCK) * BLOCK
    if key is None:
        raise BadRecordError("empty sample")
    return key, members


def _split_slowly(data: bytes) -> tuple[str, dict[str, bytes]]:
    key: str | None = None
    members: dict[str, bytes] = {}
    try:
        with Tar(io.BytesIO(data + bytes(BLOCK)), jumps=True) as tar:
            while (member := tar.next()) is not None:
                own, suffix = split_name(member.name) if member.isreg() else (None, None)
                key = key or own
                if own is None or own != key or not _is_safe(suffix):
                    continue
                if member.issparse() or not 0 <= member.size <= MAX_MEMBER_BYTES:  # before memory is taken
                    raise BadRecordError("member too large")
                stream = tar.extractfile(member)
                assert stream is not None  # isreg() said so
                _add(members, suffix, member.size, stream.read())
    except TAR_ERRORS:
        raise BadRecordError("broken tar header") from None
    if key is None:
        raise BadRecordError("empty sample")
    return key, members


def _is_safe(suffix: str | None) -> bool:
    return (suffix or "").lower().rpartition(".")[2] in SAFE_SUFFIXES


def _add(members: dict[str, bytes], suffix: str | None, size: int, data: bytes) -> None:
    if not _is_safe(suffix):
        return
    suffix = (suffix or "").lower()
    if size > MAX_MEMBER_BYTES:
        raise BadRecordError("member too large")
    if len(data) < size:
        raise BadRecordError("the tar is cut short")
    if suffix in members:
        raise BadRecordError("duplicate member")
    members[suffix] = data


@dataclass(frozen=True)
class ShardInfo:
    name: str
    samples: int
    num_bytes: int
    digest: str = ""
    """Of all that is in it: tables about a shard are of no use for another one of the same name."""


class Corpus:
    """A folder of shards, here or at a URL: then they are copied here as they are read, within a bounded cache."""

    def __init__(self, location: str | Path):
        """Raises MMGPTError when there is no corpus or its description is broken."""
        self.location = str(location)
        where = files.resolve(self.location, CORPUS_FILE)
        try:
            with files.open_file(where) as file:
                values = json.loads(file.read(64 * 2**20))
            self.about: dict[str, Any] = values
            if values["version"] != VERSION:
                raise MMGPTError(f"{where}: version {values['version']}, and this program reads {VERSION}")
            self.shards = [
                ShardInfo(_shard_name(s["name"]), _count(s["samples"]), _count(s["bytes"]), str(s.get("digest") or ""))
                for s in values["shards"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            if isinstance(error, MMGPTError):
                raise
            raise MMGPTError(f"{where}: not the description of a corpus ({error})") from None
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        """Samples."""
        return sum(shard.samples for shard in self.shards)

    def shard(self, number: int) -> Shard:
        """An open shard; the last few stay open. Raises MMGPTError when it is missing or is not as described."""
        shard = self._open.get(number)
        if shard is None:
            name, samples = self.shards[number].name, self.shards[number].samples
            path = self._local(name)
            try:
                index = self._local(index_path(Path(name)).name)
            except MMGPTError:  # it is made from the tar then
                index = None
            shard = Shard(path, index=index)
            if len(shard) != samples:
                raise MMGPTError(f"{path}: {len(shard)} samples, not the {samples} of {CORPUS_FILE}")
            for old in list(self._open)[:-15]:  # in steps that another thread cannot come between
                self._open.pop(old, None)
            self._open[number] = shard
        return shard

    def _local(self, name: str) -> Path:
        return files.local_copy(files.resolve(self.location, name))

    def cache_folder(self) -> Path:
        """Where tables about this corpus may be kept: in it, or in the user's cache when it is not ours to write."""
        name = hashlib.sha256(json.dumps([self.location, self.about], sort_keys=True).encode()).hexdigest()[:16]
        if not files.is_remote(self.location) and os.access(folder := files.local_path(self.location), os.W_OK):
            return folder / ".pieces"
        return files.cache_folder() / "pieces" / name

    def samples(self, errors: ErrorCounter) -> Iterator[Sample]:
        """All samples in order; what cannot be read is counted and skipped."""
        for number, info in enumerate(self.shards):
            try:
                shard = self.shard(number)
            except MMGPTError as error:
                errors.add("missing shard", str(error))
                continue
            for at in range(len(shard)):
                try:
                    yield shard.sample(at)
                except BadRecordError as error:
                    errors.add(str(error), f"{info.name}:{at}")


def _shard_name(name: str) -> str:
    if re.fullmatch(r"[\w-][\w.-]{0,200}\.tar", name, re.ASCII) is None:
        raise MMGPTError(f"{name[:80]!r} is no name of a shard")
    return name


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{str(value)[:20]} is no number of things")
    return value


def is_corpus(location: str | Path) -> bool:
    """Whether a local folder is a corpus."""
    return not files.is_remote(str(location)) and (Path(location) / CORPUS_FILE).is_file()


def read_corpus(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Sample]:
    """The samples of a corpus folder or URL."""
    return Corpus(location).samples(errors)


# ---- Writing ----


class ShardWriter:
    """Samples into tars of at most about `shard_bytes`; each appears under its name only when it is whole.

    The same samples give the same bytes: no times, no owners.
    """

    def __init__(self, folder: Path, *, prefix: str = "shard", shard_bytes: int = 256 * 2**20):
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        self.shards: list[ShardInfo] = []
        self._tar: tarfile.TarFile | None = None
        self._offsets: list[int] = []
        self._digest = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample) -> None:
        """Raises BadRecordError for what no shard can hold."""
        members = to_members(sample)
        total = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        if total > MAX_SAMPLE_BYTES or any(len(data) > MAX_MEMBER_BYTES for data in members.values()):
            raise BadRecordError("sample too large")
        if self._tar is not None and self._tar.offset + total > self.shard_bytes:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._offsets, self._digest = [0], hashlib.sha256()
        key = f"{len(self.shards):05d}{len(self._offsets) - 1:07d}"
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mtime, info.mode = len(data), 0, 0o644
            self._tar.addfile(info, io.BytesIO(data))
            self._digest.update(f"{suffix} {len(data)}\n".encode())
            self._digest.update(data)
        self._offsets.append(self._tar.offset)

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self.prefix}-{len(self.shards):05d}.tar.tmp"

    def _finish(self) -> None:
        assert self._tar is not None
        temporary = self._temporary
        self._tar.close()
        path = self.folder / f"{self.prefix}-{len(self.shards):05d}.tar"
        with index_path(temporary).open("wb") as file:
            np.save(file, np.array(self._offsets, dtype=np.int64), allow_pickle=False)
        index_path(temporary).rename(index_path(path))
        num_bytes = temporary.stat().st_size
        temporary.rename(path)
        self.shards.append(ShardInfo(path.name, len(self._offsets) - 1, num_bytes, self._digest.hexdigest()[:16]))
        self._tar = None

    def close(self) -> list[ShardInfo]:
        """Finish the last shard; all of them."""
        if self._tar is not None:
            self._finish()
        return self.shards


def write_corpus_file(folder: Path, shards: Sequence[ShardInfo], about: Mapping[str, Any]) -> None:
    """`corpus.json`: with it a folder of shards is a corpus. Written last, in one piece."""
    rows = [{"name": s.name, "samples": s.samples, "bytes": s.num_bytes, "digest": s.digest} for s in shards]
    values = {"version": VERSION, "samples": sum(s.samples for s in shards), **about, "shards": rows}
    temporary = folder / f".{CORPUS_FILE}.tmp"
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.rename(folder / CORPUS_FILE)
