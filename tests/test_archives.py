"""Tars and zips whose headers claim what is not there, or do harm."""

import gzip
import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from mm_gpt.captioning import find_images
from mm_gpt.datasets.building.shards import index_tar
from mm_gpt.datasets.formats.captioned import read_records
from mm_gpt.datasets.reading.archives import MAX_HEADER_BYTES, TAR_ERRORS, Tar, read_archive
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import MMGPTError


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims any size: big or negative ones as GNU tar writes them."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


END = bytes(1024)
GOOD = member("a.txt", b"hello") + member("b.txt", b"world" * 200)
HOSTILE = {
    "a size of exabytes": header("c.bin", 2**62) + END,
    "a size of exabytes that is read": header("c.txt", 2**62) + END,
    "a negative size": header("c.bin", -1024) + END,
    "a name of gigabytes": header("c.bin", 2**40, tarfile.GNUTYPE_LONGNAME) + END,
    "a name of more than a header may have": header("c", 2 * MAX_HEADER_BYTES, b"L")
    + bytes(2 * MAX_HEADER_BYTES)
    + END,
    "pax records of a negative size": header("c.bin", -512, tarfile.XHDTYPE) + END,
    "a number of hundreds of digits": header("c.bin", 1000, b"x") + b"1" * 1024 + member("d.txt", b"") + END,
    "a thousand headers of one member": header("c.bin", 512, tarfile.GNUTYPE_LONGNAME) * 2000 + END,
    "a sparse map that ends": header("c.bin", 512, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29),
    "no header": b"x" * 512 + END,
    "no end": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tar_is_read_as_far_as_it_is_good(tmp_path: Path, what: str, suffix: str) -> None:
    """Stops: a build without end, or memory for exabytes, because of ten kilobytes; and damage that nobody counts."""
    path, errors = tmp_path / f"a.tar{suffix}", ErrorCounter()
    data = GOOD + HOSTILE[what]
    if suffix:
        data = gzip.compress(data, 1)
    path.write_bytes(data)
    found = {}
    for name, _, file in read_archive(str(path), errors):
        try:
            found[name] = len(file.read())
        except MMGPTError as error:
            errors.add("broken", str(error))
    assert found == {"a.txt": 5, "b.txt": 1000}
    assert errors.total == 1


@pytest.mark.parametrize("what", HOSTILE)
def test_every_reader_of_tars_ends(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + HOSTILE[what])
    errors = ErrorCounter()
    assert len(index_tar(path, errors)) == 3
    assert errors.total == 1
    errors = ErrorCounter()
    assert list(read_records(str(path), errors)) == []
    assert sum(count for reason, count in errors.counts.items() if "broken tar" in reason) == 1
    items = list(find_images([str(path)]))
    assert len(items) == 1


def test_a_member_takes_no_more_memory_than_there_is(tmp_path: Path) -> None:
    asked = []

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    tar = Tar(Stream(header("c.bin", 2**50) + b"x" * 3000))
    file = tar.extractfile(tar.next())  # type: ignore[arg-type]
    with pytest.raises(TAR_ERRORS):
        file.read()  # type: ignore[union-attr]
    assert max(asked) <= 2**20  # type: ignore[type-var]


def test_a_zip_of_many_names_for_the_same_bytes(tmp_path: Path) -> None:
    """Stops: a zip whose members overlap, so that each of a thousand names unfolds the whole of it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.txt", os.urandom(3000))
    data = stream.getvalue()
    start = data.rindex(b"PK\1\2")
    stop = data.rindex(b"PK\5\6")
    entries = data[start:stop] * 50
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 50, 50, len(entries), start, 0)
    path = tmp_path / "a.zip"
    path.write_bytes(data[:start] + entries + tail)
    with pytest.raises(MMGPTError, match=r"a\.zip: not a zip \(its members claim more than its"):
        list(read_archive(str(path), ErrorCounter()))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_counted(tmp_path: Path, method: int) -> None:
    path, errors = tmp_path / "a.zip", ErrorCounter()
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.txt", os.urandom(3000))
    data = bytearray(path.read_bytes())
    data[60:2000] = bytes(1940)
    path.write_bytes(data)
    for _, _, file in read_archive(str(path), errors):
        with pytest.raises(MMGPTError, match=r"a\.zip:a\.txt"):
            file.read()
