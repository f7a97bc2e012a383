"""Documents cut to the length of a row: what a piece is, and what it takes in tokens.

A piece is a span of a document between two cuts. Text may be cut between any two tokens, an image never: it goes to the
next piece as a whole.
"""

import dataclasses
from collections.abc import Sequence

from mm_gpt.datasets.formats.preferences import is_plain_text, learned_messages
from mm_gpt.datasets.samples import BadRecordError, Conversation
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.processor import Processor

Place = tuple[int, int]


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
    start: Place
    """(segment, character)"""
    end: Place
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


PieceSize = tuple[Piece, int, int]
"""A piece, its tokens, its images."""


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
    start = whole.start
    while start < whole.end:
        end, length = _fill(segments, start, processor, max_tokens)
        if _is_mark(segments[end[0] :]) and (nearer := _shorter(segments, start, end)) is not None:
            # Alone in a piece, the end of the text would never be learned. Half a word may take more than all of it.
            fewer = _length(Piece(start, nearer).of(segments), processor)
            if fewer <= max_tokens:
                end, length = nearer, fewer
        if length:
            pieces.append((Piece(start, end), length))
        start = end
    return pieces


def _is_mark(segments: Sequence[Segment]) -> bool:
    return len(segments) == 1 and isinstance(segments[0], Text) and segments[0].is_control


def _fill(segments: Sequence[Segment], start: Place, processor: Processor, max_tokens: int) -> tuple[Place, int]:
    """Where a piece that begins at `start` ends, and what it takes."""
    room = max_tokens
    end, length = (0, 0), max_tokens + 1
    for _ in range(
        4
    ):  # text may take more tokens alone than as part of the whole; much more, where it names special ones
        end = _reach(segments, start, processor, room)
        length = _length(Piece(start, end).of(segments), processor)
        room = room * max_tokens // max(1, length)
        if length <= max_tokens or room < 1:
            break
    while length > max_tokens and (shorter := _shorter(segments, start, end)) is not None:
        end = shorter
        length = _length(Piece(start, end).of(segments), processor)
    return end, length


def _reach(segments: Sequence[Segment], start: Place, processor: Processor, room: int) -> Place:
    """How far about `room` tokens go from `start`: at least over something."""
    number, char = start
    used = len(processor.tokenizer.prefix_ids) if processor.config.begin_of_text else 0
    while number < len(segments):
        segment = segments[number]
        if isinstance(segment, Image):
            tokens = _length([segment], processor)
            if used + tokens > room and (number, char) != start:
                return number, 0
            used += tokens
        elif segment.is_control:
            if used + 1 > room and (number, char) != start:
                return number, 0
            used += 1
        else:
            text = segment.text[char : char + 6 * room + 256]  # a book is not encoded for one row of it
            spans = processor.tokenizer.backend.encode(text, add_special_tokens=False).offsets
            if spans and used + len(spans) > room:
                at = spans[max(0, room - used)][0]
                if (number, char) == start:  # several tokens may share a character: then it stays whole
                    at = max(at, 1)
                return (number, char + at) if char + at < len(segment.text) else (number + 1, 0)
            used += len(spans)
            if char + len(text) < len(segment.text):
                char += len(text)
                continue
        number, char = number + 1, 0
    return len(segments), 0


def _shorter(segments: Sequence[Segment], start: Place, end: Place) -> Place | None:
    """A cut nearer to `start`; None when there is nothing to take away."""
    (first, first_char), (last, last_char) = start, end
    if last_char == 0 and last - first > 1:
        return last - 1, 0
    if last_char == 0:  # one segment, to its end
        segment = segments[first]
        last, last_char = first, len(segment.text) if isinstance(segment, Text) and not segment.is_control else 0
    begin = first_char if first == last else 0
    if last_char - begin > 1:
        return last, begin + (last_char - begin) * 7 // 8
    return (last, 0) if last > first else None


def _length(segments: Sequence[Segment], processor: Processor) -> int:
    """Tokens, whatever the context holds."""
    return processor.count(Document(tuple(segments)))


def sample_pieces(sample: Document | Conversation, processor: Processor, max_tokens: int) -> list[PieceSize]:
    """(piece, tokens, images) of a sample. Raises BadRecordError for one that cannot be trained on.

    Only web documents are cut: a conversation is one piece, or none when it is longer than the context.
    """
    try:
        if isinstance(sample, Conversation):
            document = conversation_document(sample, processor)
            tokens = len(processor(document))
            return [(Piece((0, 0), (len(document.segments), 0)), tokens, len(document.images))]
        segments = _measurable(training_segments(sample, processor), processor)
        pieces = [
            (piece, tokens, sum(isinstance(s, Image) for s in piece.of(segments)))
            for piece, tokens in cut(segments, processor, max_tokens)
            if tokens <= processor.config.max_length
        ]
    except ContextOverflowError:
        raise BadRecordError("longer than the context") from None
    except ImageError:
        raise BadRecordError("broken image") from None
    except MMGPTError as error:
        raise BadRecordError(f"cannot be written ({str(error)[:80]})") from None
    if not pieces:
        raise BadRecordError("longer than the context")
    return pieces


def conversation_document(sample: Conversation, processor: Processor) -> Document:
    """What the model reads of a conversation, and learns of it: every answer, or the best completion of a comparison.

    Raises BadRecordError when there is nothing to learn, MMGPTError when the template refuses it.
    """
    messages = learned_messages(sample)
    if not is_plain_text(sample):
        return processor.training_chat(messages)
    texts = [
        Text(part, is_target=turn["role"] == "assistant")
        for turn in messages
        for part in turn["content"]
        if isinstance(part, str)
    ]
    return Document((*texts, Text(processor.tokenizer.end_of_text, is_control=True)))


def _measurable(segments: Sequence[Segment], processor: Processor) -> Sequence[Segment]:
    """With nothing in the place of each image that has no size, where the tokens depend on that."""
    if processor.config.tiling is None:
        return segments

    def has_size(image: Image) -> bool:
        try:
            return bool(image.size())
        except ImageError:
            return False

    return [Text("") if isinstance(segment, Image) and not has_size(segment) else segment for segment in segments]


def piece_document(sample: Document | Conversation, piece: Piece, processor: Processor) -> Document:
    """The piece of a web document or conversation as the Document to train on."""
    if isinstance(sample, Conversation):
        return dataclasses.replace(conversation_document(sample, processor), id=sample.key)
    return Document(piece.of(training_segments(sample, processor)), id=sample.id)
