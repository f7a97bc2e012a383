"""Documents cut to the length of a row: what a piece is, what it takes in tokens, and tables of a shard's pieces.

A piece is a span of a document between two cuts. Text may be cut between any two tokens, an image never: it goes to the
next piece as a whole. Pieces are found once for each (tokenizer, image size, row length) and kept beside the corpus
as small tables, so that the plan of an epoch needs no text.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mm_gpt.datasets.samples import Conversation, Record, Sample
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.processor import Processor

VERSION = 1
COLUMNS = ("sample", "start_segment", "start_char", "end_segment", "end_char", "tokens", "images")
"""Of a table of pieces, int32. A piece ends before (end_segment, end_char)."""


def training_segments(document: Document, processor: Processor) -> tuple[Segment, ...]:
    """What the model reads of a web document: paragraphs with an empty line between them, images in place, and the end
    of text, which is learned as well. Nothing is written around an image: its own marks set it off.
    """
    segments: list[Segment] = []
    for segment in document.segments:
        if isinstance(segment, Text) and segments and isinstance(segments[-1], Text):
            segment = dataclasses.replace(segment, text="\n\n" + segment.text)
        segments.append(segment)
    return (*segments, Text(processor.tokenizer.end_of_text, is_control=True))


@dataclasses.dataclass(frozen=True)
class Piece:
    start: tuple[int, int]
    """(segment, character)"""
    end: tuple[int, int]
    """One behind the last; (n, 0) is before segment n."""

    def of(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """This span of a document's segments. Raises MMGPTError when it is not of this document."""
        (first, first_char), (last, last_char) = self.start, self.end
        if not 0 <= first <= last <= len(segments):
            raise MMGPTError("a piece that is not of this document")
        found: list[Segment] = []
        for number in range(first, min(last + 1, len(segments))):
            segment = segments[number]
            if isinstance(segment, Image):
                if number < last:
                    found.append(segment)
                continue
            text = segment.text[first_char if number == first else 0 : last_char if number == last else None]
            if text:
                found.append(dataclasses.replace(segment, text=text))
        return tuple(found)


def cut(segments: Sequence[Segment], processor: Processor, max_tokens: int) -> list[tuple[Piece, int]]:
    """Pieces of at most `max_tokens` tokens, as full as whole images allow, and what each takes.

    A single image that takes more than that stands alone, in a piece longer than `max_tokens`.
    Raises ImageError when an image's size is needed and cannot be read.
    """
    whole = Piece((0, 0), (len(segments), 0))
    characters = sum(len(s.text) for s in segments if isinstance(s, Text))
    if characters <= 16 * max_tokens:  # or it cannot be one piece: no need to try
        length = _length(segments, processor)
        if length <= max_tokens:
            return [(whole, length)]
    pieces: list[tuple[Piece, int]] = []
    start = (0, 0)
    while start < whole.end:
        room = max_tokens
        end = _reach(segments, start, processor, room)
        length = _length(Piece(start, end).of(segments), processor)
        for _ in range(3):  # a piece may take a few tokens more alone than as part of the whole
            if length <= max_tokens:
                break
            room -= length - max_tokens
            if room < 1:
                break
            end = _reach(segments, start, processor, room)
            length = _length(Piece(start, end).of(segments), processor)
        while length > max_tokens and (shorter := _shorter(segments, start, end)) is not None:
            end = shorter
            length = _length(Piece(start, end).of(segments), processor)
        if length:
            pieces.append((Piece(start, end), length))
        start = end
    return pieces


def _reach(segments: Sequence[Segment], start: tuple[int, int], processor: Processor, room: int) -> tuple[int, int]:
    """How far about `room` tokens go from `start`: at least over something."""
    number, char = start
    used = len(processor.tokenizer.prefix_ids)
    while number < len(segments):
        segment = segments[number]
        if isinstance(segment, Image):
            tokens = _length([segment], processor)
            if used + tokens > room and (number, char) != start:
                return number, 0
            used += tokens
        elif segment.is_control:
            used += 1
        else:
            text = segment.text[char : char + 6 * room]  # enough for most: a book is not encoded for one row of it
            spans = processor.tokenizer.backend.encode(text, add_special_tokens=False).offsets
            if used + len(spans) > room:
                least = 1 if (number, char) == start else 0
                at = spans[max(room - used, least)][0] if max(room - used, least) < len(spans) else len(text)
                # Several tokens may share a character: then it stays whole.
                at = max(at, min(1, len(text))) if least else at
                return (number, char + at) if char + at else (number, 0)
            used += len(spans)
            if char + len(text) < len(segment.text):
                char += len(text)
                continue
        number, char = number + 1, 0
    return len(segments), 0


