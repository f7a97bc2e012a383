"""Samples from rows, whatever holds them: each row of the kind that its own keys tell, in files and in Hugging Face's
`datasets`; and rows with images and captions.

`kind_of_row` tells by its keys what a row is; `samples_of_row` makes of it what the format's own reader would.
"""

import io
import itertools
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mm_gpt.datasets.formats.conversations import MARKER, conversation_of
from mm_gpt.datasets.formats.grit import grit_record
from mm_gpt.datasets.formats.interleaved import (
    document_id,
    each_file,
    image_source,
    mmc4_document,
    obelics_documents,
)
from mm_gpt.datasets.formats.preferences import as_conversation, comparison_of, is_comparison
from mm_gpt.datasets.formats.texts import TEXT_COLUMNS, text_document
from mm_gpt.datasets.reading.files import base_name, folder_of, offline, scheme_of
from mm_gpt.datasets.reading.parquet import rows_of_table
from mm_gpt.datasets.reading.rows import (
    IMAGE_COLUMNS,
    URL_COLUMNS,
    first_value,
    is_empty,
    plain_text,
    read_rows,
)
from mm_gpt.datasets.samples import (
    BadRecordError,
    Conversation,
    ErrorCounter,
    Record,
    Sample,
    checked,
    optional_import,
)
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "raw", "alt_text", "TEXT", "top_caption")
_WITH_FILES = ("pairs", "conversations", "comparisons")
HEAD_ROWS = 64
"""So many are looked at for one of a known kind."""


def kind_of_row(row: Mapping[str, Any]) -> str | None:
    """What a row's keys speak for: "obelics", "mmc4", "conversations", "comparisons", "grit", "pairs", "text", or
    None.

    Keys without a value count where those that have one tell nothing: a null caption is a caption that is missing.
    """
    return _kind_of_keys({key for key, value in row.items() if not is_empty(value)}, row) or _kind_of_keys({*row}, row)


def _kind_of_keys(keys: set[str], row: Mapping[str, Any]) -> str | None:
    if is_comparison(keys):
        return "comparisons"
    if {"text_list", "image_info"} <= keys:
        return "mmc4"
    if keys & {"conversations", "messages"}:
        return "conversations"
    if "texts" in keys and isinstance(row["texts"], list):
        is_turns = any(isinstance(text, Mapping) for text in row["texts"])
        return "conversations" if is_turns else "obelics" if "images" in keys else None
    if "prompt" in keys and isinstance(row["prompt"], list):
        return "comparisons"
    if keys & {"noun_chunks", "ref_exps"} and "caption" in keys:
        return "grit"
    if keys & {"question", "question_id", "chosen"}:  # a benchmark: its text is no caption
        return "comparisons" if "prompt" in keys else None
    is_caption = keys & set(CAPTION_COLUMNS)
    if is_caption and (keys & set(IMAGE_COLUMNS) or any(map(_is_image_list, keys))):
        return "pairs"
    if keys & set(TEXT_COLUMNS):
        return "text"
    if is_caption and keys & set(URL_COLUMNS):
        return "pairs"
    return "comparisons" if "prompt" in keys else None


def _is_image_list(column: str) -> bool:
    """Whether a column holds several images, or one of several. The image folders of Hugging Face's `datasets` have
    `file_names`, `*_file_name` and `*_file_names`.
    """
    return column in ("images", "file_names") or column.endswith(("_file_name", "_file_names"))


def samples_of_row(
    row: Mapping[str, Any], kind: str, id: str, errors: ErrorCounter, *, images: str | None = None
) -> list[Sample]:
    """The samples of one row of `kind` (see `kind_of_row`). Raises BadRecordError."""
    match kind:
        case "obelics":
            return [*obelics_documents(row, id, id, errors, images=images)]
        case "mmc4":
            return [mmc4_document(row, id, id, errors, images=images)]
        case "grit":
            return [grit_record(row, id, images=images)]
        case "pairs":
            return [pair_sample(row, id, images=images)]
        case "text":
            return [text_document(row, id)]
        case "conversations":
            return [_conversation(row, id, errors, images)]
        case "comparisons":
            return [_comparison(row, id, errors, images)]
    raise MMGPTError(f"no rows of the kind {kind!r}")


