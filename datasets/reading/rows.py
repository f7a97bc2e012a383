"""Rows of JSON lists, JSON lines and CSV files as a stream, and the images that rows name.

A COCO or LLaVA file is one JSON value of several hundred megabytes. It is parsed item by item from a sliding window, so
that no more than one item and the window are in memory.
"""

import codecs
import csv
import json
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from mm_gpt.datasets.reading.files import base_name, is_remote, resolve, suffix_of
from mm_gpt.datasets.reading.parquet import read_parquet
from mm_gpt.datasets.reading.unpacked import open_unpacked, read_lines
from mm_gpt.datasets.samples import IMAGE_SUFFIXES, BadRecordError, ErrorCounter
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
IMAGE_COLUMNS = ("image", "file_name", *IMAGE_SUFFIXES, "img")
URL_COLUMNS = ("url", "image_url", "URL")
"""Of an image, where a row has no other: elsewhere they are only told in `metadata`."""
MAX_ITEM_CHARS = 64 * 2**20
"""Of one value inside a JSON file; a longer one is refused."""
WINDOW_BYTES = 2**18
MAX_CELL_LINES = 1000
"""Of one cell of a CSV file: a quote that is never closed must not take the whole file."""


def read_rows(location: str, errors: ErrorCounter) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a `.parquet`, `.csv` or `.tsv`, of a JSON list of objects or of JSON lines (any name).

    The number of a line or cell is its line's. What is not an object is counted and skipped, as is a broken line.
    Raises MMGPTError when the file cannot be opened, or is a JSON list with an error in it: what follows is unknown.
    """
    match suffix_of(location):
        case ".parquet":
            yield from read_parquet(location, errors)
            return
        case ".csv" | ".tsv":
            yield from read_csv(location, errors)
            return
    values = enumerate((value for _, value in read_json(location)), start=1) if _is_list(location) else None
    for number, value in values or _json_lines(location, errors):
        if isinstance(value, dict):
            yield number, value
        else:
            errors.add("JSON is not an object", f"{base_name(location)}:{number}")


def read_json(location: str) -> Iterator[tuple[str, Any]]:
    """The items of a JSON file as (key, value): of a list with an empty key, of an object under their keys, where a
    member that is a list comes item by item, and any other as a whole.

    Raises MMGPTError when the file cannot be opened, and where it stops being JSON.
    """
    with open_unpacked(location) as stream:
        parser = _Parser(stream, source_name(location))
        match parser.peek():
            case "[":
                yield from (("", value) for value in parser.items())
            case "{":
                yield from parser.members()
            case _:
                raise parser.error("neither a list nor an object")
        if parser.peek():
            raise parser.error("more than one JSON value")


def read_csv(
    location: str, errors: ErrorCounter, *, columns: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line of its start, row) of a CSV file (RFC 4180) whose first line names the columns; `.tsv` has tabs for commas.

    Nothing is guessed: a row with a stray quote, with more or fewer cells than columns, with a cell over 131,072
    characters, or in another encoding than UTF-8 is counted, and reading goes on in the line after its first. Empty
    cells are None. Raises MMGPTError when it cannot be opened, and for a first line that is broken or lacks `columns`.
    """
    _head(location)
    name = base_name(location)
    delimiter = "\t" if suffix_of(location) == ".tsv" else ","
    lines = read_lines(location, errors)
    number, first = next(lines, (1, b""))
    try:
        cells = next(csv.reader([decode_text(first)], delimiter=delimiter, strict=True), [])
    except (BadRecordError, csv.Error) as error:
        raise MMGPTError(f"{source_name(location)}:{number}: {_reason(error)}") from None
    header = [cell.strip() for cell in cells]
    if missing := sorted(set(columns) - set(header)):
        raise MMGPTError(f"{source_name(location)}: no column {' or '.join(missing)} in the first line")
    if twice := [cell for at, cell in enumerate(header) if cell and cell in header[:at]]:
        raise MMGPTError(f"{source_name(location)}: two columns {twice[0]!r}")
    for number, cells in _csv_cells(lines, name, delimiter, errors):
        if len(cells) == len(header):
            yield number, {column: cell or None for column, cell in zip(header, cells, strict=True)}
        else:
            more = len(cells) > len(header)
            errors.add(f"{'more' if more else 'fewer'} cells than columns", f"{name}:{number}")


