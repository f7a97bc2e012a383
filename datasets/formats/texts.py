"""Plain text: `.txt` files, and rows with a text."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mm_gpt.datasets.formats.interleaved import document_id, each_file
from mm_gpt.datasets.reading.files import base_name, suffix_of
from mm_gpt.datasets.reading.rows import ROW_SUFFIXES, decode_text, first_value, plain_text, read_rows
from mm_gpt.datasets.reading.unpacked import open_unpacked
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.document import Document, Text

MAX_TEXT_BYTES = 64 * 2**20
"""Of one .txt file, which is one document."""
TEXT_COLUMNS = ("text", "content", "raw_content")
_TEXT_METADATA = {"url": "url", "title": "title", "language": "language", "lang": "language", "licence": "licence"}
_TEXT_METADATA |= {"license": "licence", "source": "source", "timestamp": "timestamp", "date": "timestamp"}


def read_text(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Document]:
    """Plain text: each .txt file a document, each row of a file of rows with a `text` column another.

    Packed files (.gz, .bz2, .zst) are unpacked. Blank lines part the paragraphs. `images` has no meaning here.
    """
    del images

    def read_one(file: str) -> Iterator[Document]:
        if suffix_of(file) in ROW_SUFFIXES:
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
    return text_document({"text": decode_text(data)}, document_id(file, 1).removesuffix(":1"))


def text_document(row: Mapping[str, Any], id: str) -> Document:
    """A row with a text as a document; its `url`, `title`, `language`, ... go to `metadata`. Raises BadRecordError."""
    blocks = _paragraphs(plain_text(first_value(row, TEXT_COLUMNS)).replace("\r\n", "\n"))
    if not blocks:
        raise BadRecordError("empty text")
    inner = row.get("meta") or row.get("metadata")  # RedPajama and Dolma keep them there
    values = {**(inner if isinstance(inner, Mapping) else {}), **row}
    metadata = {ours: values[key] for key, ours in _TEXT_METADATA.items() if isinstance(values.get(key), str)}
    return Document(tuple(map(Text, blocks)), id=id, metadata=metadata)


def _paragraphs(text: str) -> list[str]:
    """The blocks between blank lines; what is indented stays so, programs and poems are texts as well."""
    blocks = re.split(r"\n(?:[^\S\n]*\n)+", text.strip())
    return [block.rstrip() for block in blocks if block.strip()]
