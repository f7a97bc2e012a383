"""Plain text: `.txt` files."""

from collections.abc import Iterator
from pathlib import Path

from mm_gpt.datasets.samples import IMAGE_SUFFIXES, ErrorCounter

OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "heic", "avif")
"""Are not read as sources, but the texts beside them are captions all the same."""


def is_text_source(path: Path) -> bool:
    """A `.txt` file, or a folder that has some and no image: captions stand beside their images."""
    if path.is_file():
        return path.suffix.lower() == ".txt"
    if not path.is_dir():
        return False
    suffixes = {file.suffix.lower().lstrip(".") for file in path.rglob("*") if file.is_file()}
    return "txt" in suffixes and not suffixes & {*IMAGE_SUFFIXES, *OTHER_IMAGES, "tar"}


def read_texts(path: Path, errors: ErrorCounter) -> Iterator[tuple[str, str]]:
    """(name, text) of each file, sorted by name. What is not UTF-8 or empty is counted in `errors` and skipped."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.suffix.lower() != ".txt" or not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            errors.add("unreadable text", f"{file}: {error}")
            continue
        if text:
            yield file.name, text
        else:
            errors.add("empty text", str(file))
