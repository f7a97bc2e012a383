"""Every source under one name: `read_samples` tells what a location holds, and reads it.

`FORMATS` is the table: a new source writes one reader and adds one row. Readers are named as `module:function`, so that
naming a format costs no import.
"""

import importlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mm_gpt.datasets.formats.interleaved import each_of
from mm_gpt.datasets.reading.archives import ARCHIVE_SUFFIXES, read_archive
from mm_gpt.datasets.reading.files import exists, is_folder, list_files, open_file, scheme_of, suffix_of
from mm_gpt.datasets.reading.rows import read_json
from mm_gpt.datasets.reading.unpacked import open_unpacked
from mm_gpt.datasets.row_samples import kind_of_row, peek_row
from mm_gpt.datasets.samples import IMAGE_SUFFIXES, ErrorCounter, Sample
from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.images import source_name

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
HEAD_BYTES = 2**20
"""A first line within these is looked at as one of JSON lines."""
_IMAGES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
_HUB = re.compile(r"hf://datasets/[^/?]+/[^/?]+/?(?:\?.*)?")
_PLACED = re.compile(r".+\.(?:metadata\.txt|\d+\.(?:text\.txt|image\.\w+))")


class Peek:
    """What can be known of a location without reading it: its files, and a first record."""

    def __init__(self, location: str) -> None:
        self.location = location

    @cached_property
    def is_hub(self) -> bool:
        return _HUB.fullmatch(self.location) is not None

    @cached_property
    def is_corpus(self) -> bool:
        inside = f"{self.location.rstrip('/')}/corpus.json"
        if scheme_of(self.location) not in ("http", "https"):
            return exists(inside)
        if suffix_of(self.location):
            return False
        try:  # a server lists nothing, so a URL without a suffix is a folder only if this is there
            open_file(inside).close()
        except MMGPTError:
            return False
        return True

    @cached_property
    def files(self) -> list[str]:
        return [] if self.is_hub else list_files(self.location)

    @cached_property
    def suffixes(self) -> set[str]:
        return {suffix_of(file) for file in self.files}

    def first(self, *suffixes: str) -> str | None:
        """The first file with one of these suffixes."""
        return next((file for file in self.files if suffix_of(file) in suffixes), None)

    @cached_property
    def has_captions(self) -> bool:
        """Whether images have a .txt or .json of their own name beside them, or there is a list of captions."""
        lists = (f"{self.location.rstrip('/')}/{name}" for name in ("captions.jsonl", "captions.csv"))
        if is_folder(self.location) and any(map(exists, lists)):
            return True
        texts = {os.path.splitext(file)[0] for file in self.files if suffix_of(file) in (".txt", ".json")}
        return any(suffix_of(f) in _IMAGES and os.path.splitext(f)[0] in texts for f in self.files)

    @cached_property
    def members(self) -> list[str]:
        """The names of the first members of the first archive."""
        archive = self.first(*ARCHIVE_SUFFIXES)
        if archive is None:
            return []
        found = itertools.islice(read_archive(archive, ErrorCounter(max_examples=0)), 64)
        return [name for name, _, _ in found]

    @cached_property
    def row(self) -> dict[str, Any]:
        """The first row of the first file of rows, or of the JSON members of an archive; {} when there is none."""
        if archive := self.first(*ARCHIVE_SUFFIXES):
            return _archived_row(archive)
        file = self.first(*ROW_SUFFIXES)
        if file is None:
            return {}
        if suffix_of(file) == ".json" and _is_one_object(file):
            return {}
        return peek_row(file) or {}

    @cached_property
    def shape(self) -> dict[str, Any]:
        """Of a JSON file that is one object: its first keys, each with its value or its list's first item."""
        file = self.first(".json")
        if file is None or self.first(*ARCHIVE_SUFFIXES) or self.first(".parquet", ".jsonl") or self.row:
            return {}
        found: dict[str, Any] = {}
        for key, item in itertools.islice(read_json(file), 64):
            found.setdefault(key, item)
        return found

    def seen(self) -> str:
        """What to tell a user whose data is not recognised."""
        if self.row:
            return f"rows with the keys {', '.join(map(repr, list(self.row)[:12]))}"
        if self.shape:
            return f"a JSON object with the keys {', '.join(map(repr, list(self.shape)[:12]))}"
        if self.members:
            return f"an archive of {', '.join(self.members[:3])}, ..."
        kinds = sorted(suffix or "(no suffix)" for suffix in self.suffixes)
        return f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}: {', '.join(kinds[:8])}"


