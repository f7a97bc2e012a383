"""Filters as lists of stages with their values: those of published interleaved corpora, and a mild list of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mm_gpt.datasets.building.pipeline import Filter
from mm_gpt.datasets.filters.document_filters import ImageCount, ImageLimit, Interspersed, OneImageSample
from mm_gpt.datasets.filters.image_filters import ImageFilter, URLFilter
from mm_gpt.datasets.filters.language_id import Language
from mm_gpt.datasets.filters.stop_words import ENGLISH_STOP_WORDS
from mm_gpt.datasets.filters.text_filters import DocumentFilter, ParagraphFilter, RepeatedSentences
from mm_gpt.errors import ConfigError


@dataclass(frozen=True)
class Filters:
    """Stages in order. Between the two lists the images are fetched; without URLs run one after the other."""

    before_fetch: tuple[Filter, ...]
    """Need text and URLs only."""
    after_fetch: tuple[Filter, ...]
    """Read image files, or decide by which images are left."""

    @property
    def stages(self) -> list[Filter]:
        return [*self.before_fetch, *self.after_fetch]


def obelics(
    *,
    languages: tuple[str, ...] = ("en",),
    undetermined: Literal["drop", "keep"] = "drop",
    stop_words: frozenset[str] = ENGLISH_STOP_WORDS,
    flagged_words: frozenset[str] = frozenset(),
    common_words: frozenset[str] = frozenset(),
    perplexity: Callable[[str], float] | None = None,
) -> Filters:
    """OBELICS (Laurençon et al. 2023, https://arxiv.org/abs/2306.16527), with the values of its released configuration.

    The rules on flagged words, common words and perplexity need your word lists and model, and are off without them.
    Repeated sentences are removed inside a document only; OBELICS also compares paragraphs over a domain. Raises
    ConfigError for other languages than English with English stop words: they would drop every document.
    """
    if languages != ("en",) and stop_words == ENGLISH_STOP_WORDS:
        raise ConfigError(f"obelics: give stop_words of the languages {', '.join(languages) or '(all)'}")
    flagged = 0.01 if flagged_words else None
    paragraphs = ParagraphFilter(
        min_words=4,
        max_words=1000,
        max_character_repetition=0.1,
        max_word_repetition=0.1,
        max_special_characters=0.3,
        min_stop_words=0.3,
        stop_words=stop_words,
        max_flagged_words=flagged,
        min_punctuation=0.001,
        min_tokens_for_punctuation=12,
        min_common_words=0.8 if common_words else None,
        flagged_words=flagged_words,
        common_words=common_words,
    )
    documents = DocumentFilter(
        min_words=10,
        max_words=2000,
        max_character_repetition=0.1,
        max_word_repetition=0.2,
        max_special_characters=0.275,
        min_stop_words=0.35,
        stop_words=stop_words,
        max_flagged_words=flagged,
        min_punctuation=0.03,
        min_common_words=0.9 if common_words else None,
        max_perplexity=1500 if perplexity else None,
        perplexity=perplexity,
        flagged_words=flagged_words,
        common_words=common_words,
    )
    return Filters(
        before_fetch=(
            Language(languages=languages, undetermined=undetermined, min_score=0.8),
            URLFilter(),
            paragraphs,
            RepeatedSentences(),
            ImageCount(minimum=1, maximum=None),
            documents,
        ),
        after_fetch=(
            ImageFilter(formats=("jpg", "png", "webp"), min_side=150, max_side=20_000, max_aspect_ratio=2),
            ImageCount(minimum=1, maximum=30),
        ),
    )


def kosmos(
    *, languages: tuple[str, ...] = ("en",), undetermined: Literal["drop", "keep"] = "drop", seed: int = 0
) -> Filters:
    """KOSMOS-1 (Huang et al. 2023, https://arxiv.org/abs/2302.14045), section 3.1 and appendix.

    Published: the language, images interspersed in text, no image below 64 x 64 or of a single colour, at most five
    images (the first ones stay), half of the documents with one image. Spam and gibberish are told there by emoji,
    hashtags and URLs, without numbers; ours: at most one for ten words of a document, one for two of a paragraph.
    """
    return Filters(
        before_fetch=(
            Language(languages=languages, undetermined=undetermined),
            ParagraphFilter(max_emoji=0.5, max_hashtags=0.5, max_urls=0.5),
            DocumentFilter(min_words=1, max_emoji=0.1, max_hashtags=0.1, max_urls=0.1),
            Interspersed(),
        ),
        after_fetch=(
            ImageFilter(min_side=64, single_colour_tolerance=8),
            ImageLimit(maximum=5),
            Interspersed(),
            OneImageSample(keep=0.5, seed=seed),
        ),
    )


def basic(*, languages: tuple[str, ...] = (), undetermined: Literal["drop", "keep"] = "drop") -> Filters:
    """Mild rules in any language: for documents that somebody chose, not for a crawl."""
    return Filters(
        before_fetch=(
            Language(languages=languages, undetermined=undetermined),
            URLFilter(),
            ParagraphFilter(max_character_repetition=0.5, max_word_repetition=0.5, max_special_characters=0.6),
            RepeatedSentences(),
            DocumentFilter(min_words=5),
        ),
        after_fetch=(ImageFilter(min_side=32, max_aspect_ratio=10, single_colour_tolerance=4, unique=True),),
    )
