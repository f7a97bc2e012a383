"""Debian packages without Debian: a mirror's index, downloads that are checked, and safe unpacking. No root needed.

The chain of trust: `InRelease`, read over https, holds the SHA256 of `Packages.xz`, which holds that of each package.
"""

import hashlib
import io
import lzma
import os
import posixpath
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from mm_gpt.datasets.reading import files
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import MMGPTError

MIRROR = "https://deb.debian.org/debian"
INDEX = "main/binary-all/Packages.xz"
MAX_INDEX_BYTES = 512 * 2**20
MAX_UNPACKED_BYTES = 4 * 2**30
MAX_MEMBERS = 1_000_000
MAX_LINKS = 8  # a link to a link to a link
PIECE_BYTES = 2**20
DATA_MEMBERS: dict[str, Literal["r|", "r|gz", "r|bz2", "r|xz"]] = {
    "data.tar": "r|",
    "data.tar.gz": "r|gz",
    "data.tar.bz2": "r|bz2",
    "data.tar.xz": "r|xz",
}
"""The names under which a package holds its files, and how `tarfile` reads them: forwards only, inside another file."""


@dataclass(frozen=True)
class Package:
    """One entry of a mirror's index."""

    name: str
    version: str
    filename: str
    """Where it lies, below the mirror."""
    sha256: str
    num_bytes: int


def read_index(mirror: str = MIRROR, suite: str = "bookworm") -> dict[str, Package]:
    """The packages of a suite that fit every machine, by name. `mirror` is an https URL or a local folder.

    Raises MMGPTError when the index is missing, malformed, or not the one that `InRelease` names.
    """
    if not mirror.startswith("https://") and files.is_remote(mirror):
        raise MMGPTError(f"{mirror}: name an https:// mirror; signatures are not checked")
    release = _read(files.resolve(mirror, f"dists/{suite}/InRelease"), MAX_INDEX_BYTES).decode("utf-8", "replace")
    sums = release.partition("\nSHA256:")[2]
    listed = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {re.escape(INDEX)}$", sums, re.MULTILINE)
    if not listed:
        raise MMGPTError(f"{mirror}: InRelease of {suite} lists no {INDEX}")
    location = files.resolve(mirror, f"dists/{suite}/{INDEX}")
    packed = _read(location, MAX_INDEX_BYTES)
    if hashlib.sha256(packed).hexdigest() != listed[1]:
        raise MMGPTError(f"{location}: is not the file that InRelease names; try again, the mirror may be updating")
    try:
        unpacker = lzma.LZMADecompressor(memlimit=256 * 2**20)
        text = unpacker.decompress(packed, MAX_INDEX_BYTES).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise MMGPTError(f"{location}: {error}") from None
    if not unpacker.eof:
        raise MMGPTError(f"{location}: unfolds to more than {MAX_INDEX_BYTES:,} bytes, or is cut off")
    return {package.name: package for package in _packages(text, location)}


def _packages(text: str, location: str) -> Iterator[Package]:
    for stanza in filter(str.strip, text.split("\n\n")):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", stanza, re.MULTILINE))
        try:
            yield Package(
                fields["Package"], fields["Version"], fields["Filename"], fields["SHA256"], int(fields["Size"])
            )
        except (KeyError, ValueError) as error:
            raise MMGPTError(f"{location}: {fields.get('Package', 'a package')} lacks {error}") from None


