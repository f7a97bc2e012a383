"""Samples from rows, whatever holds them: grounded captions (GRIT), plain text, and Hugging Face's `datasets` streamed.

`kind_of_row` tells by its keys what a row is; `samples_of_row` makes of it what the format's own reader would.
"""

import io
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mm_gpt.datasets.formats.interleaved import (
    document_id,
    each_file,
    image_source,
    mmc4_document,
    obelics_documents,
    paragraphs,
)
from mm_gpt.datasets.reading.files import base_name, folder_of, offline, scheme_of, suffix_of
from mm_gpt.datasets.reading.rows import plain_text, read_rows
from mm_gpt.datasets.reading.unpacked import open_unpacked
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter, Record, Sample, optional_import
from mm_gpt.document import Document, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

MAX_TEXT_BYTES = 64 * 2**20
"""Of one .txt file, which is one document."""
TEXT_COLUMNS = ("text", "content", "raw_content")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "raw", "alt_text", "TEXT", "top_caption")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "url", "image_url", "URL")
"""In this order: where a row has the bytes, its URL is only told in `metadata`."""
_TEXT_METADATA = {"url": "url", "title": "title", "language": "language", "lang": "language", "licence": "licence"}
_TEXT_METADATA |= {"license": "licence", "source": "source", "timestamp": "timestamp", "date": "timestamp"}


def read_grit(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Record]:
    """GRIT rows (KOSMOS-2; JSON lines, JSON or parquet): a caption, an image URL, and boxes for parts of the caption.

    `metadata["noun_chunks"]` and `metadata["ref_exps"]` are rows of (start, end, x0, y0, x1, y1, score): characters of
    the caption, the box as shares of the image. With `images`, the image is `key` or `id`, with .jpg, in that folder.
    """

    def read_one(file: str) -> Iterator[Record]:
        for number, row in read_rows(file, errors):
            try:
                yield grit_record(row, document_id(file, number), images=images)
            except BadRecordError as error:
                errors.add(str(error), f"{base_name(file)}:{number}")

    return each_file(location, errors, read_one)


def grit_record(row: Mapping[str, Any], key: str, *, images: str | None = None) -> Record:
    """One GRIT row. Raises BadRecordError, as for a box that is none or a span outside of the caption."""
    caption = row.get("caption")
    if not isinstance(caption, str) or not plain_text(caption):
        raise BadRecordError("no caption")
    # the spans count from the caption's very first character
    metadata: dict[str, Any] = {name: _boxes(row.get(name), caption) for name in ("noun_chunks", "ref_exps")}
    for name in ("url", "width", "height", "clip_similarity_vitb32", "clip_similarity_vitl14"):
        if isinstance(row.get(name), str | int | float):
            metadata[name] = row[name]
    own = row.get("key") or row.get("id")
    if images is not None and own is not None:
        source = image_source(str(own) if re.search(r"\.\w{3,4}$", str(own)) else f"{own}.jpg", images)
    else:
        source = image_source(_first(row, IMAGE_COLUMNS), images)
    return Record(str(own) if own is not None else key, source, (caption,), source="grit", metadata=metadata)


def _boxes(rows: Any, caption: str) -> list[list[float]]:
    if rows is None:
        return []
    if not isinstance(rows, list):
        raise BadRecordError("boxes are no list")
    for row in rows:
        numbers = isinstance(row, list | tuple) and len(row) == 7
        if not numbers or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in row):
            raise BadRecordError("a box is not seven numbers")
        start, end, x0, y0, x1, y1, _ = row
        if not 0 <= start < end <= len(caption):
            raise BadRecordError("a box for no part of the caption")
        if not (-0.01 <= x0 <= x1 <= 1.01 and -0.01 <= y0 <= y1 <= 1.01):  # they are rounded
            raise BadRecordError("a box outside of the image")
    return [[int(row[0]), int(row[1]), *map(float, row[2:])] for row in rows]