@dataclass(frozen=True)
class Format:
    """One kind of source."""

    name: str
    about: str
    """One line for `--help`."""
    read: str
    """`module:function` below `mm_gpt.datasets`; the function is `read(location, errors, *, images)`."""
    detect: Callable[[Peek], bool]
    suffixes: tuple[str, ...] = ()
    """The reader gets each file with one of these; without any, the location as it was given."""

    def reader(self) -> Callable[..., Iterator[Sample]]:
        """The function that `read` names."""
        module, _, function = self.read.partition(":")
        found: Callable[..., Iterator[Sample]] = getattr(importlib.import_module(f"mm_gpt.datasets.{module}"), function)
        return found


def _rows(kind: str) -> Callable[[Peek], bool]:
    return lambda peek: bool(peek.row) and not peek.has_captions and kind_of_row(peek.row) == kind


def _has(*suffixes: str) -> Callable[[Peek], bool]:
    return lambda peek: bool(peek.suffixes & set(suffixes))


def _of_item(peek: Peek, key: str, *members: str) -> bool:
    """Whether a JSON object has a list `key` whose items have all `members`."""
    item = peek.shape.get(key)
    return isinstance(item, Mapping) and set(members) <= set(item)


def _is_vizwiz(peek: Peek) -> bool:
    return peek.first(".json") is not None and {"image", "question", "answers"} <= set(peek.row)


def _is_img2dataset(peek: Peek) -> bool:
    return {"key", "status"} <= set(peek.row) and bool(set(peek.row) & set(IMAGE_SUFFIXES))


def _is_captioned_archive(peek: Peek) -> bool:
    return any(os.path.splitext(name)[1].lower() in _IMAGES for name in peek.members)


def _table(*formats: Format) -> dict[str, Format]:
    return {format.name: format for format in formats}


# The first whose `detect` says yes is taken: what is named for sure comes before what is guessed from a first row.
FORMATS: dict[str, Format] = _table(
    Format("hf", "a data set of the Hugging Face hub, streamed", "row_samples:read_hf", lambda p: p.is_hub),
    Format("corpus", "a corpus that mm-gpt wrote", "building.shards:read_corpus", lambda p: p.is_corpus),
    Format(
        "warc",
        "web archives, as of Common Crawl",
        "web.warc:read_warc",
        _has(".warc"),
        (".warc",),
    ),
    Format(
        "m4",
        "tars of interleaved documents, as IDEFICS reads",
        "formats.interleaved:read_interleaved_tars",
        lambda p: any(_PLACED.fullmatch(name) for name in p.members),
        (".tar", ".tgz"),
    ),
    Format(
        "mmc4",
        "MMC4 and OpenFlamingo's shards of it",
        "formats.interleaved:read_mmc4",
        _rows("mmc4"),
        (".jsonl", ".ndjson", ".json", ".parquet", *ARCHIVE_SUFFIXES),
    ),
    Format(
        "captioned",
        "images with captions or questions: webdataset tars, img2dataset, folders",
        "formats.captioned:read_records",
        lambda p: _is_captioned_archive(p) or p.has_captions or _is_img2dataset(p),
    ),
    Format("obelics", "OBELICS", "formats.interleaved:read_obelics", _rows("obelics"), ROW_SUFFIXES),
    Format(
        "conversations",
        "LLaVA, ShareGPT, chat messages, The Cauldron, FineVision",
        "formats.conversations:read_conversations",
        _rows("conversations"),
        ROW_SUFFIXES,
    ),
    Format("grit", "GRIT: captions with boxes", "row_samples:read_grit", _rows("grit"), ROW_SUFFIXES),
    Format("vizwiz", "VizWiz-VQA", "formats.pairs:read_vizwiz", _is_vizwiz, (".json",)),
    Format("pairs", "rows with an image and a caption", "row_samples:read_pair_rows", _rows("pairs"), ROW_SUFFIXES),
    Format(
        "karpathy",
        "Karpathy's splits of COCO and Flickr (the training split)",
        "formats.pairs:read_karpathy",
        lambda p: _of_item(p, "images", "sentences"),
        (".json",),
    ),
    Format(
        "coco",
        "COCO captions",
        "formats.pairs:read_coco",
        lambda p: _of_item(p, "images", "file_name") or _of_item(p, "annotations", "image_id", "caption"),
        (".json",),
    ),
    Format(
        "vqa",
        "VQA and OK-VQA questions, with the annotations beside them",
        "formats.pairs:read_vqa",
        lambda p: _of_item(p, "questions", "question_id", "image_id"),
        (".json",),
    ),
    Format(
        "textvqa",
        "TextVQA",
        "formats.pairs:read_textvqa",
        lambda p: _of_item(p, "data", "question", "image_id"),
        (".json",),
    ),
    Format(
        "pages", "web pages: .html files or a folder of them", "web.pages:read_pages", _has(".html", ".htm", ".xhtml")
    ),
    Format("text_rows", "rows with a text", "row_samples:read_text", _rows("text"), ROW_SUFFIXES),
    Format("text", "plain text files, each a document", "row_samples:read_text", _has(".txt"), (".txt",)),
)


