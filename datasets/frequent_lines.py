"""Lines that come in many documents of a site: menus, cookie notices, "read more". Nobody learns from them.

In two phases, as with duplicates. Each process counts its part of the corpus with `count_lines`; `find_frequent_lines`
adds the parts up and writes a table of what is frequent; the stage `DropFrequentLines` takes it out. Counts are exact,
and memory is bounded: lines are hashes of 64 bits that are sorted on disk.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

import numpy as np

from mm_gpt.datasets.duplicates.external_sort import U64, Sorter
from mm_gpt.datasets.duplicates.minhash import hash_rows, word_hashes
from mm_gpt.document import Document, Segment, Text
from mm_gpt.errors import ConfigError, MMGPTError

Scope = Literal["site", "corpus"]

DOCUMENTS = 0
"""Stands for a line in the counts: how many documents the site has."""
READ_ROWS = 1 << 14


def site_of(document: Document) -> str:
    """The host of the document's `url`, without `www.`; otherwise its `source`; otherwise empty."""
    url = document.metadata.get("url")
    if isinstance(url, str):
        try:
            host = urlsplit(url).hostname
        except ValueError:
            host = None
        if host:
            return host.removeprefix("www.")
    source = document.metadata.get("source")
    return source if isinstance(source, str) else ""


def line_hashes(document: Document, scope: Scope) -> list[tuple[int, int, int, int]]:
    """(site, line, segment, line of it) of each line of the document's text segments that holds words.

    Case, punctuation and spaces make no difference.
    """
    site = _site_hash(document, scope)
    found = []
    for place, segment in enumerate(document.segments):
        if isinstance(segment, Text):
            for number, line in enumerate(segment.text.split("\n")):
                words = word_hashes(line)
                if len(words):
                    found.append((site, _hash(words.tobytes()), place, number))
    return found


def _site_hash(document: Document, scope: Scope) -> int:
    return _hash(site_of(document).encode("utf-8", "surrogatepass")) if scope == "site" else 0


