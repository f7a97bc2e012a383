"""Texts with a label, for classification: rows of JSON, CSV or parquet. A row is a Document that keeps it whole."""

from collections.abc import Iterator

from mm_gpt.datasets.formats.interleaved import each_file
from mm_gpt.datasets.reading.files import base_name
from mm_gpt.datasets.reading.rows import read_rows
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Document, Text

ROW = "row"
"""Of a document's metadata: the row as it was written."""


def read_labelled(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Document]:
    """Every row with its texts as segments and `metadata["row"]`. What a task makes of it is the task's to check."""
    del images

    def read_one(file: str) -> Iterator[Document]:
        for number, row in read_rows(file, errors):
            texts = [Text(value) for key, value in row.items() if key != "label" and isinstance(value, str)]
            yield Document(tuple(texts), id=f"{base_name(file)}:{number}", metadata={ROW: row})

    return each_file(location, errors, read_one)
