"""What the language stage is trained on: the samples of a source as documents, drawn anew each pass."""

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_gpt.datasets.formats.captioned import clean_caption
from mm_gpt.datasets.formats.texts import is_text_source, read_texts
from mm_gpt.datasets.loading.caption_questions import derive_questions
from mm_gpt.datasets.loading.pieces import piece_document, sample_pieces
from mm_gpt.datasets.loading.plan import shuffled
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter, Record, Sample
from mm_gpt.datasets.sources import SourceInfo, read_samples
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.images import is_url
from mm_gpt.processor import Processor
from mm_gpt.templates.prompts import CAPTION_PROMPT, OTHER_CAPTION_PROMPTS, question_prompt


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str
    """A corpus folder, a tar, a folder of tars or of captioned images, a `.jsonl` of text chats, a `.txt` or folder of
    them without images, or any other format of `mm_gpt.datasets.sources`; relative to the data folder."""
    repeat: float = 1.0
    """How many times an epoch; 0.5 is half of it, another half each time."""
    weight: float | None = None
    """Relative share of the tokens while the source lasts; None: by its size, so that it lasts the epoch."""
    derived_share: float = 0.0
    """The share of captioned photos that also come with questions derived by rules from their captions."""
    format: str = "auto"
    """One of `mm_gpt.datasets.sources.FORMATS`; `auto` tells by the files."""
    images: str | None = None
    """The folder or URL that image names are relative to, where a format names files."""


@dataclass(frozen=True)
class Drawing:
    """How documents are drawn from records: see the fields of LanguageRecipe."""

    max_captions: int
    max_questions: int
    augment: bool
    separate: bool
    """Each caption and answer a document of its own, not a branch of one that they share."""


def draw(
    sample: Sample, source: SourceConfig, rng: random.Random, processor: Processor, how: Drawing
) -> list[Document]:
    """Documents of a sample: of a record its captions and one of its questions, as far as it has them."""
    if isinstance(sample, Document):
        return [sample]
    if isinstance(sample, Conversation):
        return [replace(processor.chat(sample.messages, answer_starts=False), id=sample.key)]
    documents = []
    if sample.captions:
        captions = rng.sample(sample.captions, min(len(sample.captions), how.max_captions))
        prompt = CAPTION_PROMPT if rng.random() < 0.6 else rng.choice(OTHER_CAPTION_PROMPTS)
        cleaned = [clean_caption(caption) for caption in captions]
        image = record_image(sample, captions, rng, how.augment)
        documents.append(processor.captions(image, prompt, cleaned, id=sample.key))
    if pairs := training_questions(sample, source, rng, how.max_questions):
        image = record_image(sample, [text for pair in pairs for text in pair], rng, how.augment)
        documents.append(processor.questions(image, pairs, id=sample.key))
    if how.separate:
        documents = [Document(d.segments + branch, id=d.id) for d in documents for branch in d.branches]
    return documents


