"""What sources yield: Documents, Records (an image and what people say about it), Conversations; and what they skip."""

import importlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from mm_gpt.document import Concepts, Document, Image, Message, Text
from mm_gpt.errors import MMGPTError, not_installed
from mm_gpt.image_headers import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from mm_gpt.image_headers import OTHER_KINDS

logger = logging.getLogger(__name__)

_DOCUMENTS = (".pdf", ".doc", ".docx", ".odt", ".rtf", ".pptx", ".epub")
_FILMS = (".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
_SOUNDS = (".mp3", ".wav", ".flac", ".ogg", ".m4a", ".aac", ".opus")
_OTHER_KINDS = [f".{suffix}" for kind in OTHER_KINDS for suffix in kind.suffixes]
UNREAD_PICTURES = (*(suffix for suffix in _OTHER_KINDS if suffix not in _DOCUMENTS), *_FILMS)
"""Pictures and films that no reader takes. A text beside one is its caption, and no document."""
UNREAD_SUFFIXES = (*UNREAD_PICTURES, *_SOUNDS, *_DOCUMENTS)
"""What no reader takes, though people may expect it: a folder that holds some is told so."""


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about an image. `answers` holds every accepted answer, `answer` first."""

    question: str
    answer: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """An image that is not decoded yet (file bytes from a tar, a path, an http(s) URL) and what people say about it.

    Or only the concepts of one: what a model's classifier would see.
    """

    key: str
    image: bytes | Path | str | Concepts
    captions: tuple[str, ...] = ()
    questions: tuple[QuestionAnswer, ...] = ()
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else is known about it, as JSON values: `url`, `boxes`, `question_ids`, ..."""


@dataclass(frozen=True)
class Conversation:
    """Turns about images that are not decoded yet: what the model's chat template renders. Assistant turns are learned.

    Content parts are strings and `mm_gpt.document.Image`s.
    """

    key: str
    messages: tuple[Message, ...]
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


Sample: TypeAlias = Document | Record | Conversation
AnySample = TypeVar("AnySample", bound=Sample)


class BadRecordError(Exception):
    """Why one record is skipped: readers catch it and count it. The message is the reason, a few words."""


def optional_import(name: str, *, extra: str = "corpus") -> Any:
    """The module of an optional package. Raises MMGPTError that tells how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise MMGPTError(not_installed(package, extra)) from None


@dataclass
class ErrorCounter:
    """Skipped records by reason, with the names of the first few."""

    max_examples: int = 5
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, record: str) -> None:
        """Count `record` under `reason` and log it; after `max_examples` of one reason, only count."""
        # Names on old disks are not always Unicode: half a character would break whatever it is printed to.
        record = record.encode("utf-8", "backslashreplace").decode()
        self.counts[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < self.max_examples:
            named.append(record)
            last = "; more of this kind are only counted" if len(named) == self.max_examples else ""
            logger.warning("skipped %s: %s%s", record, reason, last)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def summary(self) -> str:
        """One line, such as `3 records skipped: 2 bad JSON (a.tar:7, a.tar:9); 1 empty image (a.tar:8)`."""
        if not self.counts:
            return "no records skipped"
        parts = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            more = ", ..." if count > len(self.examples[reason]) else ""
            parts.append(f"{count} {reason} ({', '.join(self.examples[reason])}{more})")
        return f"{self.total} record{'s' if self.total != 1 else ''} skipped: {'; '.join(parts)}"

    def merge(self, other: "ErrorCounter") -> None:
        """Add what another counter, of another process say, has counted."""
        self.counts += other.counts
        for reason, names in other.examples.items():
            own = self.examples.setdefault(reason, [])
            own += names[: self.max_examples - len(own)]


def sample_name(sample: Sample) -> str:
    """What messages call a sample."""
    return sample.id if isinstance(sample, Document) else sample.key


def checked(samples: Iterable[AnySample], errors: ErrorCounter) -> Iterator[AnySample]:
    """The samples that can be written as UTF-8. One with half a character anywhere in it is counted: it would stop
    whatever tokenises or stores it.
    """
    for sample in samples:
        try:
            json.dumps(sample, ensure_ascii=False, skipkeys=True, default=_parts).encode()
        except UnicodeEncodeError:
            errors.add("text is not Unicode", sample_name(sample))
        except RecursionError:
            errors.add("nested too deeply", sample_name(sample))
        else:
            yield sample


def _parts(value: Any) -> Any:
    """What is written in a sample or a part of it, as JSON values."""
    match value:
        case Document():
            return [value.id, value.segments, value.branches, value.metadata]
        case Record():
            concepts = dict(value.image.scores) if isinstance(value.image, Concepts) else None
            return [value.key, concepts, value.captions, value.questions, value.source, value.metadata]
        case Conversation():
            return [value.key, value.messages, value.source, value.metadata]
        case QuestionAnswer():
            return [value.question, value.answer, value.answers]
        case Text():
            return value.text
        case Image():
            return value.alt
        case Mapping():
            return dict(value)
    return None


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Key and suffix of a tar's member, as webdataset tells them: the suffix begins at the first dot of the last part.

    Nones for a name without a dot, or with nothing before it: no part of a sample. (webdataset's own function would
    bring torch into each process that only reads a tar.)
    """
    folder, slash, own = name.rpartition("/")
    base, dot, suffix = own.partition(".")
    named = base or (slash and "." not in folder)  # `folder/.suffix` has a key there as well
    return (f"{folder}{slash}{base}", suffix) if named and dot else (None, None)