def download(package: Package, folder: Path, mirror: str = MIRROR) -> Path:
    """The package's file in `folder`; one that is there already, and right, is used again.

    Raises MMGPTError when its bytes are not those that the index names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / posixpath.basename(package.filename)
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    location = files.resolve(mirror, package.filename)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with files.open_file(location) as source, partial.open("wb") as out:
            size = 0
            while piece := source.read(PIECE_BYTES):
                size += len(piece)
                if size > package.num_bytes:
                    raise MMGPTError(f"{location}: is longer than the {package.num_bytes:,} bytes of the index")
                out.write(piece)
        if _sha256(partial) != package.sha256:
            raise MMGPTError(f"{location}: its SHA256 is not the one of the index")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(location: str, max_bytes: int) -> bytes:
    with files.open_file(location) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise MMGPTError(f"{location}: more than {max_bytes:,} bytes")
    return data


# ---- Unpacking ----


def unpack(deb: Path, folder: Path, errors: ErrorCounter) -> None:
    """Unpack the files of a .deb into the new folder `folder`; a folder that is there already is left as it is.

    Only regular files are made. A link to a file of the same package becomes a second name of that file, so that no
    link exists that a later member could write through. What leads outside is counted in `errors` and skipped, and so
    are devices. Raises MMGPTError for what is no .deb, and for one that unfolds to more than `MAX_UNPACKED_BYTES`.
    """
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with deb.open("rb") as file:
            name, data = _data_member(file, deb)
            with tarfile.open(fileobj=data, mode=DATA_MEMBERS[name]) as tar:
                _extract(tar, temporary, deb.name, errors)
        temporary.rename(folder)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise MMGPTError(f"{deb}: cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _data_member(file: BinaryIO, deb: Path) -> tuple[str, BinaryIO]:
    """The name of the archive's data.tar.*, and its bytes from here on. A .deb is an `ar` archive of three members."""
    if file.read(8) != b"!<arch>\n":
        raise MMGPTError(f"{deb}: not a Debian package")
    while len(header := file.read(60)) == 60:
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        try:
            size = int(header[48:58])
        except ValueError:
            size = -1
        if size < 0 or header[58:] != b"`\n":
            raise MMGPTError(f"{deb}: not a Debian package")
        if name in DATA_MEMBERS:
            return name, io.BufferedReader(_Slice(file, size))
        if name.startswith("data.tar"):
            raise MMGPTError(f"{deb}: {name} is not read; unpack it with dpkg-deb -x")
        file.seek(size + size % 2, io.SEEK_CUR)
    raise MMGPTError(f"{deb}: holds no data.tar")


class _Slice(io.RawIOBase):
    """The next `size` bytes of a file."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.file.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


def _extract(tar: tarfile.TarFile, root: Path, name: str, errors: ErrorCounter) -> None:
    links: dict[str, str] = {}  # path inside the package -> path inside the package
    total = 0
    for number, member in enumerate(tar):
        total += member.size
        if total > MAX_UNPACKED_BYTES or number > MAX_MEMBERS:
            raise MMGPTError(f"{name}: unfolds to more than {MAX_UNPACKED_BYTES:,} bytes or {MAX_MEMBERS:,} files")
        path = posixpath.normpath(member.name)
        if member.isdir():
            continue
        try:
            target = Path(files.resolve(str(root), path))
            if member.issym():
                # An absolute link means the root of the system that the package is installed in.
                start = "" if member.linkname.startswith("/") else posixpath.dirname(path)
                links[path] = posixpath.normpath(posixpath.join(start, member.linkname.lstrip("/")))
                continue
            if member.islnk():
                links[path] = posixpath.normpath(member.linkname)
                continue
        except MMGPTError:
            errors.add("a name that leads outside of the package", f"{name}:{member.name[:80]}")
            continue
        source = tar.extractfile(member) if member.isreg() and not member.issparse() else None
        if source is None:
            errors.add("neither a file nor a link", f"{name}:{path[:80]}")
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as out:
                shutil.copyfileobj(source, out)
        except (FileExistsError, NotADirectoryError):
            errors.add("two members of one name", f"{name}:{path[:80]}")
    for path, goal in links.items():
        for _ in range(MAX_LINKS):
            goal = links.get(goal, goal)
        try:
            source_path, target = Path(files.resolve(str(root), goal)), Path(files.resolve(str(root), path))
        except MMGPTError:
            errors.add("a link that leads outside of the package", f"{name}:{path[:80]}")
            continue
        if source_path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source_path, target)


# ---- Licences ----


def licence(root: Path, package: str) -> str:
    """The licence of a package's own files, from its `copyright` file: a short name such as `CC-BY-SA-3.0`.

    `root` is where it was unpacked. Raises MMGPTError when there is no such file, or it does not say.
    """
    path = root / "usr/share/doc" / package / "copyright"
    if not path.is_file():
        raise MMGPTError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8", errors="replace")
    for stanza in re.split(r"\n\s*\n", text):
        found = re.search(r"^License: *(\S.*)$", stanza, re.MULTILINE)
        if found and re.search(r"^Files: *\*$", stanza, re.MULTILINE):
            return found[1].strip()
    if re.search(r"public domain dedication", text, re.IGNORECASE):  # files older than the machine-readable form
        return "public domain"
    raise MMGPTError(f"{path}: names no licence for `Files: *`")