def read_any_rows(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Sample]:
    """The rows of files of rows, each of the kind that its own keys tell: see `kind_of_row`. Files may mix them.

    Rows of no known kind are counted; a file that begins with `HEAD_ROWS` of those is counted as one, and left.
    `images` is the folder or URL prefix of named images, by default the one that holds the file.
    """

    def read_one(file: str) -> Iterator[Sample]:
        rows = read_rows(file, errors)
        head: list[tuple[int, dict[str, Any]]] = []
        for numbered in itertools.islice(rows, HEAD_ROWS):
            head.append(numbered)
            if kind_of_row(numbered[1]):
                break
        else:
            if head:
                raise MMGPTError(f"{source_name(file)}: rows of no known kind (keys {_few(head[0][1])})")
        for number, row in itertools.chain(head, rows):
            kind = kind_of_row(row)
            # the others name images on the web, and files only in a folder that was given for them
            folder = folder_of(file) if images is None and kind in _WITH_FILES else images
            try:
                if kind is None:
                    raise BadRecordError("row of no known kind")
                yield from samples_of_row(row, kind, document_id(file, number), errors, images=folder)
            except BadRecordError as error:
                errors.add(str(error), f"{base_name(file)}:{number}")

    return each_file(location, errors, read_one)


def _few(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in itertools.islice(names, 12))


def _conversation(row: Mapping[str, Any], id: str, errors: ErrorCounter, images: str | None) -> Conversation:
    return conversation_of(_encoded(row), id, errors, _folder(images))


def _comparison(row: Mapping[str, Any], id: str, errors: ErrorCounter, images: str | None) -> Conversation:
    return as_conversation(comparison_of(_encoded(row), id, errors, _folder(images)))


def _folder(images: str | None) -> str:
    """Without a folder of images nothing may be named: no file lies in a device."""
    return os.devnull if images is None else images


