"""The language of a document, told from its text with py3langid (140 languages, its model is in the package).

Chosen over fastText's lid.176.ftz on 3,561 paragraphs of 20 to 400 characters from the GNOME help in 25 languages:
96.5 % right against 95.6 % (91.9 against 90.3 below 50 characters), at 0.14 ms a paragraph against 0.05. Half of its
errors take Croatian for Bosnian. With a score of at least 0.8 it is right in 99.97 % and keeps 84 %.

A few words tell little. On 47,918 messages of GTK and GLib in 94 languages, from a word to a sentence, it is right in
25 % of those with a probability below 0.2, a fifth of them, and in 88 % of the others.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from mm_gpt.datasets.samples import optional_import
from mm_gpt.document import Document, Text
from mm_gpt.errors import ConfigError, MMGPTError, unknown_name

UNKNOWN = "und"
"""ISO 639's code for a language that is not determined: a text that holds no evidence."""
MIN_PROBABILITY = 0.2
"""Below it the most likely language is the wrong one more often than not. Without any evidence all have 0.007."""
MAX_CHARACTERS = 10_000
"""The beginning of a document is enough to tell."""

_NO_LANGUAGE = re.compile(r"(?:https?://|www\.)\S+|\S{1,64}@\S+|[\d_]+")
_LETTER = re.compile(r"[^\W\d_]")


def identify(text: str) -> tuple[str, float]:
    """(code, probability from 0 to 1) of a text's language; ("und", 0.0) where nothing tells it, as in "OK!".

    A code is ISO 639-1's of two letters where there is one, else ISO 639-3's of three: `yue`, `arz`, `zxx` for what is
    no language. Addresses and numbers are left out. Raises MMGPTError if py3langid is not installed.
    """
    text = " ".join(_NO_LANGUAGE.sub(" ", text[:MAX_CHARACTERS]).split())
    if not _LETTER.search(text):
        return UNKNOWN, 0.0
    language, probability = _identifier().classify(text)
    return (str(language), min(1.0, float(probability))) if probability >= MIN_PROBABILITY else (UNKNOWN, 0.0)


@dataclass(frozen=True, kw_only=True)
class Language:
    """Writes `language` and `language_score` into the metadata and, if asked, drops the other languages.

    What the page itself says is overwritten: pages copy `lang="en"` from templates.
    """

    languages: tuple[str, ...] = ()
    """Codes of those that stay, of two letters or three (see `identify`); empty: all."""
    undetermined: Literal["drop", "keep"] = "drop"
    """With `languages`: what becomes of documents that do not tell their language, images alone among them."""
    min_score: float = 0.0
    """A document of which we are less sure goes, unless it does not tell and is kept for that. OBELICS: 0.8."""
    name: str = "language"

    def __post_init__(self) -> None:
        if isinstance(self.languages, str):
            raise ConfigError(f"languages: give a tuple of codes, not {self.languages!r}")
        if not 0 <= self.min_score <= 1:
            raise ConfigError(f"min_score: must be from 0 to 1, is {self.min_score}")
        if self.undetermined not in ("drop", "keep"):
            raise ConfigError(unknown_name("value of undetermined", self.undetermined, ("drop", "keep")))

    def __call__(self, document: Document, removed: Counter[str]) -> Document | None:
        _check_languages(self.languages)
        texts = (s.text for s in document.segments if isinstance(s, Text) and not s.is_control)
        language, score = identify("\n".join(texts))
        if language == UNKNOWN:
            if self.languages and self.undetermined == "drop":
                removed["undetermined language"] += 1
                return None
        elif self.languages and language not in self.languages:
            removed["other language"] += 1
            return None
        is_kept_anyway = language == UNKNOWN and self.languages
        if score < self.min_score and not is_kept_anyway:
            removed["uncertain language"] += 1
            return None
        metadata = {**document.metadata, "language": language, "language_score": round(score, 4)}
        return replace(document, metadata=metadata)


@cache
def _identifier() -> Any:
    langid = optional_import("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@cache
def _check_languages(languages: tuple[str, ...]) -> None:
    known = {str(label) for label in _identifier().labels}
    for language in languages:
        if language not in known:
            raise MMGPTError(unknown_name("language", language, known))
