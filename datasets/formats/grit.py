"""GRIT: captions with boxes for their parts, as KOSMOS-2 was trained on."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mm_gpt.datasets.formats.interleaved import document_id, each_file, image_source
from mm_gpt.datasets.reading.files import base_name
from mm_gpt.datasets.reading.rows import IMAGE_COLUMNS, URL_COLUMNS, first_value, plain_text, read_rows
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, Record


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
        source = image_source(first_value(row, (*IMAGE_COLUMNS, *URL_COLUMNS)), images)
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
