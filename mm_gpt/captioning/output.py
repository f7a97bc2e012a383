"""Where captions go: JSONL or CSV files that survive being killed, and streams."""

import csv
import io
import json
import os
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mm_gpt.captioning.inputs import identity
from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.system.locks import open_locked


@dataclass(frozen=True)
class CaptionLine:
    """One line of output: an image with its caption or its error."""

    image: str
    caption: str | None = None
    error: str | None = None


class _Jsonl:
    header = b""
    start = b'{"image": "'
    """How every record begins."""
    has_quotes = False

    @staticmethod
    def encode(line: CaptionLine) -> bytes:
        values = {"image": line.image, "caption": line.caption, "error": line.error}
        values = {key: value for key, value in values.items() if value is not None}
        try:
            return json.dumps(values, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # a file name that is not UTF-8; escaped, it comes back as it was
            return json.dumps(values).encode() + b"\n"

    @staticmethod
    def decode(record: bytes) -> CaptionLine:
        values = json.loads(record)
        return CaptionLine(values["image"], values.get("caption"), values.get("error"))


class _Csv:
    header = b"image,caption,error\n"
    start = b""
    has_quotes = True

    @staticmethod
    def encode(line: CaptionLine) -> bytes:
        fields = (line.image, line.caption or "", line.error or "")
        # Not csv.writer: before Python 3.13 it leaves a lone carriage return unquoted, and reading it then fails.
        quoted = ['"' + f.replace('"', '""') + '"' if re.search(r'[,"\r\n]', f) else f for f in fields]
        return ",".join(quoted).encode("utf-8", "surrogateescape") + b"\n"

    @staticmethod
    def decode(record: bytes) -> CaptionLine:
        text = io.StringIO(record.decode("utf-8", "surrogateescape"), newline="")
        ((image, caption, error),) = csv.reader(text)
        return CaptionLine(image, None if error else caption, error or None)


FORMATS: dict[str, type[_Jsonl] | type[_Csv]] = {".jsonl": _Jsonl, ".csv": _Csv}


class CaptionStream:
    """JSONL to a pipe or a terminal."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.done: dict[str, bool] = {}

    def write(self, lines: Sequence[CaptionLine]) -> None:
        """Raises MMGPTError when the disk behind it is full, BrokenPipeError when nobody reads any more."""
        self.stream.flush()
        try:
            # Past the buffer: what could not be written would be tried again when the program ends
            _write(getattr(self.stream, "raw", self.stream), b"".join(map(_Jsonl.encode, lines)))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MMGPTError(
                f"{getattr(self.stream, 'name', 'output')}: cannot be written ({error.strerror})"
            ) from None

    def close(self) -> None:
        """The stream belongs to the caller."""


class CaptionFile:
    """An output file of one process at a time, continued after the last whole line."""

    def __init__(self, path: Path, *, overwrite: bool = False, retry: Container[str] = ()):
        """Open and lock `path`. Lines with an error whose identity is in `retry` are taken out.

        Raises MMGPTError when it is no .jsonl or .csv, cannot be written, is locked, or holds what is not ours.
        """
        self.path = path
        self.done: dict[str, bool] = {}
        """Identity of each image that has a line, and whether that line is an error."""
        if path.suffix.lower() not in FORMATS:
            raise MMGPTError(f"{path}: {unknown_name('output format', path.suffix, FORMATS)}")
        self.format = FORMATS[path.suffix.lower()]
        try:
            self._file = open_locked(path, path)
            try:
                if overwrite:
                    self._file.truncate(0)
                else:
                    self._continue(retry)
                if self._file.seek(0, os.SEEK_END) == 0:
                    self._append(self.format.header)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise MMGPTError(f"{path}: cannot be written ({error.strerror})") from None

    def write(self, lines: Sequence[CaptionLine]) -> None:
        """Append lines and wait until they are on the disk. Raises MMGPTError when it is full: then none is added."""
        try:
            self._append(b"".join(map(self.format.encode, lines)))
        except OSError as error:
            raise MMGPTError(f"{self.path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()

    def _append(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            _write(self._file, data)
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise

    def _records(self) -> Iterator[bytes]:
        """Whole records: up to a line break, which in a CSV may also stand inside quotes."""
        lines: list[bytes] = []
        num_quotes = 0
        with open(self.path, "rb") as file:
            for line in file:
                lines.append(line)
                num_quotes += line.count(b'"') if self.format.has_quotes else 0
                if line.endswith(b"\n") and num_quotes % 2 == 0:
                    yield b"".join(lines)
                    lines = []

    def _continue(self, retry: Container[str]) -> None:
        end, dropped = 0, set()
        for number, record in enumerate(self._records()):
            end += len(record)
            if number == 0 and self.format.header:
                if record != self.format.header:
                    raise MMGPTError(f"{self.path}: its first line is not {self.format.header.decode().strip()!r}")
                continue
            try:
                line = self.format.decode(record)
                key = identity(line.image)
            except (ValueError, TypeError, KeyError, AttributeError, csv.Error, RecursionError):
                raise MMGPTError(f"{self.path}: line {number + 1} is no caption; --overwrite starts anew") from None
            if line.error is not None and key in retry:
                dropped.add(number)
            else:
                self.done[key] = line.error is not None
        self._file.seek(end)
        start = self.format.start if end else self.format.header or self.format.start
        torn = self._file.read(len(start))
        if torn != start[: len(torn)]:  # whatever this is, a killed run did not leave it
            raise MMGPTError(f"{self.path}: its last line is no caption; --overwrite starts anew")
        if dropped:
            self._rewrite_without(dropped)
        else:
            self._file.truncate(end)

    def _rewrite_without(self, dropped: set[int]) -> None:
        """Replace the file by one without these records, at one moment, without letting go of the lock."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        new = open_locked(partial, self.path)
        try:
            new.truncate(0)
            for number, record in enumerate(self._records()):
                if number not in dropped:
                    _write(new, record)
            os.fsync(new.fileno())
            os.replace(partial, self.path)
        except OSError:
            partial.unlink(missing_ok=True)
            new.close()
            raise
        self._file.close()
        self._file = new


def _write(file: BinaryIO | io.FileIO, data: bytes) -> None:
    """All of it. Files of ours have no buffer, which would try again, and fail, when they are closed."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
