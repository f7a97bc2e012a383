"""MinHash: a short signature of a text whose agreement with another's is their Jaccard similarity, and its bands.

Broder, On the resemblance and containment of documents (1997): the share of equal numbers in two signatures of h
numbers is the similarity of the two sets of shingles, give or take 1/sqrt(h). Banding (Leskovec, Rajaraman, Ullman,
Mining of Massive Datasets, chapter 3) finds the pairs to compare: those that agree in all rows of some band.

A text's words are hashed all at once, as arrays of code points; so are its shingles.
"""

import unicodedata
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_gpt.errors import ConfigError

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

BLOCK = 512
"""Shingles per step: the products of a block stay in the processor's cache."""
PART = 1 << 20
"""Characters of a text that are looked at together; arrays over them take some 40 bytes each."""
WEIGHTS = 1024
"""Places of a word that have a number of their own. A longer word uses them again."""
NO_SPACES = (  # first and last code point of scripts that are written without spaces between words
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1B7F),  # Tai Tham, Balinese
    (0x2E80, 0x30FF),  # radicals, kana
    (0x3100, 0x312F),  # bopomofo
    (0x31A0, 0x4DBF),  # more kana, ideographs
    (0x4E00, 0xA4CF),  # ideographs, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),  # ideographs
    (0x1B000, 0x1B16F),  # kana
    (0x20000, 0x3FFFF),  # ideographs
)
SEPARATOR, LETTER, WORD = 0, 1, 2
"""What a character is: between words, a part of a word, a word alone. A word starts at what is greater than a LETTER
before it, or than 0."""


def normalize(text: str) -> str:
    """The text without differences of case and of form (NFKC): what words are taken from."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text).casefold()


def word_hashes(text: str) -> U64:
    """64-bit hashes of the words of `text`, (words,), in order. Case, punctuation and spaces make no difference.

    A word is a run of letters, marks and digits. A symbol (`+`, an emoji) is a word, and so is each character of a
    script that is written without spaces.
    """
    if len(text) <= PART:
        return _words_of_part(text)
    parts, start = [], 0
    while start < len(text):
        end = start + PART
        if end < len(text):
            space = text.rfind(" ", start + 1, end)
            end = space if space > 0 else end
        parts.append(_words_of_part(text[start:end]))
        start = end
    return np.concatenate(parts)


def _words_of_part(text: str) -> U64:
    kinds, numbers, weights = _tables()
    text = normalize(text)
    if text.isascii():
        points: NDArray[Any] = np.frombuffer(text.encode(), dtype=np.uint8)  # (characters,)
    else:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        points = np.minimum(points, len(kinds) - 1)
    kind = kinds[points]
    follows = np.zeros_like(kind)  # a letter
    follows[1:] = kind[:-1] & LETTER
    starts = np.flatnonzero(kind > follows)  # (words,)
    if len(starts) == 0:
        return np.empty(0, dtype=np.uint64)
    lengths = np.empty_like(starts)
    lengths[:-1] = starts[1:] - starts[:-1]
    lengths[-1] = len(points) - starts[-1]
    place = np.arange(starts[0], len(points)) - np.repeat(starts, lengths)  # in its word
    place &= WEIGHTS - 1
    # Separators at the end of a word count as 0.
    return np.add.reduceat(numbers[points[starts[0] :]] * weights[place], starts - starts[0])


def shingle_hashes(words: U64, num_words: int) -> U32:
    """32-bit hashes of the runs of `num_words` words, (shingles,), repeats included. A shorter text is one shingle."""
    if len(words) == 0:
        return np.empty(0, dtype=np.uint32)
    size = min(num_words, len(words))
    total = words[size - 1 :].copy()
    for place in range(1, size):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += words[size - 1 - place : len(words) - place]
    return (mix(total) >> np.uint64(32)).astype(np.uint32)


def mix(values: U64) -> U64:
    """Each value scrambled, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@cache
def _tables() -> tuple[NDArray[np.uint8], U64, U64]:
    """By code point: what it is and its random number (0 for a separator); by place in a word: an odd multiplier."""
    points = range(0x40000)  # higher ones are private or not assigned
    major = np.frombuffer("".join(unicodedata.category(chr(point))[0] for point in points).encode(), dtype="S1")
    kinds = np.full(len(points), LETTER, dtype=np.uint8)
    kinds[np.isin(major, [b"Z", b"P", b"C"])] = SEPARATOR
    kinds[major == b"S"] = WORD
    for first, last in NO_SPACES:
        part = kinds[first : last + 1]
        part[part == LETTER] = WORD
    numbers = mix(np.arange(1, len(points) + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))
    numbers[kinds == SEPARATOR] = 0
    weights = mix(np.arange(1, WEIGHTS + 1, dtype=np.uint64) * np.uint64(0xA0761D6478BD642F)) | np.uint64(1)
    return kinds, numbers, weights


