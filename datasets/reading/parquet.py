"""Rows of parquet files and of other Arrow tables, as a stream."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from mm_gpt.datasets.reading.files import base_name, open_file
from mm_gpt.datasets.samples import ErrorCounter, optional_import
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

PARQUET_ROWS = 32
"""Are decoded at a time: rows with images are megabytes each."""


def read_parquet(location: str, errors: ErrorCounter) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a parquet file. Raises MMGPTError when it cannot be opened or is none."""
    parquet, arrow = optional_import("pyarrow.parquet"), optional_import("pyarrow")
    with open_file(location, seekable=True) as stream:
        numbers = itertools.count(1)
        try:
            file = parquet.ParquetFile(stream)
        except (arrow.ArrowException, OSError) as error:
            raise MMGPTError(f"{source_name(location)}: not a readable parquet file ({_line(error)})") from None
        try:
            for batch in file.iter_batches(PARQUET_ROWS, columns=_plain_columns(file), use_threads=False):
                yield from rows_of_table(batch, numbers, base_name(location), errors)
        except (arrow.ArrowException, OSError) as error:
            errors.add("broken parquet, rest of it unread", f"{base_name(location)} ({_line(error)})")


def _plain_columns(file: Any) -> list[str]:
    """The paths of the columns of a parquet file, nested ones as well, whose values are plain."""
    found = [leaf for column in file.schema_arrow for leaf in _leaves(column.type)]
    return [file.schema.column(at).path for at, leaf in enumerate(found) if _is_plain(leaf)]


def _leaves(type: Any) -> Iterator[Any]:
    """The types inside an Arrow type, in the order in which parquet has their columns."""
    types = optional_import("pyarrow.types")
    if types.is_struct(type):
        for number in range(type.num_fields):
            yield from _leaves(type.field(number).type)
    elif types.is_map(type):
        yield from (*_leaves(type.key_type), *_leaves(type.item_type))
    elif hasattr(type, "storage_type"):  # an extension
        yield from _leaves(type.storage_type)
    elif hasattr(type, "value_type"):
        yield from _leaves(type.value_type)
    else:
        yield type


def _is_plain(type: Any) -> bool:
    """Whether an Arrow type holds text, bytes, numbers or truth values: nothing else is used of rows, and Python cannot
    hold all the dates, times and durations that others can.
    """
    types = optional_import("pyarrow.types")
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    views = (types.is_string_view, types.is_binary_view, types.is_fixed_size_binary)
    numbers = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return any(test(type) for test in (*texts, *views, *numbers))


def rows_of_table(
    table: Any, numbers: Iterator[int], name: str, errors: ErrorCounter
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of an Arrow table or batch, without columns that have no plain value. A row that holds what Python
    cannot is counted.
    """
    arrow = optional_import("pyarrow")
    unreadable = (arrow.ArrowException, ValueError, OverflowError, TypeError, LookupError, RecursionError)
    table = table.select([column.name for column in table.schema if any(map(_is_plain, _leaves(column.type)))])
    packed = {column.name: column.type for column in table.schema if "arrow.json" in str(column.type)}

    def rows_of(part: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = part.to_pylist()
        for row in rows if packed else ():
            row.update({column: _unpacked(row[column], type) for column, type in packed.items()})
        return rows

    try:
        rows = rows_of(table)
    except unreadable:
        for at, number in enumerate(itertools.islice(numbers, table.num_rows)):
            try:
                (row,) = rows_of(table.slice(at, 1))
            except unreadable as error:
                errors.add("unreadable row", f"{name}:{number} ({_line(error)})")
            else:
                yield number, row
    else:
        yield from zip(itertools.islice(numbers, len(rows)), rows, strict=True)


def _unpacked(value: Any, type: Any) -> Any:
    """`value` with the values that Arrow keeps as JSON, those whose kind changes from row to row."""
    if isinstance(value, str) and getattr(type, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if isinstance(value, dict):
        return {key: _unpacked(item, type.field(key).type) for key, item in value.items()}
    if isinstance(value, list) and hasattr(type, "value_type"):
        return [_unpacked(item, type.value_type) for item in value]
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
