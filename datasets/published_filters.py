"""The filters of published interleaved corpora, as lists of stages with their values."""

from collections.abc import Callable
from dataclasses import dataclass

from mm_gpt.datasets.image_filters import ImageFilter, URLFilter
from mm_gpt.datasets.language_id import Language
from mm_gpt.datasets.pipeline import Stage
from mm_gpt.datasets.text_filters import (
    DocumentFilter,
    ImageCount,
    ImageLimit,
    Interspersed,
    OneImageSample,
    ParagraphFilter,
    RepeatedSentences,
)


@dataclass(frozen=True)
class Filters:
    """Stages in order. Between the two lists the images are fetched; without URLs run one after the other."""

    before_fetch: tuple[Stage, ...]
    """Need text and URLs only."""
    after_fetch: tuple[Stage, ...]
    """Read image files, or decide by which images are left."""

    @property
    def stages(self) -> list[Stage]:
        return [*self.before_fetch, *self.after_fetch]


def obelics(
    *,
    languages: tuple[str, ...] = ("en",),
    flagged_words: frozenset[str] = frozenset(),
    common_words: frozenset[str] = frozenset(),
    perplexity: Callable[[str], float] | None = None,
) -> Filters:
    """OBELICS (Laurençon et al. 2023, https://arxiv.org/abs/2306.16527), with the values of its released configuration.

    The rules on flagged words, common words and perplexity need your word lists and model, and are off without them.
    Stop words are English: for other languages take the stages and set `stop_words`. Repeated sentences are removed
    inside a document only; OBELICS also compares paragraphs over a domain.
    """
    lists = {"flagged_words": flagged_words, "common_words": common_words}
    flagged = 0.01 if flagged_words else None
    paragraphs = ParagraphFilter(
        min_words=4,
        max_words=1000,
        max_character_repetition=0.1,
        max_word_repetition=0.1,
        max_special_characters=0.3,
        min_stop_words=0.3,
        max_flagged_words=flagged,
        min_punctuation=0.001,
        min_tokens_for_punctuation=12,
        min_common_words=0.8 if common_words else None,
        **lists,
    )
    documents = DocumentFilter(
        min_words=10,
        max_words=2000,
        max_character_repetition=0.1,
        max_word_repetition=0.2,
        max_special_characters=0.275,
        min_stop_words=0.35,
        max_flagged_words=flagged,
        min_punctuation=0.03,
        min_common_words=0.9 if common_words else None,
        max_perplexity=1500 if perplexity else None,
        perplexity=perplexity,
        **lists,
    )
    return Filters(
        before_fetch=(
            URLFilter(),
            paragraphs,
            RepeatedSentences(),
            ImageCount(minimum=1, maximum=None),
            documents,
            Language(languages=languages, min_score=0.8),
        ),
        after_fetch=(
            ImageFilter(formats=("jpg", "png", "webp"), min_side=150, max_side=20_000, max_aspect_ratio=2),
            ImageCount(minimum=1, maximum=30),
        ),
    )


def kosmos(*, languages: tuple[str, ...] = ("en",), seed: int = 0) -> Filters:
    """KOSMOS-1 (Huang et al. 2023, https://arxiv.org/abs/2302.14045), section 3.1 and appendix.

    Published: the language, images interspersed in text, no image below 64 x 64 or of a single colour, at most five
    images (the first ones stay), half of the documents with one image. Spam and gibberish are told there by emoji,
    hashtags and URLs, without numbers: at most one for ten words of a document, and in paragraphs one for two, are ours.
    """
    return Filters(
        before_fetch=(
            ParagraphFilter(max_emoji=0.5, max_hashtags=0.5, max_urls=0.5),
            DocumentFilter(min_words=1, max_emoji=0.1, max_hashtags=0.1, max_urls=0.1),
            Language(languages=languages),
            Interspersed(),
        ),
        after_fetch=(
            ImageFilter(min_side=64, single_colour_tolerance=8),
            ImageLimit(maximum=5),
            Interspersed(),
            OneImageSample(keep=0.5, seed=seed),
        ),
    )
