"""What there is to caption: the images that files, folders, globs, WebDataset tars and URLs lead to."""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage

from mm_gpt.datasets.reading.archives import TAR_ERRORS, Tar
from mm_gpt.errors import ImageError, MMGPTError
from mm_gpt.image_headers import OTHER_SUFFIXES, find_format
from mm_gpt.images import DEFAULT_LIMITS, IMAGE_SUFFIXES, image_bytes, is_url, load_image, source_name


@dataclass(frozen=True)
class TarSlice:
    """A member of an uncompressed tar: `size` bytes from `offset`."""

    tar: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises ImageError, which does not name the member."""
        if self.size > DEFAULT_LIMITS.max_bytes:
            raise ImageError(f"larger than the limit of {DEFAULT_LIMITS.max_bytes:,} bytes")
        try:
            with open(self.tar, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"cannot read the tar ({error.strerror})") from None
        if len(data) < self.size:
            raise ImageError(f"the tar ends after {len(data):,} of its {self.size:,} bytes")
        return data


@dataclass(frozen=True)
class ImageItem:
    """One image to caption. `name` is what its line calls it: path, URL, or tar path + "/" + member name."""

    name: str
    source: Path | str | TarSlice | ImageError
    """A Path, a URL, a slice of a tar, or why it is already known to be unreadable."""

    def read(self) -> bytes:
        """The undecoded file. Raises ImageError without the name in front, since the line has it."""
        if isinstance(self.source, ImageError):
            raise self.source
        if isinstance(self.source, TarSlice):
            return self.source.read()
        try:
            return image_bytes(self.source)
        except ImageError as error:
            raise without_name(error, self.source) from error

    def load(self) -> PILImage.Image:
        """The decoded RGB image. Raises ImageError as `read` does."""
        data = self.read()
        try:
            return load_image(data)
        except ImageError as error:
            raise without_name(error, data) from error


def without_name(error: ImageError, source: Path | str | bytes) -> ImageError:
    """The error without its source's name in front."""
    return ImageError(str(error).removeprefix(f"{source_name(source)}: "))


def find_images(inputs: Sequence[str | Path], left_out: Counter[str] | None = None) -> list[ImageItem]:
    """Every image that the inputs lead to, once, in an order that never changes.

    Folders are searched to the bottom, hidden names left out, in natural order (img2 before img10); a tar in its own.
    What folders, globs and tars hold of other files is counted in `left_out` by suffix (".json", "" for none), and so
    is a file named directly that is no image by name nor content: a shell that expands `folder/*` names them all.
    Raises MMGPTError naming an input that does not exist or holds no image. A broken tar is an item with an error.
    """
    left_out = Counter() if left_out is None else left_out
    items: dict[str, ImageItem] = {}
    nothing = ""
    for given in [os.fspath(i) for i in inputs]:
        before = left_out.total()
        found = False
        for item in _expand(given, left_out):
            found = True
            items.setdefault(identity(item.name), item)
        if not found:
            nothing = f"{source_name(given)}: holds no image (.{', .'.join(IMAGE_SUFFIXES)}) and no tar of images"
            if os.path.isdir(given) or not os.path.isfile(given) or left_out.total() == before:
                raise MMGPTError(nothing)
    if not items and nothing:
        raise MMGPTError(nothing)
    return list(items.values())


def identity(name: str) -> str:
    """The same for all spellings of one image's name: relative and absolute paths meet.

    Only leading ".." are resolved: later ones can only be a tar member's own name, which must not leave its tar.
    """
    if is_url(name):
        return name
    folder = os.getcwd()
    while name.startswith("../"):
        folder, name = os.path.dirname(folder), name[3:]
    return os.path.join(folder, name)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers inside names by value; `name` itself decides between 01 and 1."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _expand(given: str, left_out: Counter[str]) -> Iterator[ImageItem]:
    if given.lower().startswith(("http://", "https://")):
        yield ImageItem(given, given)
    elif os.path.isdir(given):
        yield from _folder(given, left_out)
    elif os.path.lexists(given):
        if _suffix(given) in (*IMAGE_SUFFIXES, "tar") or _may_be_image(given):
            yield from _file(given, left_out)
        else:
            left_out[_shown(given)] += 1
    elif glob.has_magic(given):
        matches = sorted(glob.iglob(given, recursive=True), key=natural_key)
        if not matches:
            raise MMGPTError(f"{source_name(given)}: no file matches")
        for match in matches:
            if os.path.isdir(match):
                yield from _folder(match, left_out)
            else:
                yield from _wanted(match, left_out)
    else:
        raise MMGPTError(f"{source_name(given)}: no such file or folder")


def _folder(folder: str, left_out: Counter[str]) -> Iterator[ImageItem]:
    problems: list[OSError] = []
    for root, folders, files in os.walk(folder, onerror=problems.append):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        for name in sorted(files, key=natural_key):
            yield from _wanted(os.path.join(root, name), left_out)
    for problem in problems:
        yield ImageItem(os.path.normpath(problem.filename), ImageError(f"cannot read the folder ({problem.strerror})"))


def _wanted(path: str, left_out: Counter[str]) -> Iterator[ImageItem]:
    """A file that was not named directly: an image or a tar by its name."""
    if os.path.basename(path).startswith("."):
        return
    if _suffix(path) in (*IMAGE_SUFFIXES, "tar"):
        yield from _file(path, left_out)
    else:
        left_out[_shown(path)] += 1


def _file(path: str, left_out: Counter[str]) -> Iterator[ImageItem]:
    if _suffix(path) == "tar":
        yield from _tar(path, left_out)
    else:
        yield ImageItem(os.path.normpath(path), Path(path))


def _tar(path: str, left_out: Counter[str]) -> Iterator[ImageItem]:
    name = os.path.normpath(path)
    try:
        with open(path, "rb") as file, Tar(file, jumps=True) as tar:
            while (member := tar.next()) is not None:
                if not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue
                if _suffix(member.name) not in IMAGE_SUFFIXES:
                    left_out[_shown(member.name)] += 1
                    continue
                piece = TarSlice(path, member.offset_data, member.size)
                sparse = ImageError("a sparse tar member")  # small on disk, huge in memory
                yield ImageItem(f"{name}/{member.name}", sparse if member.issparse() else piece)
    except TAR_ERRORS as error:
        reason = " ".join(str(error).split())
        yield ImageItem(name, ImageError(f"not an uncompressed tar, or cut off; the rest is unread ({reason})"))


def _may_be_image(path: str) -> bool:
    """Whether a file named directly is tried: an image by its content, one that says why it is not read, or no file."""
    try:
        if _suffix(path) in OTHER_SUFFIXES or not stat.S_ISREG(os.stat(path).st_mode):
            return True
        with open(path, "rb") as file:
            return find_format(file.read(512)) is not None
    except OSError:
        return True


def _suffix(name: str) -> str:
    """Lower case, without the dot."""
    return os.path.splitext(os.path.basename(name))[1][1:].lower()


def _shown(name: str) -> str:
    return f".{suffix}" if (suffix := _suffix(name)) else ""
