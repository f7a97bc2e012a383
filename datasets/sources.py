"""Every source under one name: `read_samples` tells what a location holds, reads it, and checks what was read.

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

from mm_gpt.datasets.formats.captioned import CAPTION_LISTS, NO_CAPTIONS
from mm_gpt.datasets.formats.interleaved import each_of
from mm_gpt.datasets.reading.archives import ARCHIVE_SUFFIXES, read_archive
from mm_gpt.datasets.reading.files import exists, is_folder, list_files, open_file, scheme_of, suffix_of
from mm_gpt.datasets.reading.rows import ROW_SUFFIXES, parse_json, read_json, read_rows
from mm_gpt.datasets.reading.unpacked import MAX_LINE_BYTES, lines_of, open_unpacked
from mm_gpt.datasets.row_samples import HEAD_ROWS, kind_of_row
from mm_gpt.datasets.samples import (
    IMAGE_SUFFIXES,
    UNREAD_PICTURES,
    UNREAD_SUFFIXES,
    BadRecordError,
    ErrorCounter,
    Sample,
    checked,
)
from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.images import source_name

HEAD_FILES = 8
"""So many files of rows are looked into for a row of a known kind."""
HEAD_BYTES = 2**20
"""A first line within these is looked at as one of JSON lines."""
_IMAGES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
_PICTURES = (*_IMAGES, *UNREAD_PICTURES)
_HUB = re.compile(r"hf://datasets/[^/?]+/[^/?]+/?(?:\?.*)?")
_PLACED = re.compile(r".+\.(?:metadata\.txt|\d+\.(?:text\.txt|image\.\w+))")


class SourceInfo:
    """What `detect` looks at: the files behind a location, and the first of what is in them."""

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
        lists = (f"{self.location.rstrip('/')}/{name}" for name in CAPTION_LISTS)
        if is_folder(self.location) and any(map(exists, lists)):
            return True
        texts = {os.path.splitext(file)[0] for file in self.files if suffix_of(file) in (".txt", ".json")}
        # beside pictures that are not read as well: their captions are no texts
        return any(suffix_of(f) in _PICTURES and os.path.splitext(f)[0] in texts for f in self.files)

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
        """The first row of a known kind in the files of rows or in the JSON members of an archive, else the first row.

        {} when there is none. Raises MMGPTError when there are files of rows and none can be read.
        """
        if archive := self.first(*ARCHIVE_SUFFIXES):
            return _archived_row(archive)
        files = [file for file in self.files if suffix_of(file) in ROW_SUFFIXES and file not in self.objects]
        first, failed = dict[str, Any](), []
        for file in files[:HEAD_FILES]:
            try:
                for _, row in itertools.islice(read_rows(file, ErrorCounter(max_examples=0)), HEAD_ROWS):
                    first = first or row
                    if kind_of_row(row):
                        return row
            except MMGPTError as error:
                failed.append(error)
        if failed and len(failed) == len(files):
            raise failed[0]
        return first

    @cached_property
    def objects(self) -> list[str]:
        """The first JSON files, as far as each is one object."""
        files = [file for file in self.files if suffix_of(file) == ".json"]
        return [file for file in files[:HEAD_FILES] if _is_one_object(file)]

    @cached_property
    def shape(self) -> dict[str, Any]:
        """Of a JSON file that is one object: its first keys, each with its value or its list's first item."""
        if not self.objects or self.first(*ARCHIVE_SUFFIXES) or kind_of_row(self.row):
            return {}
        found: dict[str, Any] = {}
        for key, item in itertools.islice(read_json(self.objects[0]), 64):
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
    detect: Callable[[SourceInfo], bool]
    suffixes: tuple[str, ...] = ()
    """The reader gets each file with one of these; without any, the location as it was given."""
    has_side_files: bool = False
    """What else is in the folder belongs to its files, as the films of a page do: it is not told of."""

    def reader(self) -> Callable[..., Iterator[Sample]]:
        """The function that `read` names."""
        module, _, function = self.read.partition(":")
        found: Callable[..., Iterator[Sample]] = getattr(importlib.import_module(f"mm_gpt.datasets.{module}"), function)
        return found


def _is_rows(info: SourceInfo) -> bool:
    return info.first(*ARCHIVE_SUFFIXES) is None and kind_of_row(info.row) is not None


def _is_mmc4_archive(info: SourceInfo) -> bool:
    return info.first(*ARCHIVE_SUFFIXES) is not None and kind_of_row(info.row) == "mmc4"


def _when_named(info: SourceInfo) -> bool:
    """Rows tell their kind one by one; who names a kind gets all of them as that."""
    del info
    return False


def _has(*suffixes: str) -> Callable[[SourceInfo], bool]:
    return lambda info: bool(info.suffixes & set(suffixes))


def _is_texts(info: SourceInfo) -> bool:
    return ".txt" in info.suffixes and not info.suffixes & set(_PICTURES)


def _of_item(info: SourceInfo, key: str, *members: str) -> bool:
    """Whether a JSON object has a list `key` whose items have all `members`."""
    item = info.shape.get(key)
    return isinstance(item, Mapping) and set(members) <= set(item)


def _is_vizwiz(info: SourceInfo) -> bool:
    return info.first(".json") is not None and {"image", "question", "answers"} <= set(info.row)


def _is_img2dataset(info: SourceInfo) -> bool:
    return {"key", "status"} <= set(info.row) and bool(set(info.row) & set(IMAGE_SUFFIXES))


def _is_captioned_archive(info: SourceInfo) -> bool:
    has_images = any(os.path.splitext(name)[1].lower() in _IMAGES for name in info.members)
    return has_images or bool(info.members and "concepts" in info.row)


def _table(*formats: Format) -> dict[str, Format]:
    return {format.name: format for format in formats}