def _shorter(segments: Sequence[Segment], start: tuple[int, int], end: tuple[int, int]) -> tuple[int, int] | None:
    """A cut nearer to `start`; None when there is nothing to take away."""
    (first, first_char), (last, last_char) = start, end
    if last_char:
        begin = first_char if first == last else 0
        if last_char - begin > 1:
            return last, begin + (last_char - begin) * 7 // 8
        return (last, 0) if last > first else None
    if last - 1 > first:
        return last - 1, 0
    segment = segments[first]
    if isinstance(segment, Text) and len(segment.text) - first_char > 1:
        return first, first_char + (len(segment.text) - first_char) // 2
    return None


def _length(segments: Sequence[Segment], processor: Processor) -> int:
    """Tokens, whatever the context holds."""
    return processor.count(Document(tuple(segments)))


def sample_pieces(sample: Sample, processor: Processor, max_tokens: int) -> list[tuple[Piece, int, int]]:
    """(piece, tokens, images) of a sample, none of what cannot be trained on.

    Only web documents are cut: a conversation is one piece, or none when it is longer than the context. A Record's
    documents are drawn anew each epoch (`mm_gpt.training.language`): it has no pieces here.
    """
    try:
        match sample:
            case Document():
                segments = training_segments(sample, processor)
                return [
                    (piece, tokens, sum(isinstance(s, Image) for s in piece.of(segments)))
                    for piece, tokens in cut(segments, processor, max_tokens)
                    if tokens <= processor.config.max_length
                ]
            case Conversation():
                document = processor.chat(sample.messages, answer_starts=False)
                tokens = len(processor(document))
                return [(Piece((0, 0), (len(document.segments), 0)), tokens, len(document.images))]
            case Record():
                return []
    except (ContextOverflowError, ImageError):
        return []


def piece_document(sample: Sample, piece: Piece, processor: Processor) -> Document:
    """The piece of a web document or conversation as the Document to train on."""
    assert not isinstance(sample, Record)
    if isinstance(sample, Conversation):
        return dataclasses.replace(processor.chat(sample.messages, answer_starts=False), id=sample.key)
    return Document(piece.of(training_segments(sample, processor)), id=sample.id)


# ---- Tables ----


def fingerprint(processor: Processor, max_tokens: int) -> str:
    """Names what a table of pieces depends on besides the shard: 16 hexadecimal digits."""
    config = dataclasses.asdict(processor.config)
    parts = [VERSION, max_tokens, processor.tokenizer.fingerprint, processor.vocab_size, config]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_table(samples: Iterator[tuple[int, Sample]], processor: Processor, max_tokens: int) -> np.ndarray:
    """int32 (P, 7), see COLUMNS, of (number in the shard, sample) pairs."""
    rows = [
        (number, *piece.start, *piece.end, tokens, images)
        for number, sample in samples
        for piece, tokens, images in sample_pieces(sample, processor, max_tokens)
    ]
    return np.array(rows, dtype=np.int32).reshape(-1, len(COLUMNS))


def save_table(path: Path, table: np.ndarray) -> None:
    """In one piece: several processes may write the same table at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        np.save(file, table, allow_pickle=False)
    os.replace(temporary, path)


def load_table(path: Path) -> np.ndarray | None:
    """None when there is none, or a broken one."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    fits = table.dtype == np.int32 and table.ndim == 2 and table.shape[1] == len(COLUMNS)
    return table if fits else None


def row_piece(row: np.ndarray) -> Piece:
    _, first, first_char, last, last_char, _, _ = (int(value) for value in row)
    return Piece((first, first_char), (last, last_char))
