"""Plain text as training documents: `.txt` files, cut where a row of tokens ends."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from mm_gpt.datasets.sources import IMAGE_SUFFIXES, ErrorCounter
from mm_gpt.document import Document, Text
from mm_gpt.tokenizer import Tokenizer

MARGIN = 8
"""A piece of a text may take a few tokens more alone than as part of the whole."""


def is_text_source(path: Path) -> bool:
    """A `.txt` file, or a folder that has some and no image: captions stand beside their images."""
    if path.is_file():
        return path.suffix == ".txt"
    if not path.is_dir():
        return False
    suffixes = {file.suffix.lower().lstrip(".") for file in path.rglob("*") if file.is_file()}
    return "txt" in suffixes and not suffixes & {*IMAGE_SUFFIXES, "tar"}


def read_texts(path: Path, errors: ErrorCounter) -> Iterator[tuple[str, str]]:
    """(name, text) of each file, sorted by name. What is not UTF-8 or empty is counted in `errors` and skipped."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.txt")):
        try:
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            errors.add("unreadable text", f"{file}: {error}")
            continue
        if text:
            yield file.name, text
        else:
            errors.add("empty text", str(file))


def text_documents(text: str, tokenizer: Tokenizer, max_tokens: int, *, id: str = "") -> Iterator[Document]:
    """Documents of at most `max_tokens` tokens each; every token is learned, the end of the text as well."""
    room = max(1, max_tokens - MARGIN)
    spans = tokenizer.backend.encode(text, add_special_tokens=False).offsets
    starts = [0, *(spans[at][0] for at in range(room, len(spans), room)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(starts) if end > start]
    for number, piece in enumerate(pieces, start=1):
        segments = [Text(piece)]
        if number == len(pieces):
            segments.append(Text(tokenizer.end_of_text, is_control=True))
        yield Document(tuple(segments), id=f"{id}:{number}" if len(pieces) > 1 else id)
