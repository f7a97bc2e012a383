"""Members of tars and zips as a stream, from anywhere. Nothing is written to disk, and no member is trusted."""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO

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


def _read_tar(location: str, errors: ErrorCounter) -> Iterator[tuple[str, int, BinaryIO]]:
    with open_unpacked(location) as stream:
        try:
            tar = tarfile.open(fileobj=stream, mode="r|")  # noqa: SIM115 (closed by the with below)
        except (tarfile.TarError, EOFError) as error:
            raise MMGPTError(f"{source_name(location)}: not a tar ({_line(error)})") from None
        with tar:
            while True:
                try:
                    member = tar.next()
                    if member is None:
                        return
                    tar.members = []  # type: ignore[attr-defined]  # or a long tar keeps every header in memory
                    if not member.isreg() or is_hidden(member.name):
                        continue
                    if member.issparse():  # small on disk, huge in memory
                        errors.add("sparse member", f"{base_name(location)}:{member.name}")
                        continue
                    file = tar.extractfile(member)
                    assert file is not None  # isreg() said so
                    checked = _Member(file, f"{base_name(location)}:{member.name}")
                    yield member.name, member.size, io.BufferedReader(checked)
                    if checked.broken:
                        return
                except (tarfile.TarError, EOFError, OSError, MMGPTError) as error:
                    errors.add("broken archive, rest of it unread", f"{base_name(location)} ({_line(error)})")
                    return


def _read_zip(location: str, errors: ErrorCounter) -> Iterator[tuple[str, int, BinaryIO]]:
    with open_file(location, seekable=True) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise MMGPTError(f"{source_name(location)}: not a zip ({_line(error)})") from None
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
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
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
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, MMGPTError) as error:
            self.broken = True
            raise ReadError(f"{self.name}: {_line(error)}") from None
        buffer[: len(data)] = data
        return len(data)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