class SampleSource:
    """A list of samples in memory as a source of a plan; what is drawn from one follows from (seed, pass, number)."""

    def __init__(
        self, name: str, samples: Sequence[Sample], draw_from: Callable[[Sample, random.Random], list[Document]],
        processor: Processor, seed: int, errors: ErrorCounter,
    ):  # fmt: skip
        self.name, self.samples, self._draw, self.processor, self.seed = name, samples, draw_from, processor, seed
        self.errors = errors
        some = range(0, len(samples), max(1, len(samples) // 64))  # an estimate is enough to weigh sources
        lengths = [length for at in some for length in self._lengths(0, at) if length < math.inf]
        self.tokens = sum(lengths) / max(1, len(some)) * len(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def units(self, number: int, start: int, seed: int) -> Iterator[list[tuple[tuple[int, ...], int]]]:
        for at in shuffled(len(self.samples), seed, self.name, number)[start:]:
            found = self._lengths(number, at)
            if number == 0 and math.inf in found:
                self.errors.add("longer than the context", f"{self.name}:{sample_name(self.samples[at])}")
            lengths = enumerate(found)
            yield [((number, at, part), int(length)) for part, length in lengths if length < math.inf]

    def document(self, unit: tuple[int, ...]) -> Document:
        number, at, part = unit
        return self.documents(number, at)[part]

    def documents(self, number: int, at: int) -> list[Document]:
        """What pass `number` draws from a sample."""
        return self._draw(self.samples[at], self._rng(number, at))

    def _lengths(self, number: int, at: int) -> list[float]:
        return [length_of(document, self.processor) for document in self.documents(number, at)]

    def _rng(self, number: int, at: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.name}/{number}/{at}")


def sample_name(sample: Sample) -> str:
    return sample.id if isinstance(sample, Document) else sample.key


def length_of(document: Document, processor: Processor) -> float:
    """Tokens; infinite for what the context does not hold or whose image cannot be read."""
    try:
        return len(processor(document))
    except (ContextOverflowError, ImageError):
        return math.inf


# ---- Reading sources ----


def source_location(source: SourceConfig, folder: Path) -> str:
    """The path or URL of a source."""
    return source.path if "://" in source.path else str(folder / source.path)


def read_source(source: SourceConfig, folder: Path, errors: ErrorCounter) -> list[Sample] | None:
    """All samples of a source that is no corpus; None for a corpus, whose samples stay on disk.

    Images of records are decoded once, so that a broken file is known before hours of training; those behind URLs when
    they are needed. Raises MMGPTError when the source is missing, and for a chat that is malformed.
    """
    location = source_location(source, folder)
    path = folder / source.path
    if source.format == "corpus" or (source.format == "auto" and SourceInfo(location).is_corpus):
        return None
    if source.format == "auto":
        if is_text_source(path):
            return [Document((Text(text),), id=name) for name, text in read_texts(path, errors)]
        if path.suffix == ".jsonl" and (chats := _chats(path)) is not None:
            return chats
    samples = read_samples(location, errors, format=source.format, images=source.images)
    return [sample for sample in samples if _decodes(sample, path.name, errors)]


def cut_documents(
    samples: Sequence[Sample], processor: Processor, max_tokens: int, errors: ErrorCounter
) -> list[Sample]:
    """Web documents and texts as pieces that fit a row; other samples as they are. What has no piece is counted."""
    found: list[Sample] = []
    for sample in samples:
        if not isinstance(sample, Document) or sample.branches:
            found.append(sample)
            continue
        try:
            pieces = sample_pieces(sample, processor, max_tokens)
        except BadRecordError as error:
            errors.add(str(error), sample.id)
            continue
        for number, (piece, _, _) in enumerate(pieces, start=1):
            document = piece_document(sample, piece, processor)
            found.append(replace(document, id=f"{sample.id}:{number}" if len(pieces) > 1 else sample.id))
    return found


def _decodes(sample: Sample, name: str, errors: ErrorCounter) -> bool:
    if isinstance(sample, Record) and not is_url(sample.image):
        try:
            Image(sample.image).load()
        except ImageError as error:
            errors.add("broken image", f"{name}:{sample.key}: {error}")
            return False
    return True


def read_whole_records(path: Path, errors: ErrorCounter) -> list[Record]:
    """The records of a source of captioned images, all of which can be decoded; the others are counted and skipped."""
    samples = read_source(SourceConfig(path=str(path)), Path(), errors) or []
    return [sample for sample in samples if isinstance(sample, Record)]


def _chats(path: Path) -> list[Sample] | None:
    """Chats from a .jsonl of `{"messages": [...]}`; None when its first line is something else. Raises MMGPTError."""
    lines = _read_lines(path)
    first = next(lines, (0, "{}"))
    try:
        values = json.loads(first[1])
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and "messages" not in values:
        return None
    every = [first, *lines]
    return [Conversation(f"{path.name}:{number}", tuple(_messages(path, number, line))) for number, line in every]


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers: only `\\n` ends one, U+2028 may stand inside a string."""
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise MMGPTError(f"{path}: not UTF-8") from None


def _messages(path: Path, number: int, line: str) -> list[Any]:
    try:
        messages = json.loads(line)["messages"]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError):
        messages = None
    if not isinstance(messages, list):
        raise MMGPTError(f"{path}:{number}: not an object with a list of 'messages'")
    return messages


def check_chats(samples: Sequence[Sample], processor: Processor, path: Path) -> None:
    """Render every conversation once. Raises MMGPTError naming the file and line of one that is malformed."""
    for sample in samples:
        if isinstance(sample, Conversation):
            try:
                processor.chat(sample.messages, answer_starts=False)
            except MMGPTError as error:
                raise MMGPTError(f"{path.parent / sample.key}: {error}") from None


def written_texts(sample: Sample) -> list[str]:
    """All that is written in a sample, for a tokenizer to learn from."""
    match sample:
        case Document():
            return [segment.text for segment in sample.segments if isinstance(segment, Text)]
        case Conversation():
            return [text for message in sample.messages for text in _message_texts(message)]
        case Record():
            captions = [clean_caption(caption) for caption in sample.captions]
            return captions + [text for q in sample.questions for text in (q.question, q.answer)]


def _message_texts(message: Any) -> list[str]:
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


# ---- Documents from records ----


_SIDED = re.compile(r"\b(left|right|sign|sa(ys|ying)|reads?|reading|writing|written|words?|letters?|numbers?)\b", re.I)
"""Texts that a mirror image would make untrue."""


def record_image(record: Record, texts: Sequence[str], rng: random.Random, augment: bool) -> Image:
    """The record's image; with `augment`, its mirror image half the time when `texts` fit that as well."""
    return Image(record.image, augment and rng.random() < 0.5 and not any(map(_SIDED.search, texts)))


def training_questions(
    record: Record, source: SourceConfig, rng: random.Random, max_questions: int
) -> list[tuple[str, str]]:
    """(question, answer) pairs about one image: its own, and with some chance ones derived from its captions."""
    questions = rng.sample(record.questions, min(len(record.questions), max_questions))
    if record.captions and rng.random() < source.derived_share:
        questions += derive_questions(record.captions, rng, max_questions=max_questions)
    return [(training_prompt(q.question, q.answer, rng), q.answer) for q in questions]


def training_prompt(question: str, answer: str, rng: random.Random) -> str:
    """A question as users may type it: half of them with a capital letter."""
    prompt = question_prompt(question, answer)
    return prompt[:1].upper() + prompt[1:] if rng.random() < 0.5 else prompt
