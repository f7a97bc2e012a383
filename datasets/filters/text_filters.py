"""Rules for text: of one paragraph, of a whole document, as published for OBELICS and KOSMOS-1.

Each rule is one bound of `TextBounds`, off where it is None. A measure is a small function of `Words`, which splits a
text once for all of them. OBELICS: https://arxiv.org/abs/2306.16527, KOSMOS-1: https://arxiv.org/abs/2302.14045. Their
values are in `filters.published_filters`.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property

from mm_gpt.datasets.filters.stop_words import ENGLISH_STOP_WORDS
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError

MAX_MEASURED = 2**18
"""Characters: repetition is measured in a text's beginning, or one hostile page would fill the memory."""

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_EMOJI = (
    "\u231a\u231b\u23e9-\u23f3\u2614\u2615\u26a1\u26bd\u26be\u2705\u270a\u270b\u2728\u274c\u2753-\u2757\u2764\u2b50"
)
_EMOJI += "\U0001f1e6-\U0001f1ff\U0001f300-\U0001f6ff\U0001f900-\U0001faff"
_EMOJI_PATTERN = re.compile(
    rf"(?:[{_EMOJI}]|[\u2190-\u2bff\u3030\u303d](?=\ufe0f))"
    rf"(?:[\ufe0f\U0001f3fb-\U0001f3ff]|\u200d[{_EMOJI}\u2640\u2642\u2695-\u2697])*"
)
_HASHTAG = re.compile(r"(?<![\w&/#])[#＃](?=\w{0,99}[^\W\d_])\w+")
_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_MARKS = ".,;:!?…¿¡。、，．！？；：؟،؛।॥"
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？।॥])\s*")


class Words:
    """A text with what the rules measure in it, each computed once and only when a rule asks for it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What stands between spaces, in lower case, from its first letter to its last one.

        Numbers and signs are no words. Chinese and Japanese have no spaces: each of their characters counts.
        """
        return _word_pattern().findall(self.text.lower())

    def share_in(self, words: frozenset[str]) -> float:
        """The share of the words that are in `words`; 0 without words."""
        return sum(word in words for word in self.words) / max(1, len(self.words))

    def per_word(self, pattern: re.Pattern[str]) -> float:
        """Matches of `pattern` for each word: above 1 where they outnumber the words."""
        return sum(1 for _ in pattern.finditer(self.text)) / max(1, len(self.words))


def character_repetition(text: str, length: int) -> float:
    """How much of a text its most frequent strings of `length` characters make up, from 0 to 1.

    The strings that are counted are the most frequent ones, as many as the square root of the number of different ones
    but no string that occurs once (OBELICS, after the ROOTS corpus). Only the first `MAX_MEASURED` characters count.
    """
    text = text[:MAX_MEASURED]
    counts = sorted(Counter(text[i : i + length] for i in range(len(text) - length + 1)).values(), reverse=True)
    if not counts:
        return 0.0
    repeated = sum(count > 1 for count in counts)
    return sum(counts[: min(math.isqrt(len(counts)), repeated)]) / sum(counts)


