"""Plain text as training documents: `.txt` files, cut where a row of tokens ends."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from mm_gpt.datasets.samples import IMAGE_SUFFIXES, ErrorCounter
from mm_gpt.document import Document, Text
from mm_gpt.tokenizer import Tokenizer

MARGIN = 8
"""A piece of a text may take a few tokens more alone than as part of the whole."""
CHUNK = 2**18
"""Characters that are encoded at a time: a tokenizer's answer takes some hundred times the memory of its text."""
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


def text_documents(text: str, tokenizer: Tokenizer, max_tokens: int, *, id: str = "") -> Iterator[Document]:
    """Documents of at most `max_tokens` tokens each; every token is learned, the end of the text as well."""
    pieces: list[str] = []
    for start in range(0, len(text), CHUNK):
        pieces += _pieces(text[start : start + CHUNK], tokenizer, max_tokens)
    for number, piece in enumerate(pieces, start=1):
        segments = [Text(piece)]
        if number == len(pieces):
            segments.append(Text(tokenizer.end_of_text, is_control=True))
        yield Document(tuple(segments), id=f"{id}:{number}" if len(pieces) > 1 else id)


def _pieces(text: str, tokenizer: Tokenizer, max_tokens: int) -> Iterator[str]:
    room = max(1, max_tokens - MARGIN)
    spans = tokenizer.backend.encode(text, add_special_tokens=False).offsets
    for start, end in pairwise([0, *(spans[at][0] for at in range(room, len(spans), room)), len(text)]):
        if end > start:
            yield from _fitting(text[start:end], tokenizer, max_tokens - len(tokenizer.prefix_ids) - 1)


def _fitting(piece: str, tokenizer: Tokenizer, room: int) -> Iterator[str]:
    """The piece, or its halves where it takes more tokens: a special token that stands in a text is many there."""
    if len(piece) > 1 and len(tokenizer.encode(piece)) > room:
        half = len(piece) // 2
        yield from _fitting(piece[:half], tokenizer, room)
        yield from _fitting(piece[half:], tokenizer, room)
    else:
        yield piece
