"""Every source as numbered samples, each a read away, so that training can take them in any order.

A corpus has that already, and a tar of captioned images that others wrote as soon as it is known where its samples
begin. Anything else (lists, folders of photos, texts, parquet, a hub's data set) is read once, in its own order, and
kept as shards in the cache. Photos in files of their own, and those behind URLs, stay where they are.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_gpt.datasets.building.shards import (
    Corpus,
    Shard,
    ShardFolder,
    ShardInfo,
    ShardWriter,
    index_tar,
    read_array,
    write_corpus_file,
)
from mm_gpt.datasets.reading import files
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.datasets.sources import detect, read_samples
from mm_gpt.errors import MMGPTError
from mm_gpt.system.locks import exclusive
from mm_gpt.system.processes import refuse_a_second_run
from mm_gpt.system.writing import naming, new_folder, remove_folder, whole_file, write_text

VERSION = 2
"""Of what is kept: another one when the readers of sources change what they give."""
INDEX_FOLDER = ".index"
KEPT_DAYS = 30
"""That a source is kept in the cache after it was last opened."""


class TarFolder(ShardFolder):
    """Local tars of captioned images as others write them. Where their samples begin is found once, and kept."""

    def __init__(self, location: str, paths: list[Path], errors: ErrorCounter):
        """A tar that cannot be read is counted. Raises MMGPTError when none can."""
        super().__init__()
        self.location = location
        self._paths: list[Path] = []
        self._indexes: list[Path] = []
        self.shards = []
        for path in tqdm(paths, desc=f"finding samples in {files.base_name(location)}", unit="tar", delay=2):
            try:
                index, offsets, digest = _tar_index(path, errors)
            except MMGPTError as error:
                if len(paths) == 1:
                    raise
                errors.add("unreadable file", str(error))
                continue
            self._paths.append(path)
            self._indexes.append(index)
            self.shards.append(ShardInfo(path.name, len(offsets) - 1, path.stat().st_size, digest))
        if not self.shards:
            raise MMGPTError(f"{location}: not one of {len(paths)} tars can be read")

    def _open_shard(self, number: int) -> Shard:
        shard = Shard(self._paths[number], index=self._indexes[number])
        if len(shard) != self.shards[number].samples:
            raise MMGPTError(f"{self._paths[number]}: has changed")
        return shard


def open_store(location: str, errors: ErrorCounter, *, format: str = "auto", images: str | None = None) -> ShardFolder:
    """The samples of a source by number. What cannot be read is counted each time, not only when it was found.

    Raises MMGPTError when the source is missing or of no known format.
    """
    kind = detect(location).name if format == "auto" else format
    if kind == "corpus":
        return Corpus(location)
    if kind == "captioned" and (tars := _local_tars(location)):
        return TarFolder(location, tars, errors)
    return _kept(location, errors, format=kind, images=images)


def cache_of(store: ShardFolder) -> Path:
    """Where tables about a store are kept: beside its data, or in the user's cache when that is not ours to write."""
    place = files.local_path(store.location) if not files.is_remote(store.location) else None
    if place is not None:
        folder = place if place.is_dir() else place.parent
        if folder.is_dir() and os.access(folder, os.W_OK):
            return folder / INDEX_FOLDER
    return files.cache_folder() / "index" / _hash([store.location, [shard.digest for shard in store.shards]])


@contextmanager
def only_here(path: Path) -> Iterator[None]:
    """One process of this machine (or of those that share the file system) makes what the others wait for.

    Raises MMGPTError when the lock `path` cannot be written.
    """
    refuse_a_second_run()
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with exclusive(path):
        yield


def _local_tars(location: str) -> list[Path]:
    """The tars of a source of captioned images, when it is local and nothing but tars."""
    if files.is_remote(location):
        return []
    place = files.local_path(location)
    if place.is_dir():
        found = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        lists = any(path.suffix.lower() in (".jsonl", ".csv") for path in found)
        return [] if lists else [path for path in found if path.suffix.lower() == ".tar"]
    names = [place] if place.is_file() else [files.local_path(name) for name in files.list_files(location)]
    return names if all(path.suffix.lower() == ".tar" for path in names) else []