def read_samples(
    location: str, errors: ErrorCounter, *, format: str = "auto", images: str | None = None
) -> Iterator[Sample]:
    """The samples behind a path, URL, folder, glob or braces, in an order that never changes; bad ones are counted.

    `format` is a key of `FORMATS`, or "auto": told by names and the first record. `images` is the folder or URL prefix
    of the images that records name; by default each format's own place for them.
    Raises MMGPTError, when called, if there is nothing there or its format cannot be told.
    """
    location = os.fspath(location)
    found = detect(location) if format == "auto" else _named(format)
    read = found.reader()
    if not found.suffixes:
        return read(location, errors, images=images)
    everything = list_files(location)
    files = [file for file in everything if suffix_of(file) in found.suffixes]
    if not files and len(everything) == 1 and not is_folder(location):  # a file of another name, named by the user
        files = everything
    if not files:
        raise MMGPTError(f"{source_name(location)}: no {', '.join(found.suffixes)} file, as {found.name} has")
    return each_of(files, errors, lambda file: read(file, errors, images=images))


def detect(location: str) -> Format:
    """The format of what is there. Raises MMGPTError that tells what was seen, and what could be named."""
    peek = Peek(os.fspath(location))
    for format in FORMATS.values():
        if format.detect(peek):
            return format
    raise MMGPTError(
        f"{source_name(location)}: of no known format ({peek.seen()}); if it is one, name it: {', '.join(FORMATS)}"
    )


def _named(format: str) -> Format:
    if format not in FORMATS:
        raise MMGPTError(unknown_name("format", format, FORMATS))
    return FORMATS[format]


def _is_one_object(file: str) -> bool:
    """Whether a .json holds one object, not a list of rows and not a row in each line."""
    with open_unpacked(file) as stream:
        head = stream.read(HEAD_BYTES)
    text = head.decode("utf-8-sig", "replace").lstrip()
    if not text.startswith("{"):
        return False
    line, newline, rest = text.partition("\n")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return True
    is_row = isinstance(row, dict) and (kind_of_row(row) is not None or rest.lstrip().startswith("{"))
    return not (is_row and (newline or len(head) < HEAD_BYTES))


def _archived_row(archive: str) -> dict[str, Any]:
    members = read_archive(archive, ErrorCounter(max_examples=0))
    for name, _, stream in itertools.islice(members, 64):
        if name.endswith((".json", ".jsonl")):
            try:
                row = json.loads(stream.readline() if name.endswith(".jsonl") else stream.read())
            except (ValueError, RecursionError, MMGPTError):
                continue
            if isinstance(row, dict):
                return row
    return {}