def _csv_cells(
    lines: Iterator[tuple[int, bytes]], name: str, delimiter: str, errors: ErrorCounter
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row. After a broken row the lines that it seemed to take are read once more as rows."""
    again: deque[tuple[int, bytes]] = deque()
    taken: list[tuple[int, bytes]] = []

    def of_one_row() -> Iterator[str]:
        while len(taken) <= MAX_CELL_LINES:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            blank = line[0] - taken[-1][0] - 1 if taken else 0
            taken.append(line)
            yield from ["\n"] * blank  # `read_lines` leaves them out; they stand inside a cell
            try:
                yield decode_text(line[1]) + "\n"
            except BadRecordError:
                if len(taken) == 1:
                    raise
                return

    while True:
        taken.clear()
        try:
            cells = next(csv.reader(of_one_row(), delimiter=delimiter, strict=True), None)
            if cells is None:
                return
            yield taken[0][0], cells
        except (BadRecordError, csv.Error) as error:
            errors.add(_reason(error), f"{name}:{taken[0][0]}")
            again.extendleft(reversed(taken[1:]))


_CSV_ERRORS = {
    "expected after": "a stray quote",
    "unexpected end of data": "a quote that is not closed",
    "field larger than": "a cell that is too long",
}


def _reason(error: BadRecordError | csv.Error) -> str:
    if isinstance(error, BadRecordError):
        return str(error)
    return f"bad CSV: {next((ours for theirs, ours in _CSV_ERRORS.items() if theirs in str(error)), error)}"


def find_image(folder: str, names: Sequence[str]) -> Path | str | None:
    """The first of `names` that is a file in `folder`, None when there is none.

    In a folder elsewhere it is the first name's URL: nobody asks whether it exists before it is fetched.
    Raises BadRecordError for a name that leads outside.
    """
    for name in names:
        try:
            place = resolve(folder, name)
        except (MMGPTError, UnicodeEncodeError):
            raise BadRecordError("image outside the folder") from None
        if is_remote(folder):
            return place
        if os.path.isfile(place):  # unlike Path.is_file(), False for a name that is too long
            return Path(place)
    return None


def first_value(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these values that is not empty, else None."""
    return next((row[name] for name in names if not is_empty(row.get(name))), None)


def is_empty(value: Any) -> bool:
    """Whether a cell of a row holds nothing; `{"bytes": None, "path": None}` is how parquet has a missing image."""
    if isinstance(value, Mapping):
        return all(item is None for item in value.values())
    return value is None or (isinstance(value, str | bytes | list) and not value)


def plain_text(value: Any) -> str:
    """`value` stripped. Raises BadRecordError when it is no text."""
    if not isinstance(value, str):
        raise BadRecordError("text is not a string")
    return value.strip()


def decode_text(data: bytes) -> str:
    """The text of a file, a line or a member. Raises BadRecordError for what is no UTF-8, or no text at all."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRecordError("text is not UTF-8") from None
    if "\0" in text:  # as in UTF-16, and in files that are no text
        raise BadRecordError("text with zero bytes")
    return text


def parse_json(data: bytes) -> Any:
    """The JSON value in a line or a member. Raises BadRecordError."""
    try:
        return json.loads(decode_text(data))
    except (ValueError, RecursionError):
        raise BadRecordError("bad JSON") from None


def plain_values(row: Mapping[str, Any], *, without: Collection[str]) -> dict[str, Any]:
    """The strings, numbers and truth values of a row, for metadata. Lists, nulls and NaN are left out."""
    return {
        name: value
        for name, value in row.items()
        if name not in without and (isinstance(value, str | int) or (isinstance(value, float) and isfinite(value)))
    }


def _is_list(location: str) -> bool:
    return _head(location).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _head(location: str) -> bytes:
    with open_unpacked(location) as stream:
        head = stream.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise MMGPTError(f"{source_name(location)}: UTF-16; save it as UTF-8")
    return head


def _json_lines(location: str, errors: ErrorCounter) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(location, errors):
        try:
            yield number, parse_json(line)
        except BadRecordError as error:
            errors.add(str(error), f"{base_name(location)}:{number}")


class _Parser:
    """Takes one JSON value after the other from a stream."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._passed, self._ended = "", 0, 0, False

    def error(self, reason: str) -> MMGPTError:
        return MMGPTError(f"{self._name}: {reason} (at character {self._passed + self._at:,})")

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._read()

    def items(self) -> Iterator[Any]:
        """The values of the list that is next."""
        self._take("[")
        if self._skip("]"):
            return
        while True:
            yield self.value()
            if self._skip("]"):
                return
            self._take(",")

    def members(self) -> Iterator[tuple[str, Any]]:
        """What `read_json` yields of the object that is next."""
        self._take("{")
        if self._skip("}"):
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise self.error("not JSON")
            self._take(":")
            if self.peek() == "[":
                yield from ((key, item) for item in self.items())
            else:
                yield key, self.value()
            if self._skip("}"):
                return
            self._take(",")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
                # Half a number is one too: it ends where something else begins.
                if self._ended or self._text[end : end + 1] in tuple(" \t\r\n,:]}"):
                    self._at = end
                    return value
                if len(self._text) - end > 8:
                    raise self.error("not JSON")
            except MMGPTError:
                raise
            except ValueError:  # an error, or a value that goes on behind the window
                if self._ended:
                    raise self.error("cut off, or not JSON") from None
            except RecursionError:
                raise self.error("nested too deeply") from None
            if len(self._text) - self._at > MAX_ITEM_CHARS:
                raise self.error("not JSON, or an item that is too long")
            self._read()

    def _read(self) -> None:
        # As much again as there is, so that a long value is not scanned over and over.
        data = self._stream.read(max(WINDOW_BYTES, len(self._text) - self._at))
        self._ended = not data
        self._passed += self._at
        try:
            self._text = self._text[self._at :] + self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError:
            raise self.error("not UTF-8") from None
        self._at = 0

    def _skip(self, char: str) -> bool:
        found = self.peek() == char
        self._at += found
        return found

    def _take(self, char: str) -> None:
        if not self._skip(char):
            raise self.error("not JSON" if self.peek() else "cut off")
