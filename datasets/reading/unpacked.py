"""Compressed files and files of lines, read as a stream: a bomb is stopped, a cut-off file keeps what came before."""

import bz2
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from mm_gpt.datasets.reading.files import COMPRESSED_SUFFIXES, base_name, open_file
from mm_gpt.datasets.reading.http_files import PIECE_BYTES, HttpLimits, ReadError
from mm_gpt.datasets.samples import ErrorCounter, optional_import
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

MAX_LINE_BYTES = 256 * 2**20
_MAX_RATIO = 300  # what compression makes of text is 3 to 30 times smaller; a bomb, 1000 times and more
_FREE_BYTES = 64 * 2**20  # so much unpacks from any file
_BROKEN = (EOFError, OSError, zlib.error)


def open_unpacked(location: str, *, limits: HttpLimits | None = None) -> BinaryIO:
    """As `open_file`, unpacked when the name ends in .gz, .bz2 or .zst.

    Reading raises ReadError for a broken or cut-off file, and for one that unfolds to more than 64 MiB and 300 times
    its size.
    """
    packed = open_file(location, limits=limits)
    name = base_name(location).lower()
    if not name.endswith(COMPRESSED_SUFFIXES):
        return packed
    return io.BufferedReader(_Unpacked(packed, source_name(location), name), PIECE_BYTES)


def read_lines(location: str, errors: ErrorCounter, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of each line that is not blank; unpacked as by `open_unpacked`.

    Lines over `max_bytes` are counted and skipped without being held in memory. A file that breaks in its middle is
    counted once, and what came before stays. Raises MMGPTError at the first line when it cannot be opened.
    """
    with open_unpacked(location) as file:
        yield from lines_of(file, base_name(location), errors, max_bytes=max_bytes)


def lines_of(
    file: BinaryIO, name: str, errors: ErrorCounter, *, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes]]:
    """`read_lines` of an open file; `name` is what errors call it."""
    for number in itertools.count(1):
        try:
            line = file.readline(max_bytes + 1)
            too_long = len(line) > max_bytes and not line.endswith(b"\n")
            while too_long and line and not line.endswith(b"\n"):
                line = file.readline(PIECE_BYTES)
        except (MMGPTError, *_BROKEN) as error:
            errors.add("broken file, rest of it unread", f"{name}:{number} ({error})")
            return
        if too_long:
            errors.add("line too long", f"{name}:{number}")
        elif not line:
            return
        elif line.strip():
            yield number, line.rstrip(b"\r\n")


class _Unpacked(io.RawIOBase):
    """A decompressed stream that stops at what no honest file holds."""

    def __init__(self, packed: BinaryIO, location: str, name: str) -> None:
        self.name, self._packed, self._unpacked = location, packed, 0
        self._counter = _Counted(packed)
        self._stream: Any
        if name.endswith(".gz"):
            self._stream = gzip.GzipFile(fileobj=cast(BinaryIO, self._counter), mode="rb")
        elif name.endswith(".bz2"):
            self._stream = bz2.BZ2File(cast(BinaryIO, self._counter))
        else:
            pyarrow = optional_import("pyarrow")
            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._counter, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")[:PIECE_BYTES]
        try:
            data = self._stream.read(len(view))
        except ReadError:
            raise
        except (*_BROKEN, ValueError) as error:  # pyarrow's errors are OSErrors and ValueErrors
            if isinstance(self._counter.error, ReadError):
                raise self._counter.error from None
            reason = " ".join(str(error).split())
            raise ReadError(f"{self.name}: broken after {self._unpacked:,} bytes ({reason})") from None
        self._unpacked += len(data)
        if self._unpacked > _FREE_BYTES + _MAX_RATIO * self._counter.count:
            raise ReadError(f"{self.name}: unfolds to more than {_MAX_RATIO} times its size")
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._packed.close()
        super().close()


class _Counted(io.RawIOBase):
    """Counts what a decompressor takes, and keeps the error that it would hide behind its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.count, self.error = file, 0, None

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        try:
            data = self._file.read(PIECE_BYTES if size is None or size < 0 else size)
        except Exception as error:
            self.error = error  # type: ignore[assignment]
            raise
        self.count += len(data)
        return data