def word_repetition(words: list[str], length: int) -> float:
    """The share of a text's sequences of `length` words that occur more than once in it."""
    words = words[: MAX_MEASURED // 4]
    counts = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return sum(count for count in counts.values() if count > 1) / max(1, counts.total())


def special_characters(text: str) -> float:
    """The share of characters that are no letters: spaces, digits, signs and emoji. About 0.2 in English prose."""
    return sum(not char.isalpha() and unicodedata.category(char)[0] != "M" for char in text) / max(1, len(text))


def punctuation(text: str) -> tuple[float, int]:
    """(share of punctuation marks among words and marks, number of both)."""
    tokens = _mark_or_word().findall(text)
    return sum(token in _MARKS for token in tokens) / max(1, len(tokens)), len(tokens)


@dataclass(frozen=True, kw_only=True)
class TextBounds:
    """What a text must keep to. A bound that is None is not checked. Ratios run from 0 to 1."""

    min_words: int | None = None
    max_words: int | None = None
    max_character_repetition: float | None = None
    """See `character_repetition`."""
    character_repetition_length: int = 10
    """Characters."""
    max_word_repetition: float | None = None
    """See `word_repetition`."""
    word_repetition_length: int = 5
    """Words."""
    max_special_characters: float | None = None
    """See `special_characters`."""
    min_stop_words: float | None = None
    """Share of words that are in `stop_words`: lists, names and gibberish have few."""
    stop_words: frozenset[str] = ENGLISH_STOP_WORDS
    max_flagged_words: float | None = None
    """Share of words that are in `flagged_words`."""
    flagged_words: frozenset[str] = frozenset()
    """Yours, in lower case: no list fits every language and use, so none is built in."""
    min_punctuation: float | None = None
    """See `punctuation`."""
    min_tokens_for_punctuation: int = 0
    """Shorter texts, such as headings, need no punctuation. Words and marks."""
    min_common_words: float | None = None
    """Share of words that are in `common_words`."""
    common_words: frozenset[str] = frozenset()
    """See `datasets.text_filters.common_words`."""
    max_emoji: float | None = None
    """For each word."""
    max_hashtags: float | None = None
    """For each word."""
    max_urls: float | None = None
    """For each word."""
    max_perplexity: float | None = None
    """Of `perplexity`."""
    perplexity: Callable[[str], float] | None = None
    """How surprising a language model finds a text: yours, for instance KenLM's. Must be picklable."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value >= 0:
                raise ConfigError(f"{field.name}: must be at least 0, is {value}")
        if min(self.character_repetition_length, self.word_repetition_length) < 1:
            raise ConfigError("repetition lengths must be at least 1")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ConfigError(f"min_words {self.min_words} is above max_words {self.max_words}")
        for bound, needed in (
            ("max_flagged_words", "flagged_words"),
            ("min_common_words", "common_words"),
            ("min_stop_words", "stop_words"),
            ("max_perplexity", "perplexity"),
        ):
            if getattr(self, bound) is not None and not getattr(self, needed):
                raise ConfigError(f"{bound} needs {needed}")

    def broken_rules(self, text: str) -> Iterator[str]:
        """The rules that the text breaks, by name. Cheap rules come first, and one is measured when it is asked for."""
        words = Words(text)
        for name, breaks in _RULES:
            if breaks(self, words):
                yield name

    def first_broken_rule(self, text: str) -> str | None:
        return next(self.broken_rules(text), None)


def _too_few_words(bounds: TextBounds, text: Words) -> bool:
    return bounds.min_words is not None and len(text.words) < bounds.min_words


def _too_many_words(bounds: TextBounds, text: Words) -> bool:
    return bounds.max_words is not None and len(text.words) > bounds.max_words


def _repeated_characters(bounds: TextBounds, text: Words) -> bool:
    bound = bounds.max_character_repetition
    return bound is not None and character_repetition(text.text, bounds.character_repetition_length) > bound


def _repeated_words(bounds: TextBounds, text: Words) -> bool:
    bound = bounds.max_word_repetition
    return bound is not None and word_repetition(text.words, bounds.word_repetition_length) > bound


def _special_characters(bounds: TextBounds, text: Words) -> bool:
    return bounds.max_special_characters is not None and special_characters(text.text) > bounds.max_special_characters


def _too_few_stop_words(bounds: TextBounds, text: Words) -> bool:
    return bounds.min_stop_words is not None and text.share_in(bounds.stop_words) < bounds.min_stop_words


def _flagged_words(bounds: TextBounds, text: Words) -> bool:
    return bounds.max_flagged_words is not None and text.share_in(bounds.flagged_words) > bounds.max_flagged_words


def _too_little_punctuation(bounds: TextBounds, text: Words) -> bool:
    if bounds.min_punctuation is None:
        return False
    ratio, tokens = punctuation(text.text)
    return tokens >= bounds.min_tokens_for_punctuation and ratio < bounds.min_punctuation


def _too_few_common_words(bounds: TextBounds, text: Words) -> bool:
    return bounds.min_common_words is not None and text.share_in(bounds.common_words) < bounds.min_common_words


def _too_many_emoji(bounds: TextBounds, text: Words) -> bool:
    return bounds.max_emoji is not None and text.per_word(_EMOJI_PATTERN) > bounds.max_emoji


def _too_many_hashtags(bounds: TextBounds, text: Words) -> bool:
    return bounds.max_hashtags is not None and text.per_word(_HASHTAG) > bounds.max_hashtags


def _too_many_urls(bounds: TextBounds, text: Words) -> bool:
    return bounds.max_urls is not None and text.per_word(_URL) > bounds.max_urls


def _high_perplexity(bounds: TextBounds, text: Words) -> bool:
    if bounds.max_perplexity is None or bounds.perplexity is None:
        return False
    score = bounds.perplexity(text.text)
    return not score <= bounds.max_perplexity  # a NaN is no good text either


_RULES: tuple[tuple[str, Callable[[TextBounds, Words], bool]], ...] = (
    ("too few words", _too_few_words),
    ("too many words", _too_many_words),
    ("emoji", _too_many_emoji),
    ("hashtags", _too_many_hashtags),
    ("URLs", _too_many_urls),
    ("repeated words", _repeated_words),
    ("special characters", _special_characters),
    ("too few stop words", _too_few_stop_words),
    ("flagged words", _flagged_words),
    ("too little punctuation", _too_little_punctuation),
    ("too few common words", _too_few_common_words),
    ("repeated characters", _repeated_characters),
    ("high perplexity", _high_perplexity),
)


@dataclass(frozen=True, kw_only=True)
class ParagraphFilter(TextBounds):
    """Removes the paragraphs (text segments) that break a bound. What a chat template wrote is left alone."""

    name: str = "paragraphs"

    def __call__(self, document: Document, removed: Counter[str]) -> Document:
        kept = []
        for segment in document.segments:
            if isinstance(segment, Text) and not segment.is_control and (rule := self.first_broken_rule(segment.text)):
                removed[f"text: {rule}"] += 1
            else:
                kept.append(segment)
        return replace(document, segments=tuple(kept))


@dataclass(frozen=True, kw_only=True)
class DocumentFilter(TextBounds):
    """Drops the documents whose paragraphs, taken together, break a bound."""

    name: str = "documents"

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        rule = self.first_broken_rule(_document_text(document))
        if rule:
            removed[rule] += 1
        return None if rule else document


@dataclass(frozen=True, kw_only=True)
class RepeatedSentences:
    """Removes sentences that a document has already had, such as a notice under every picture.

    Sentences are compared by their words, so signs, numbers and case make no difference between them.
    """

    min_words: int = 5
    """Shorter sentences may come again: "Yes." is no boilerplate."""
    name: str = "repeated sentences"

    def __call__(self, document: Document, removed: Counter[str]) -> Document:
        seen: set[tuple[str, ...]] = set()
        kept: list[Text | Image] = []
        for segment in document.segments:
            if not isinstance(segment, Text) or segment.is_control:
                kept.append(segment)
                continue
            sentences = _SENTENCE_END.split(segment.text)
            fresh = [sentence for sentence in sentences if not self._is_repeated(sentence, seen)]
            if len(fresh) < len(sentences):
                removed["text: repeated sentence"] += len(sentences) - len(fresh)
                text = " ".join(fresh).strip()
                kept += [replace(segment, text=text)] if text else []
            else:
                kept.append(segment)
        return replace(document, segments=tuple(kept))

    def _is_repeated(self, sentence: str, seen: set[tuple[str, ...]]) -> bool:
        words = tuple(_word_pattern().findall(sentence.lower()))
        if len(words) < self.min_words:
            return False
        if words in seen:
            return True
        seen.add(words)
        return False


def _document_text(document: Document) -> str:
    return "\n\n".join(s.text for s in document.segments if isinstance(s, Text) and not s.is_control)


@cache
def _signs() -> str:
    """Vowel signs of Hindi or Thai are no letters for `re`: without them words would lose their ends, or break."""
    return re.escape("".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M"))


@cache
def _mark_or_word() -> re.Pattern[str]:
    return re.compile(rf"[\w'’{_signs()}]+|[{_MARKS}]")


@cache
def _word_pattern() -> re.Pattern[str]:
    letter = rf"(?:(?![{_IDEOGRAPHS}])[^\W\d_])"
    return re.compile(rf"[{_IDEOGRAPHS}]|{letter}(?:[^\s{_IDEOGRAPHS}]*{letter})?[{_signs()}]*")
