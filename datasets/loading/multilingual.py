"""Languages in proportion, and a tokenizer for all of them, as in XLM (Lample and Conneau 2019, arXiv 1901.07291).

Languages are sampled with q_i ∝ p_i^α, p_i being a language's share of the text: α = 1 leaves the shares as they are,
0 makes all equal. XLM learns its shared vocabulary with α = 0.5 and draws its batches with 0.7: a rare language is seen
more often than it is written, so that its words are not cut into bytes.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

from mm_gpt.datasets.loading.plan import language_shares
from mm_gpt.errors import MMGPTError
from mm_gpt.tokenizer import Tokenizer

SCRIPT_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where text is cut before byte pairs are merged. The vowel signs of Hindi, Tamil, Thai or Hebrew are marks (`\\p{M}`),
not letters: GPT-2's rule cuts words at each of them, and no merge can join what it has cut."""


def language_weights(counts: Mapping[str, float], alpha: float) -> dict[str, float]:
    """The share of each language in what is sampled: q_i = p_i^α / Σ p_j^α, with p_i = counts_i / Σ counts.

    Languages that count nothing get 0. Raises MMGPTError for a negative count, an α outside of 0 to 1 (both could make
    a rare language rarer), and when all counts are 0.
    """
    if not 0 <= alpha <= 1:
        raise MMGPTError(f"alpha is {alpha}; it must lie between 0 and 1")
    for language, count in counts.items():
        if not 0 <= count < float("inf"):
            raise MMGPTError(f"language {language!r} has a count of {count}")
    if not any(counts.values()):
        raise MMGPTError("no language has any text")
    return dict(zip(counts, language_shares(list(counts.values()), alpha), strict=True))


def sample_languages(
    texts: Mapping[str, Sequence[str]], *, alpha: float, max_characters: int, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """(language, text) until `max_characters` are reached, the languages in the shares of `language_weights`.

    p_i counts characters. At every moment each language has what is due to it, to within one text: next comes the one
    that lags the most. Within a language the texts come in an order drawn from `seed`; one that runs out starts again,
    in a new order. The same arguments give the same texts.
    """
    counts = {language: float(sum(map(len, texts[language]))) for language in sorted(texts)}
    weights = {language: weight for language, weight in language_weights(counts, alpha).items() if weight}
    streams = {language: _endless(texts[language], f"{seed}:{language}") for language in weights}
    given = dict.fromkeys(weights, 0)
    while sum(given.values()) < max_characters:
        language = min(weights, key=lambda name: (given[name] / weights[name], name))
        text = next(streams[language])
        given[language] += len(text)
        yield language, text


def _endless(texts: Sequence[str], seed: str) -> Iterator[str]:
    rng = random.Random(seed)  # of a string: the same in every process
    order = [index for index, text in enumerate(texts) if text]
    while True:
        rng.shuffle(order)
        yield from (texts[index] for index in order)


def train_tokenizer(
    texts: Mapping[str, Sequence[str]],
    vocab_size: int,
    *,
    alpha: float = 0.5,
    max_characters: int = 50_000_000,
    split: str | None = SCRIPT_SPLIT,
    seed: int = 0,
) -> Tokenizer:
    """A byte-level BPE for all the languages of `texts`, learned from `sample_languages`.

    `split` is the rule that cuts text into words first; None is SmolLM2's, made for English. Raises MMGPTError when
    there is no text.
    """
    sample = sample_languages(texts, alpha=alpha, max_characters=max_characters, seed=seed)
    return Tokenizer.train((text for _, text in sample), vocab_size, split=split)


def tokens_per_character(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """How many tokens a character costs, over all of `texts` together. Raises MMGPTError when they are empty."""
    characters = sum(map(len, texts))
    if not characters:
        raise MMGPTError("no text to measure a tokenizer on")
    return sum(len(tokenizer.encode(text)) for text in texts) / characters
