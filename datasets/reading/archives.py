"""Members of tars and zips as a stream, from anywhere. Nothing is written to disk, and no member is trusted."""

import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

from mm_gpt.datasets.reading.files import base_name, is_hidden, open_file, suffix_of
from mm_gpt.datasets.reading.http_files import ReadError
from mm_gpt.datasets.reading.unpacked import open_unpacked
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

ARCHIVE_SUFFIXES = (".tar", ".tgz", ".zip")
MAX_RATIO = 300
FREE_BYTES = 64 * 2**20
"""A zip's member may unfold to this, and to `MAX_RATIO` times what it takes in the archive."""


def read_archive(location: str, errors: ErrorCounter) -> Iterator[tuple[str, int, BinaryIO]]:
    """(name, size, file) of each regular member of a .tar (.gz, .bz2, .zst) or .zip, in order, hidden ones left out.

    Read the file before the next one is asked for; its `read` raises ReadError where the archive breaks, and nothing
    comes after it. A break between two members is counted. Raises MMGPTError when it cannot be opened or is no archive.
    """
    return _read_zip(location, errors) if suffix_of(location) == ".zip" else _read_tar(location, errors)


TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, LookupError, OverflowError, RecursionError, zlib.error)
"""What reading a tar raises over a broken or hostile header; MMGPTErrors of the file below are ValueErrors."""
ZIP_ERRORS = (zipfile.BadZipFile, lzma.LZMAError, struct.error, RuntimeError, *TAR_ERRORS)
"""Likewise for a zip and its members (RuntimeError: encrypted; its subclass NotImplementedError: packed unknownly)."""
BLOCK_BYTES = 512
MAX_HEADER_BYTES = 2**20
_PIECE_BYTES = 2**20


class Tar(tarfile.TarFile):
    """An uncompressed tar that believes no size: `next` and reading a member end where the bytes of `stream` end.

    `jumps`: members are skipped by seeking, not by reading. Where the tar is broken or has no end mark, `next` raises
    one of `TAR_ERRORS`. `stream` stays open.
    """

    def __init__(self, stream: BinaryIO, *, jumps: bool = False) -> None:
        self._blocks = _Blocks(stream, jumps)
        super().__init__(fileobj=cast(BinaryIO, self._blocks), errors="replace")

    def next(self) -> tarfile.TarInfo | None:
        self.members = []  # type: ignore[attr-defined]  # or a long tar keeps every header in memory
        self._blocks.max_bytes = MAX_HEADER_BYTES
        member = super().next()
        self._blocks.max_bytes = None
        if member is None and self._blocks.last != bytes(BLOCK_BYTES):  # tarfile takes a broken header for the end
            raise tarfile.ReadError("a broken header" if self._blocks.last else "it has no end")
        if member is not None and member.size < 0:  # the next header would lie before this one, for ever
            raise tarfile.ReadError("a member of negative size")
        return member


class _Blocks:
    """A file as tarfile wants it, which goes forwards only and gives a header no more memory than it may take."""

    def __init__(self, stream: BinaryIO, jumps: bool) -> None:
        self._stream, self._jumps = stream, jumps
        self._position = self._size = 0
        if jumps:
            self._size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
        self.max_bytes: int | None = MAX_HEADER_BYTES
        self.last = b""
        """The block or header that was read last."""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position and not self._jumps:
            raise tarfile.StreamError("a member that lies in front of its header")
        if self._jumps and not 0 <= position <= self._size:
            raise tarfile.ReadError("unexpected end of data")
        if self._jumps:
            self._position = self._stream.seek(position)
        while self._position < position:
            skipped = len(self._stream.read(min(_PIECE_BYTES, position - self._position)))
            if skipped == 0:
                raise tarfile.ReadError("unexpected end of data")
            self._position += skipped
        return position

    def read(self, size: int) -> bytes:
        if size < 0 or (self.max_bytes is not None and size > self.max_bytes):
            raise tarfile.ReadError("a header too large")
        data = self._stream.read(min(size, _PIECE_BYTES))
        if size > _PIECE_BYTES:  # in pieces, or memory is taken for what is claimed and not there
            parts, left = [data], size - len(data)
            while parts[-1] and left:
                parts.append(self._stream.read(min(left, _PIECE_BYTES)))
                left -= len(parts[-1])
            data = b"".join(parts)
        self._position += len(data)
        if self.max_bytes is not None:
            if size == 1:  # tarfile looks whether the last byte of a member is there
                return data
            # tarfile of Python 3.11 takes time by the square of a header's longest run of digits
            if size > BLOCK_BYTES and re.search(rb"\d{256}", data):
                raise tarfile.ReadError("a header with a number too long")
            self.last = data
        return data


def _read_tar(location: str, errors: ErrorCounter) -> Iterator[tuple[str, int, BinaryIO]]:
    with open_unpacked(location) as stream:
        try:
            tar = Tar(stream)
        except TAR_ERRORS as error:
            raise MMGPTError(f"{source_name(location)}: not a tar ({_line(error)})") from None
        while True:
            try:
                member = tar.next()
                if member is None:
                    return
                if not member.isreg() or is_hidden(member.name):
                    continue
                if member.issparse():  # small on disk, huge in memory
                    errors.add("sparse member", f"{base_name(location)}:{member.name}")
                    continue
                file = tar.extractfile(member)
                assert file is not None  # isreg() said so
            except TAR_ERRORS as error:
                errors.add("broken archive, rest of it unread", f"{base_name(location)} ({_line(error)})")
                return
            checked = _Member(file, f"{base_name(location)}:{member.name}")
            yield member.name, member.size, io.BufferedReader(checked)
            if checked.broken:
                return


def _read_zip(location: str, errors: ErrorCounter) -> Iterator[tuple[str, int, BinaryIO]]:
    with open_file(location, seekable=True) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except ZIP_ERRORS as error:
            raise MMGPTError(f"{source_name(location)}: not a zip ({_line(error)})") from None
        size = stream.seek(0, io.SEEK_END)
        if (
            sum(info.compress_size for info in archive.infolist()) > size
        ):  # many names for the same bytes unfold for ever
            raise MMGPTError(f"{source_name(location)}: not a zip (its members claim more than its {size:,} bytes)")
        for info in archive.infolist():
            name = f"{base_name(location)}:{info.filename}"
            if info.is_dir() or is_hidden(info.filename):
                continue
            if info.file_size > FREE_BYTES + MAX_RATIO * info.compress_size:
                errors.add("archive member unfolds too far", name)
                continue
            try:
                with archive.open(info) as file:  # it stops at the size that was just checked
                    yield info.filename, info.file_size, io.BufferedReader(_Member(file, name))
            except ZIP_ERRORS as error:
                errors.add("broken archive member", f"{name} ({_line(error)})")


class _Member(io.RawIOBase):
    """A member whose errors, of a dozen kinds, are ReadErrors that name it."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self.name, self.broken = file, name, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._file.read(len(buffer))
        except ZIP_ERRORS as error:
            self.broken = True
            raise ReadError(f"{self.name}: {_line(error)}") from None
        buffer[: len(data)] = data
        return len(data)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
