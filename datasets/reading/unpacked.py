"""Compressed files and files of lines, read as a stream: a bomb is stopped, a cut-off file keeps what came before."""

import bz2
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from mm_gpt.datasets.reading.files import COMPRESSED_SUFFIXES, base_name, open_file
from mm_gpt.datasets.reading.http_files import PIECE_BYTES, HttpLimits, ReadError
from mm_gpt.datasets.samples import ErrorCounter, optional_import
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

MAX_LINE_BYTES = 256 * 2**20
_MAX_RATIO = 300  # what compression makes of text is 3 to 30 times smaller; a bomb, 1000 times and more
_FREE_BYTES = 64 * 2**20  # so much unpacks from any file
_FEED_BYTES = 2**14  # what stands behind a member is copied: of many tiny members, that often
_BROKEN = (EOFError, OSError, zlib.error)


def open_unpacked(location: str, *, limits: HttpLimits | None = None) -> BinaryIO:
    """As `open_file`, unpacked when the name ends in .gz, .bz2 or .zst.

    Reading raises ReadError for a broken or cut-off file when all that can be decoded was given, and for one that
    unfolds to more than 64 MiB and 300 times its size. Where something else stands behind the compressed data, the file
    ends there as any other, and only who reads on gets the ReadError.
    """
    suffix = next((suffix for suffix in COMPRESSED_SUFFIXES if base_name(location).lower().endswith(suffix)), "")
    if not suffix:
        return open_file(location, limits=limits)
    unpacked = _Unpacked(lambda: open_file(location, limits=limits), source_name(location), suffix)
    return io.BufferedReader(unpacked, PIECE_BYTES)


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

    def __init__(self, open_packed: Callable[[], BinaryIO], name: str, suffix: str) -> None:
        self.name, self._suffix, self._unpacked = name, suffix, 0
        self._open_packed = open_packed
        self._failure: ReadError | None = None
        self._start()

    def _start(self) -> None:
        self._packed = self._open_packed()
        self._counter = _Counted(self._packed)
        self._stream: Any
        if self._suffix == ".zst":
            self._stream = _Zstd(self._counter)
        else:
            self._stream = _Members(self._counter, *_FORMATS[self._suffix])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")[:PIECE_BYTES]
        if self._failure is not None:
            raise self._failure
        try:
            data = self._stream.read(len(view))
        except ReadError:
            raise
        except (*_BROKEN, ValueError) as error:  # pyarrow's errors are OSErrors and ValueErrors
            if isinstance(self._counter.error, ReadError):
                raise self._counter.error from None
            reason = " ".join(str(error).split())
            # a decoder's own error throws away what it had decoded in that call
            data = b"" if isinstance(error, EOFError) else self._decoded_before_error(len(view))
            self._failure = ReadError(f"{self.name}: broken after {self._unpacked + len(data):,} bytes ({reason})")
            if not data and not (isinstance(error, _TrailingError) and self._unpacked):
                raise self._failure from None
        self._unpacked += len(data)
        if self._unpacked > _FREE_BYTES + _MAX_RATIO * self._counter.count:
            raise ReadError(f"{self.name}: unfolds to more than {_MAX_RATIO} times its size")
        view[: len(data)] = data
        return len(data)

    def _decoded_before_error(self, size: int) -> bytes:
        """Up to `size` bytes behind those that were given, from the file read again, the last of it byte by byte."""
        self._packed.close()
        self._start()
        left, found = self._unpacked, bytearray()
        try:
            while left and (data := self._stream.read(min(left, PIECE_BYTES))):
                left -= len(data)
            while len(found) < size and (byte := self._stream.read(1)):
                found += byte
        except (*_BROKEN, ValueError):
            pass  # the same error as before
        return bytes(found)

    def close(self) -> None:
        if not self.closed:
            self._packed.close()
        super().close()


class _TrailingError(EOFError):
    """Something else stands behind the compressed data."""


class _Members:
    """The decompressed bytes of a file of one member after the other. Zeros behind the last one are padding."""

    def __init__(self, packed: "_Counted", start: Callable[[], Any], magic: bytes) -> None:
        self._packed, self._start, self._magic = packed, start, magic
        self._decoder = start()
        self._rest = b""

    def read(self, size: int) -> bytes:
        """At least one byte, or none at the end. Raises EOFError when the file ends too early or too late."""
        while True:
            if self._decoder.eof and not self._next_member():
                return b""
            piece = b""
            if self._decoder.needs_input:
                piece, self._rest = self._rest or self._packed.read(_FEED_BYTES), b""
            data: bytes = self._decoder.decompress(piece, size)
            if data:
                return data
            if not piece and self._decoder.needs_input and not self._decoder.eof:
                raise EOFError("it is cut off")

    def _next_member(self) -> bool:
        rest = self._decoder.unused_data.lstrip(b"\0")
        while len(rest) < len(self._magic) and (more := self._packed.read(_FEED_BYTES)):
            rest = (rest + more).lstrip(b"\0")
        if not rest:
            return False
        if not rest.startswith(self._magic):
            raise _TrailingError(f"{len(rest):,} bytes or more of something else follow")
        self._decoder, self._rest = self._start(), rest
        return True


class _Gzip:
    """zlib's decoder of one gzip member, in the manners of bz2's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)

    def decompress(self, data: bytes, size: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, size)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


_FORMATS: dict[str, tuple[Callable[[], Any], bytes]] = {
    ".gz": (_Gzip, b"\x1f\x8b"),
    ".bz2": (bz2.BZ2Decompressor, b"BZh"),
}


class _Zstd:
    """pyarrow's decoder of zstd. It gets whole frames only, since it throws away what comes before something else."""

    def __init__(self, packed: "_Counted") -> None:
        self._trailing = ""
        pyarrow = optional_import("pyarrow")
        frames = pyarrow.PythonFile(_Pieces(self._split(packed)), mode="r")
        self._stream = pyarrow.CompressedInputStream(frames, "zstd")

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        if not data and self._trailing:
            raise _TrailingError(self._trailing)
        return data

    def _split(self, packed: "_Counted") -> Iterator[bytes]:
        """The bytes of one frame after the other (RFC 8878, section 3.1), which may end anywhere in the last one."""
        while magic := packed.exactly(4):
            if magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5:  # a frame to be skipped
                yield magic + (length := packed.exactly(4))
                left = int.from_bytes(length, "little")
                while left and (piece := packed.read(min(left, PIECE_BYTES))):
                    left -= len(piece)
                    yield piece
                continue
            if magic != b"\x28\xb5\x2f\xfd":
                self._trailing = "something else follows"
                return
            yield magic + (descriptor := packed.exactly(1))
            flags = descriptor[0] if descriptor else 0
            is_single = flags >> 5 & 1
            yield packed.exactly((1 - is_single) + (0, 1, 2, 4)[flags & 3] + (is_single, 2, 4, 8)[flags >> 6])
            is_last = 0
            while not is_last and len(head := packed.exactly(3)) == 3:
                block = int.from_bytes(head, "little")
                is_last = block & 1
                yield head + packed.exactly(1 if block >> 1 & 3 == 1 else block >> 3)
            yield packed.exactly(4 if flags & 4 else 0)


class _Pieces(io.RawIOBase):
    """A file made of pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._rest and (piece := next(self._pieces, None)) is not None:
            self._rest = piece
        data, self._rest = (self._rest[:size], self._rest[size:]) if size >= 0 else (self._rest, b"")
        return data


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

    def exactly(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end."""
        parts = [b""]
        while size > 0 and (part := self.read(min(size, PIECE_BYTES))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