# The first whose `detect` says yes is taken: what is named for sure comes before what is guessed from a first row.
FORMATS: dict[str, Format] = _table(
    Format("hf", "a data set of the Hugging Face hub, streamed", "row_samples:read_hf", lambda p: p.is_hub, (), True),
    Format("corpus", "a corpus that mm-gpt wrote", "building.shards:read_corpus", lambda p: p.is_corpus, (), True),
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
        _is_mmc4_archive,
        (".jsonl", ".ndjson", ".json", ".parquet", *ARCHIVE_SUFFIXES),
    ),
    Format(
        "captioned",
        "images with captions or questions: webdataset tars, img2dataset, folders",
        "formats.captioned:read_records",
        lambda p: _is_captioned_archive(p) or p.has_captions or _is_img2dataset(p),
    ),
    Format(
        "rows",
        "rows (JSON, CSV, parquet) of the seven kinds below, mixed too; image folders with metadata of Hugging Face",
        "row_samples:read_any_rows",
        _is_rows,
        ROW_SUFFIXES,
    ),
    Format("obelics", "OBELICS", "formats.interleaved:read_obelics", _when_named, ROW_SUFFIXES),
    Format(
        "conversations",
        "LLaVA, ShareGPT, chat messages, The Cauldron, FineVision",
        "formats.conversations:read_conversations",
        _when_named,
        ROW_SUFFIXES,
    ),
    Format(
        "comparisons",
        "prompts with answers and which is better: TRL, RLAIF-V, LLaVA-RLHF, HH",
        "formats.preferences:read_comparisons",
        _when_named,
        ROW_SUFFIXES,
    ),
    Format("grit", "GRIT: captions with boxes", "formats.grit:read_grit", _when_named, ROW_SUFFIXES),
    Format("pairs", "rows with images and captions", "row_samples:read_pair_rows", _when_named, ROW_SUFFIXES),
    Format("text_rows", "rows with a text", "formats.texts:read_text", _when_named, ROW_SUFFIXES),
    Format("labelled", "rows of texts with a label", "formats.labelled:read_labelled", _when_named, ROW_SUFFIXES),
    Format("vizwiz", "VizWiz-VQA", "formats.pairs:read_vizwiz", _is_vizwiz, (".json",)),
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
        "pages",
        "web pages: .html files or a folder of them",
        "web.pages:read_pages",
        _has(".html", ".htm", ".xhtml"),
        has_side_files=True,
    ),
    Format("text", "plain text files, each a document", "formats.texts:read_text", _is_texts, (".txt",)),
)


def read_samples(
    location: str, errors: ErrorCounter, *, format: str = "auto", images: str | None = None
) -> Iterator[Sample]:
    """The samples behind a path, URL, folder, glob or braces, in an order that never changes; bad ones are counted,
    those with half a character in a text among them, and so are the files of a folder that no reader takes.

    `format` is a key of `FORMATS`, or "auto": told by names, by the first records, and of rows one by one. `images` is
    the folder or URL prefix of the images that records name; by default each format's own place for them.
    Raises MMGPTError, when called, if there is nothing there or its format cannot be told.
    """
    location = os.fspath(location)
    found = detect(location) if format == "auto" else _named(format)
    read = found.reader()
    if not found.suffixes:
        return _whole(location, found, read(location, errors, images=images), errors)
    everything = list_files(location)
    files = [file for file in everything if suffix_of(file) in found.suffixes]
    if not files and len(everything) == 1 and not is_folder(location):  # a file of another name, named by the user
        files = everything
    if not files:
        raise MMGPTError(f"{source_name(location)}: no {', '.join(found.suffixes)} file, as {found.name} has")
    return _whole(location, found, each_of(files, errors, lambda file: read(file, errors, images=images)), errors)


def _whole(location: str, format: Format, samples: Iterator[Sample], errors: ErrorCounter) -> Iterator[Sample]:
    yield from checked(samples, errors)
    count_unread(location, format, errors)


def count_unread(location: str, format: Format, errors: ErrorCounter) -> None:
    """Count the files of a folder that no reader takes, such as films: what was left out is told."""
    if format.has_side_files or not is_folder(location):
        return
    for file in list_files(location):
        if suffix_of(file) in UNREAD_SUFFIXES:
            errors.add(f"file that is not read ({suffix_of(file)})", source_name(file))


def detect(location: str) -> Format:
    """The format of what is there. Raises MMGPTError that tells what was seen, and what could be named."""
    info = SourceInfo(os.fspath(location))
    for format in FORMATS.values():
        if format.detect(info):
            return format
    if not info.row and not info.shape and (images := sum(suffix_of(file) in _IMAGES for file in info.files)):
        raise MMGPTError(f"{source_name(location)}: {images:,} {NO_CAPTIONS}")
    raise MMGPTError(
        f"{source_name(location)}: of no known format ({info.seen()}); if it is one, name it: {', '.join(FORMATS)}"
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
    """The first row of a known kind in the JSON members, else the first row."""
    errors, first = ErrorCounter(max_examples=0), dict[str, Any]()
    for name, size, stream in itertools.islice(read_archive(archive, errors), 64):
        lines: Iterator[tuple[int, bytes]]
        if name.endswith(".jsonl"):
            lines = itertools.islice(lines_of(stream, name, errors), HEAD_ROWS)
        elif name.endswith(".json") and size <= MAX_LINE_BYTES:
            try:
                lines = iter([(1, stream.read())])
            except MMGPTError:
                continue
        else:
            continue
        for _, line in lines:
            try:
                row = parse_json(line)
            except BadRecordError:
                continue
            if isinstance(row, dict):
                first = first or row
                if kind_of_row(row):
                    return row
    return first
