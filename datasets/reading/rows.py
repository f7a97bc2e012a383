"""Rows of JSON lists, JSON lines and parquet files as a stream, and the images that rows name.

A COCO or LLaVA file is one JSON value of several hundred megabytes. It is parsed item by item from a sliding window, so
that no more than one item and the window are in memory.
"""

import codecs
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from mm_gpt.datasets.reading.files import base_name, is_remote, open_file, resolve, suffix_of
from mm_gpt.datasets.reading.unpacked import open_unpacked, read_lines
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, optional_import
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

MAX_ITEM_CHARS = 64 * 2**20
"""Of one value inside a JSON file; a longer one is refused."""
WINDOW_BYTES = 2**18
PARQUET_ROWS = 32
"""Are decoded at a time: rows with images are megabytes each."""


def read_rows(location: str, errors: ErrorCounter) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a JSON list of objects, of JSON lines (whatever the file is called) or of a `.parquet`.

    What is not an object is counted and skipped, as is a broken line. Raises MMGPTError when the file cannot be opened,
    or is a JSON list with an error in it: what would follow is unknown.
    """
    if suffix_of(location) == ".parquet":
        yield from read_parquet(location, errors)
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
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                yield from zip(numbers, batch.to_pylist(), strict=False)
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            errors.add("broken parquet, rest of it unread", f"{base_name(location)} ({_line(error)})")


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


def plain_text(value: Any) -> str:
    """`value` stripped. Raises BadRecordError when it is no text, or has half characters that no file can hold."""
    if not is_text(value):
        raise BadRecordError("text is not Unicode" if isinstance(value, str) else "text is not a string")
    return str(value).strip()


def is_text(value: Any) -> bool:
    """Whether `value` is a string that can be written: JSON may spell half a character (`"\\ud83d"`)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def plain_values(row: Mapping[str, Any], *, without: Collection[str]) -> dict[str, Any]:
    """The strings, numbers and truth values of a row, for metadata. Lists, nulls and NaN are left out."""
    return {
        name: value
        for name, value in row.items()
        if name not in without
        and is_text(name)
        and (is_text(value) or (isinstance(value, int | float) and isfinite(value)))
    }


def _is_list(location: str) -> bool:
    with open_unpacked(location) as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _json_lines(location: str, errors: ErrorCounter) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(location, errors):
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            errors.add("bad JSON", f"{base_name(location)}:{number}")


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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