def read_text(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Document]:
    """Plain text: each .txt file a document, each row of .jsonl, .json or .parquet with a `text` column another.

    Packed files (.gz, .bz2, .zst) are unpacked. Blank lines part the paragraphs. `images` has no meaning here.
    """
    del images

    def read_one(file: str) -> Iterator[Document]:
        if suffix_of(file) in (".json", ".jsonl", ".ndjson", ".parquet"):
            for number, row in read_rows(file, errors):
                try:
                    yield text_document(row, document_id(file, number))
                except BadRecordError as error:
                    errors.add(str(error), f"{base_name(file)}:{number}")
            return
        try:
            yield _text_file(file)
        except BadRecordError as error:
            errors.add(str(error), base_name(file))

    return each_file(location, errors, read_one)


def _text_file(file: str) -> Document:
    with open_unpacked(file) as stream:
        data = stream.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise BadRecordError("text too long")
    try:
        row = {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError:
        raise BadRecordError("text is not UTF-8") from None
    return text_document(row, document_id(file, 1).removesuffix(":1"))


def text_document(row: Mapping[str, Any], id: str) -> Document:
    """A row with a text as a document; its `url`, `title`, `language`, ... go to `metadata`. Raises BadRecordError."""
    blocks = paragraphs(plain_text(_first(row, TEXT_COLUMNS)).replace("\r\n", "\n"))
    if not blocks:
        raise BadRecordError("empty text")
    inner = row.get("meta") or row.get("metadata")  # RedPajama and Dolma keep them there
    values = {**(inner if isinstance(inner, Mapping) else {}), **row}
    metadata = {ours: values[key] for key, ours in _TEXT_METADATA.items() if isinstance(values.get(key), str)}
    return Document(tuple(map(Text, blocks)), id=id, metadata=metadata)


# ---- Rows of any known shape ----


def kind_of_row(row: Mapping[str, Any]) -> str | None:
    """The format that a row's keys speak for: "obelics", "mmc4", "conversations", "grit", "pairs" or "text"."""
    keys = {key for key, value in row.items() if value is not None}
    if {"text_list", "image_info"} <= keys:
        return "mmc4"
    if keys & {"conversations", "messages"}:
        return "conversations"
    if "texts" in keys and isinstance(row["texts"], list):
        is_turns = any(isinstance(text, Mapping) for text in row["texts"])
        return "conversations" if is_turns else "obelics" if "images" in keys else None
    if keys & {"noun_chunks", "ref_exps"} and "caption" in keys:
        return "grit"
    if keys & {"question", "question_id", "chosen"}:  # a benchmark or preferences: its text is no caption
        return None
    if keys & set(IMAGE_COLUMNS[:6]) and keys & set(CAPTION_COLUMNS):
        return "pairs"
    if keys & set(TEXT_COLUMNS):
        return "text"
    if keys & set(IMAGE_COLUMNS) and keys & set(CAPTION_COLUMNS):
        return "pairs"
    return None


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
            return [pair_record(row, id, images=images)]
        case "text":
            return [text_document(row, id)]
        case "conversations":
            return [_conversation(row, id, errors, images)]
    raise MMGPTError(f"no rows of the kind {kind!r}")


def _conversation(row: Mapping[str, Any], id: str, errors: ErrorCounter, images: str | None) -> Conversation:
    from mm_gpt.datasets.formats.conversations import _messages, _metadata

    for name in ("images", "image"):
        if isinstance(row.get(name), list):
            row = {**row, name: [_file_bytes(value) for value in row[name]]}
        elif row.get(name) is not None:
            row = {**row, name: _file_bytes(row[name])}
    # without a folder of images nothing may be named: no file lies in a device
    messages = _messages(row, os.devnull if images is None else images, {}, errors, id)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError("no answer")
    key = row.get("id")
    return Conversation(str(key) if isinstance(key, str | int) else id, tuple(messages), metadata=_metadata(row))


def _file_bytes(source: Any) -> Any:
    """A decoded picture as a file again, without loss; anything else as it is."""
    if not hasattr(source, "getexif"):
        return source
    packed = io.BytesIO()
    source.save(packed, "PNG")
    return packed.getvalue()


def read_pair_rows(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Record]:
    """Rows (JSON lines, JSON, parquet) with an image and a caption or several.

    The image is bytes, a URL, or the name of a file in `images`, by default the folder that holds the rows.
    """

    def read_one(file: str) -> Iterator[Record]:
        folder = folder_of(file) if images is None else images
        for number, row in read_rows(file, errors):
            try:
                yield pair_record(row, document_id(file, number), images=folder)
            except BadRecordError as error:
                errors.add(str(error), f"{base_name(file)}:{number}")

    return each_file(location, errors, read_one)


def pair_record(row: Mapping[str, Any], key: str, *, images: str | None = None) -> Record:
    """A row with an image and its captions as a Record. Raises BadRecordError."""
    said = _first(row, CAPTION_COLUMNS)
    texts = [plain_text(text) for text in (said if isinstance(said, list) else [said])]
    captions = tuple(dict.fromkeys(text for text in texts if text))
    if not captions:
        raise BadRecordError("no captions")
    source = _file_bytes(image_source(_first(row, IMAGE_COLUMNS), images))
    url = next((row[name] for name in ("url", "image_url", "URL") if isinstance(row.get(name), str)), None)
    return Record(key, source, captions, metadata={"url": url} if url else {})


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


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
    yield from from_hf_dataset(dataset, errors, name=found[1], kind=options.get("kind"), images=images)


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
    the first row tells. Image columns stay undecoded. Files that rows name must lie in the folder `images`.
    Raises MMGPTError for rows of no known kind, when the data set has no splits chosen, and where reading it fails.
    """
    name = name or str(getattr(getattr(dataset, "info", None), "dataset_name", None) or "dataset")
    if isinstance(dataset, Mapping):
        raise MMGPTError(f"{name}: choose one of the splits {', '.join(map(str, dataset))}")
    rows = iter(_undecoded(dataset))
    number = 0
    while True:
        number += 1
        try:
            row = next(rows, None)
        except Exception as error:  # of pyarrow, fsspec, aiohttp, or the hub
            raise MMGPTError(f"{name}:{number}: {' '.join(str(error).split())[:300]}") from None
        if row is None:
            return
        row = {(columns or {}).get(key, key): value for key, value in row.items()}
        kind = kind or kind_of_row(row)
        if kind is None:
            raise MMGPTError(
                f"{name}: no known kind of rows (columns {', '.join(map(str, row))}); rename some, or say it"
            )
        try:
            yield from samples_of_row(_below(row, images), kind, f"{name}:{number}", errors, images=images)
        except BadRecordError as error:
            errors.add(str(error), f"{name}:{number}")


def _undecoded(dataset: Any) -> Any:
    """The data set with its pictures as bytes: decoding is left to checked code, and to when they are needed."""
    hf = optional_import("datasets")
    features = getattr(dataset, "features", None)
    if features is None:
        return dataset

    def plain(feature: Any) -> Any:
        if isinstance(feature, hf.Image):
            return hf.Image(decode=False)
        if isinstance(feature, Mapping):
            return {key: plain(value) for key, value in feature.items()}
        if isinstance(feature, list):
            return [plain(value) for value in feature]
        inner = getattr(feature, "feature", None)
        return type(feature)(plain(inner)) if inner is not None and getattr(feature, "length", -1) == -1 else feature

    changed = hf.Features({key: plain(feature) for key, feature in features.items()})
    return dataset if changed == features else dataset.cast(changed)


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


def peek_row(location: str) -> dict[str, Any] | None:
    """The first row of a file of rows, None when there is none. Raises MMGPTError when it cannot be opened."""
    return next((row for _, row in read_rows(location, ErrorCounter(max_examples=0))), None)