def _tar_index(path: Path, errors: ErrorCounter) -> tuple[Path, np.ndarray, str]:
    """The file that says where a tar's samples begin, what it says, and a digest of it."""
    state = path.stat()
    name = f"{path.name}.{_hash([str(path.resolve()), state.st_size, state.st_mtime_ns])}.offsets.npy"
    folder = path.parent / INDEX_FOLDER
    if not os.access(path.parent, os.W_OK):
        folder = files.cache_folder() / "index"
    index = folder / name
    with only_here(folder / f".{name}.lock"):
        offsets = _load(index)
        if offsets is None:
            own = ErrorCounter()
            offsets = index_tar(path, own)
            write_skipped(index.with_suffix(".json"), own)
            write_array(index, offsets)
    errors.merge(read_skipped(index.with_suffix(".json")))
    digest = hashlib.sha256(offsets.tobytes() + str(state.st_size).encode()).hexdigest()[:16]
    return index, offsets, digest


def _kept(location: str, errors: ErrorCounter, *, format: str, images: str | None) -> Corpus:
    """A source of any other format, read once and kept as shards in the user's cache."""
    of_source = files.cache_folder() / "samples" / _hash([location, format, images])
    folder = of_source / _hash([VERSION, _listing(location, format)])
    with only_here(of_source / ".lock"):
        if not (folder / "corpus.json").is_file():
            _keep(location, folder, format=format, images=images)
            _remove_old(of_source)
        os.utime(of_source)
    corpus = Corpus(folder, refer=True)
    corpus.location = str(folder)
    errors.merge(read_skipped(folder / "skipped.json"))
    return corpus


def _keep(location: str, folder: Path, *, format: str, images: str | None) -> None:
    own = ErrorCounter()
    samples = read_samples(location, own, format=format, images=images)
    with new_folder(folder) as place:
        writer = ShardWriter(place, refer=True)
        for sample in tqdm(samples, desc=f"reading {files.base_name(location)}", unit=" samples", delay=2):
            try:
                writer.add(sample)
            except BadRecordError as error:
                own.add(str(error), getattr(sample, "key", "") or getattr(sample, "id", ""))
        shards = writer.close()
        write_skipped(place / "skipped.json", own)
        write_corpus_file(place, shards, {"source": location})


def _remove_old(of_source: Path) -> None:
    """What nobody is likely to read again: sources that were last opened long ago, and versions of this one.

    A run may still read what was kept before the source changed: one version beside the newest stays.
    """
    kept = sorted((path for path in of_source.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    long_ago = time.time() - KEPT_DAYS * 86_400
    others = [path for path in of_source.parent.iterdir() if path.is_dir() and path.stat().st_mtime < long_ago]
    for path in (*kept[:-2], *others):
        with suppress(MMGPTError, FileNotFoundError):  # another process may remove the same
            remove_folder(path)


def _listing(location: str, format: str) -> list[Any]:
    """What tells that a source has changed: its files with sizes and times. Of a remote one, its name alone."""
    if format == "hf" or files.is_remote(location):
        return []
    found = []
    for name in files.list_files(location):
        state = files.local_path(name).stat()
        found.append([name, state.st_size, state.st_mtime_ns])
    return found


# ---- Small files that appear in one piece ----


def write_array(path: Path, array: np.ndarray) -> None:
    """A `.npy` file, whole or not at all. Raises MMGPTError naming the file, when the disk is full say."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def write_skipped(path: Path, errors: ErrorCounter) -> None:
    """What was skipped, for the runs to come. Raises MMGPTError naming the file."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"counts": errors.counts, "examples": errors.examples}))


def read_skipped(path: Path) -> ErrorCounter:
    """What `write_skipped` wrote; nothing when the file is missing or broken: a table without it is still right."""
    found = ErrorCounter()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found.counts.update({str(reason): int(count) for reason, count in values["counts"].items()})
        found.examples.update({str(reason): list(map(str, names)) for reason, names in values["examples"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ErrorCounter()
    return found


def _load(path: Path) -> np.ndarray | None:
    try:
        return read_array(path)
    except (OSError, ValueError):
        return None


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