@cache
def best_bands(threshold: float, num_hashes: int, false_negative_weight: float = 0.5) -> tuple[int, int]:
    """(bands, rows) with at most `num_hashes` in all that tell pairs above `threshold` from the others best.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands. Counted are the false positives, that
    probability's area below the threshold, and the false negatives, what is missing to 1 above it.
    """
    steps = 2000
    similarity = (np.arange(steps) + 0.5) / steps
    above = similarity >= threshold
    best, found = np.inf, (1, 1)
    for rows in range(1, num_hashes + 1):
        for bands in range(1, num_hashes // rows + 1):
            missed = (1.0 - similarity**rows) ** bands
            wrong = (1.0 - missed[~above]).sum() * (1.0 - false_negative_weight)
            error = (wrong + missed[above].sum() * false_negative_weight) / steps
            if error < best:
                best, found = error, (bands, rows)
    return found


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """How texts are compared. Signatures of different settings cannot be."""

    num_hashes: int = 128
    shingle_words: int = 5
    """Words per shingle; for scripts without spaces, characters."""
    threshold: float = 0.8
    """Similarity from which two texts count as the same."""
    false_negative_weight: float = 0.9
    """How much worse a pair is that shares no band than one that shares a band for nothing. The latter costs only a
    comparison, since pairs that share a band are compared; so more than one half."""
    bands: int | None = None
    """With `rows`: the bands, instead of the best ones for the threshold."""
    rows: int | None = None
    min_words: int = 20
    """Texts of fewer words are not compared: two captions of two photos may well be the same."""
    seed: int = 1
    shape: tuple[int, int] = field(init=False, repr=False)
    """(bands, rows) in use."""

    def __post_init__(self) -> None:
        for name in ("num_hashes", "shingle_words", "min_words"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.threshold <= 1.0:
            raise ConfigError(f"threshold is {self.threshold}; it lies between 0 and 1")
        if not 0.0 < self.false_negative_weight < 1.0:
            raise ConfigError(f"false_negative_weight is {self.false_negative_weight}; it lies between 0 and 1")
        if (self.bands is None) != (self.rows is None):
            raise ConfigError("bands and rows are given together, or neither")
        if self.bands is None or self.rows is None:
            shape = best_bands(self.threshold, self.num_hashes, self.false_negative_weight)
        else:
            shape = self.bands, self.rows
        if min(shape) < 1 or shape[0] * shape[1] > self.num_hashes:
            raise ConfigError(f"{shape[0]} bands of {shape[1]} rows do not fit into {self.num_hashes} hashes")
        object.__setattr__(self, "shape", shape)

    def signature(self, text: str) -> U32:
        """The signature of `text`, (num_hashes,): for each hash function its least value over the shingles."""
        return self.signature_of(shingle_hashes(word_hashes(text), self.shingle_words))

    def signature_of(self, shingles: U32) -> U32:
        """The signature of a set of 32-bit shingle hashes; the greatest number everywhere for an empty set."""
        factors, terms = _functions(self.num_hashes, self.seed)
        least = np.full(self.num_hashes, 2**32 - 1, dtype=np.uint32)
        for start in range(0, len(shingles), BLOCK):
            # An odd factor and a term modulo 2^32: each function is a permutation of the 32-bit numbers.
            values = factors * shingles[start : start + BLOCK]  # (hashes, shingles)
            values += terms
            np.minimum(least, values.min(axis=1), out=least)
        return least

    def band_hashes(self, signatures: U32) -> U64:
        """A hash per band, (documents, bands), of (documents, num_hashes): equal where all rows of the band are."""
        bands, rows = self.shape
        columns = signatures[:, : bands * rows].astype(np.uint64).reshape(len(signatures), bands, rows)
        return np.stack([hash_rows(columns[:, band]) for band in range(bands)], axis=1)


def agreement(first: U32, second: U32) -> NDArray[np.float64]:
    """The share of equal numbers of two signatures, (..., num_hashes): an estimate of the Jaccard similarity."""
    return np.count_nonzero(first == second, axis=-1) / first.shape[-1]


def hash_rows(rows: U64) -> U64:
    """One 64-bit hash per row of (n, columns)."""
    total = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        total = mix((total ^ column) + np.uint64(0x9E3779B97F4A7C15))
    return total


@cache
def _functions(num_hashes: int, seed: int) -> tuple[U32, U32]:
    """Odd factors and terms, (num_hashes, 1) each. From SplitMix64: the same in every version of NumPy."""
    numbers = mix(
        (np.arange(2 * num_hashes, dtype=np.uint64) + np.uint64(1 + (seed << 32))) * np.uint64(0x9E3779B97F4A7C15)
    )
    halves = (numbers >> np.uint64(32)).astype(np.uint32).reshape(2, num_hashes, 1)
    return halves[0] | np.uint32(1), halves[1]