def _hash(data: bytes) -> int:
    """64 bits, never DOCUMENTS."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def count_lines(
    documents: Iterable[Document], folder: Path | str, *, scope: Scope = "site", memory: int = 1 << 28
) -> int:
    """Count in how many documents of its site (or of the corpus) each line is; write it as `folder`, which is replaced.

    Returns the number of documents. Memory is about `memory` bytes.
    """
    if scope not in ("site", "corpus"):
        raise ConfigError(f"scope is {scope!r}; it is site or corpus")
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    count, waiting = 0, []
    with closing(Sorter(part, 3, memory)) as sorter, open(part / "lines.bin", "wb") as file:
        for document in documents:
            count += 1
            waiting.append((_site_hash(document, scope), DOCUMENTS, 1))
            waiting += {(site, line, 1) for site, line, *_ in line_hashes(document, scope)}
            if len(waiting) >= READ_ROWS:
                sorter.add(np.array(waiting, dtype=np.uint64))
                waiting = []
        if waiting:
            sorter.add(np.array(waiting, dtype=np.uint64))
        for rows in _added_up(sorter.read()):
            file.write(rows.tobytes())
    (part / "lines.json").write_text(json.dumps({"documents": count, "scope": scope}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return count


def find_frequent_lines(
    parts: Sequence[Path | str],
    table: Path | str,
    *,
    min_documents: int = 10,
    min_share: float = 0.02,
    memory: int = 1 << 28,
) -> int:
    """Write the table of lines that are in at least `min_documents` documents and `min_share` of those of their site.

    Returns how many they are. Raises MMGPTError for parts that are not finished or have different scopes.
    """
    if min_documents < 2:
        raise ConfigError(f"min_documents is {min_documents}; it must be at least 2")
    if not 0.0 <= min_share <= 1.0:
        raise ConfigError(f"min_share is {min_share}; it lies between 0 and 1")
    folders = [Path(part) for part in parts]
    if not folders:
        raise MMGPTError("no parts: write some with count_lines")
    scopes = [_scope(folder) for folder in folders]
    for folder, scope in zip(folders, scopes, strict=True):
        if scope != scopes[0]:
            raise MMGPTError(f"{folder}: counted by {scope}, {folders[0]} by {scopes[0]}")
    table = Path(table)
    table.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=table.parent, prefix="lines-") as name:
        scratch = Path(name)
        with closing(Sorter(scratch, 3, memory // 2)) as sorter, closing(Sorter(scratch, 1, memory // 4)) as keys:
            for folder in folders:
                with open(folder / "lines.bin", "rb") as file:
                    for rows in _read(file):
                        sorter.add(rows)
            size = np.uint64(0)
            for rows in _added_up(sorter.read()):
                # A site's number of documents comes before its lines.
                is_size = rows[:, 1] == DOCUMENTS
                place = np.maximum.accumulate(np.where(is_size, np.arange(len(rows)), -1))
                sizes = np.where(place >= 0, rows[place, 2], size)
                size = sizes[-1]
                enough = (rows[:, 2] >= min_documents) & (rows[:, 2] >= min_share * sizes) & ~is_size
                keys.add(hash_rows(rows[enough, :2])[:, None])
            with open(scratch / "table", "wb") as out:
                count = 0
                for rows in keys.read():
                    count += len(rows)
                    out.write(rows.tobytes())
            (scratch / "table").replace(table)
    table.with_name(table.name + ".json").write_text(json.dumps({"scope": scopes[0], "lines": count}) + "\n")
    return count


@dataclass(frozen=True, kw_only=True)
class DropFrequentLines:
    """Takes lines that are in the table of `find_frequent_lines` out of text segments. What is empty then goes."""

    table: str
    """Path of the table. It is mapped into memory, so that processes share it."""
    name: str = "frequent lines"

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        scope, table = _load(self.table)
        lines = line_hashes(document, scope)
        if not lines or not len(table):
            return document
        keys = hash_rows(np.array([line[:2] for line in lines], dtype=np.uint64))
        place = np.searchsorted(table, keys)
        known = table[np.minimum(place, len(table) - 1)] == keys
        if not known.any():
            return document
        dropped = {line[2:] for line, is_known in zip(lines, known.tolist(), strict=True) if is_known}
        removed["text: frequent line"] += len(dropped)
        touched = {segment for segment, _ in dropped}
        segments: list[Segment] = []
        for index, segment in enumerate(document.segments):
            if index in touched and isinstance(segment, Text):
                rest = [line for n, line in enumerate(segment.text.split("\n")) if (index, n) not in dropped]
                text = "\n".join(rest)
                if text.strip():
                    segments.append(replace(segment, text=text))
            else:
                segments.append(segment)
        if not segments:
            removed["nothing but frequent lines"] += 1
            return None
        return replace(document, segments=tuple(segments))


@lru_cache(maxsize=4)
def _load(table: str) -> tuple[Scope, U64]:
    path = Path(table)
    about = path.with_name(path.name + ".json")
    try:
        values = json.loads(about.read_text())
        scope, count = values["scope"], values["lines"]
        if scope not in ("site", "corpus") or path.stat().st_size != 8 * count:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise MMGPTError(f"{path}: not a table of frequent lines, or not a whole one") from None
    if not count:
        return scope, np.empty(0, dtype=np.uint64)
    return scope, np.memmap(path, dtype=np.uint64, mode="r")


def _scope(folder: Path) -> Scope:
    path = folder / "lines.json"
    try:
        scope = json.loads(path.read_text())["scope"]
        if scope not in ("site", "corpus"):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise MMGPTError(f"{path}: missing or not a finished count") from None
    return "site" if scope == "site" else "corpus"


def _read(file: BinaryIO) -> Iterator[U64]:
    while data := file.read(READ_ROWS * 3 * 8):
        yield np.frombuffer(data, dtype=np.uint64).reshape(-1, 3)


def _added_up(blocks: Iterator[U64]) -> Iterator[U64]:
    """Rows (site, line, count) in order, those of one line added up."""
    waiting = np.empty((0, 3), dtype=np.uint64)
    for block in blocks:
        rows = np.concatenate([waiting, block])
        if not len(rows):
            continue
        starts = np.flatnonzero(np.insert((rows[1:, :2] != rows[:-1, :2]).any(axis=1), 0, True))
        sums = rows[starts]
        sums[:, 2] = np.add.reduceat(rows[:, 2], starts)
        waiting = sums[-1:]  # may go on in the next block
        if len(sums) > 1:
            yield sums[:-1]
    if len(waiting):
        yield waiting