def _encoded(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with decoded pictures as files."""
    for name in ("images", "image"):
        if isinstance(row.get(name), list):
            row = {**row, name: [_file_bytes(value) for value in row[name]]}
        elif row.get(name) is not None:
            row = {**row, name: _file_bytes(row[name])}
    return row


def _file_bytes(source: Any) -> Any:
    """A decoded picture as a file again, without loss; anything else as it is."""
    if not hasattr(source, "getexif"):
        return source
    packed = io.BytesIO()
    source.save(packed, "PNG")
    return packed.getvalue()


def read_pair_rows(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Record | Document]:
    """Rows with an image or several, and a caption or several.

    An image is bytes, a URL, or the name of a file in `images`, by default the folder that holds the rows.
    """

    def read_one(file: str) -> Iterator[Record | Document]:
        folder = folder_of(file) if images is None else images
        for number, row in read_rows(file, errors):
            try:
                yield pair_sample(row, document_id(file, number), images=folder)
            except BadRecordError as error:
                errors.add(str(error), f"{base_name(file)}:{number}")

    return each_file(location, errors, read_one)


def pair_sample(row: Mapping[str, Any], key: str, *, images: str | None = None) -> Record | Document:
    """A row with an image and its captions as a Record; one with several images as a Document. Raises BadRecordError.

    Several images stand at the `<image>`s of the caption, each before its own of as many captions, or else all before
    the only caption.
    """
    said = first_value(row, CAPTION_COLUMNS)
    texts = [plain_text(text) for text in (said if isinstance(said, list) else [said]) if text is not None]
    captions = tuple(dict.fromkeys(text for text in texts if text))
    if not captions:
        raise BadRecordError("no captions")
    several = [value for name, value in row.items() if _is_image_list(name) and not is_empty(value)]
    named = [one for value in several for one in (value if isinstance(value, list) else [value])]
    if (own := first_value(row, (*IMAGE_COLUMNS, *(() if named else URL_COLUMNS)))) is not None:
        named.insert(0, own)
    sources = [_file_bytes(image_source(value, images)) for value in named or [None]]
    url = next((row[name] for name in URL_COLUMNS if isinstance(row.get(name), str)), None)
    metadata = {"url": url} if url else {}
    if len(sources) == 1:
        return Record(key, sources[0], captions, metadata=metadata)
    marked = captions[0].split(MARKER)
    if len(captions) == 1 and len(marked) == len(sources) + 1:
        parts = [marked[0], *(part for pair in zip(map(Image, sources), marked[1:], strict=True) for part in pair)]
    elif len(texts) == len(sources):
        parts = [part for pair in zip(map(Image, sources), texts, strict=True) for part in pair]
    elif len(captions) == 1:
        parts = [*map(Image, sources), captions[0]]
    else:
        raise BadRecordError("several images and another number of captions")
    segments = (part if isinstance(part, Image) else Text(part.strip()) for part in parts if part)
    return Document(tuple(segments), id=key, metadata=metadata)


# ---- Hugging Face's datasets ----


def read_hf(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Sample]:
    """A data set of the hub, streamed: `hf://datasets/OWNER/NAME[@REVISION][?config=NAME&split=train&kind=obelics]`.

    See `from_hf_dataset`. No code of the data set is run. Raises MMGPTError when it cannot be opened.
    """
    found = re.fullmatch(r"hf://datasets/([^/@?]+/[^/@?]+)(?:@([^/?]+))?/?(?:\?(.*))?", location)
    if found is None:
        raise MMGPTError(f"{source_name(location)}: not hf://datasets/OWNER/NAME")
    if offline():
        raise MMGPTError(f"{source_name(location)}: MM_GPT_OFFLINE is set")
    options = dict(urllib.parse.parse_qsl(found[3] or ""))
    if unknown := set(options) - {"config", "split", "kind"}:
        raise MMGPTError(f"{source_name(location)}: unknown option {min(unknown)!r} (known: config, kind, split)")
    load_dataset = optional_import("datasets").load_dataset
    try:
        dataset = load_dataset(
            found[1], options.get("config"), split=options.get("split", "train"), revision=found[2], streaming=True
        )
    except Exception as error:  # the hub, the network and the data set each have errors of their own
        raise MMGPTError(f"{source_name(location)}: {' '.join(str(error).split())[:300]}") from None
    yield from _samples_of(dataset, errors, name=found[1], kind=options.get("kind"), images=images)


def from_hf_dataset(
    dataset: Any,
    errors: ErrorCounter,
    *,
    columns: Mapping[str, str] | None = None,
    kind: str | None = None,
    name: str = "",
    images: str | None = None,
) -> Iterator[Sample]:
    """The samples of a `Dataset` or `IterableDataset` of Hugging Face's `datasets`, in its order.

    `columns` renames: `{"their name": "ours"}`, as in `{"txt": "caption"}`. `kind` is one of `kind_of_row`; by default
    each row tells by itself. Image columns stay undecoded. Files that rows name must lie in the folder `images`.
    Raises MMGPTError when the first `HEAD_ROWS` are of no known kind, when the data set has no splits chosen, and where
    reading it fails. A row that holds what Python cannot is counted.
    """
    return checked(_samples_of(dataset, errors, columns=columns, kind=kind, name=name, images=images), errors)


def _samples_of(
    dataset: Any,
    errors: ErrorCounter,
    *,
    columns: Mapping[str, str] | None = None,
    kind: str | None = None,
    name: str = "",
    images: str | None = None,
) -> Iterator[Sample]:
    name = name or str(getattr(getattr(dataset, "info", None), "dataset_name", None) or "dataset")
    if isinstance(dataset, Mapping):
        raise MMGPTError(f"{name}: choose one of the splits {', '.join(map(str, dataset))}")
    known, row = kind is not None, None
    for number, row in _dataset_rows(dataset, name, errors):
        row = {(columns or {}).get(key, key): value for key, value in row.items()}
        own = kind or kind_of_row(row)
        known = known or own is not None
        if not known and number >= HEAD_ROWS:
            break
        try:
            if own is None:
                raise BadRecordError("row of no known kind")
            yield from samples_of_row(_below(row, images), own, f"{name}:{number}", errors, images=images)
        except BadRecordError as error:
            errors.add(str(error), f"{name}:{number}")
    if not known and row is not None:
        raise MMGPTError(f"{name}: no known kind of rows (columns {_few(row)}); rename some, or say it")


def _dataset_rows(dataset: Any, name: str, errors: ErrorCounter) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row). Pictures stay file bytes: decoding is left to checked code, and to when they are needed.

    Raises MMGPTError where reading fails: what would follow is unknown.
    """
    # As Arrow tables nothing is decoded, and columns that Python cannot hold are left before it has to.
    is_table = hasattr(dataset, "with_format") and getattr(dataset, "features", None) is not None
    rows = iter(dataset.with_format("arrow") if is_table else dataset)
    numbers = itertools.count(1)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # of pyarrow, fsspec, aiohttp, or the hub
            raise MMGPTError(f"{name}:{next(numbers)}: {' '.join(str(error).split())[:300]}") from None
        if row is None:
            return
        yield from rows_of_table(row, numbers, name, errors) if is_table else [(next(numbers), row)]


def _below(row: dict[str, Any], images: str | None) -> dict[str, Any]:
    """Full paths, as the image-folder builder writes them, as names in `images`."""
    if images is None or scheme_of(images):
        return row

    def short(value: Any) -> Any:
        if isinstance(value, dict) and not value.get("bytes") and isinstance(value.get("path"), str):
            path = Path(value["path"])
            if path.is_absolute() and path.is_relative_to(Path(images).absolute()):
                return {**value, "path": str(path.relative_to(Path(images).absolute()))}
        return [short(v) for v in value] if isinstance(value, list) else value

    return {key: short(value) for key, value in row.items()}
