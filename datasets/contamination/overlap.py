"""Where texts share words or letters: hashes of n-grams and substrings for whole documents at once, in numpy.

A word is a run of letters, digits and accents; case, punctuation and spaces do not count (GPT-2 and GPT-3 compare
"lower-cased alphanumeric words"). Where a script writes no spaces between words (Chinese, Japanese, Thai, ...) each
character is one. Hashes are the same in every process, machine and version of Python.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

_NUM_CODES = 0x32400  # no letters are assigned above
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, _NUM_CODES),
)
_SEPARATOR, _IN_WORD, _WORD = 0, 1, 2
_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses nothing modulo 2^64
_MASK = 2**64 - 1

# A substring of 50 letters is looked up by its first 32 first: a few lookups for each place, whatever the lengths.
_ANCHORS = (32, 16, 8)


@dataclass(frozen=True)
class Words:
    """The words of one text, in order. All arrays are (W,)."""

    hashes: np.ndarray
    """uint64."""
    starts: np.ndarray
    """Position of the first character in the text."""
    ends: np.ndarray
    """Position after the last character."""

    def __len__(self) -> int:
        return len(self.hashes)


def composed(text: str) -> str:
    """The text in Unicode's NFC, in which an accented letter is one character. Positions refer to this form."""
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def find_words(text: str) -> Words:
    """The words of a text that is `composed`."""
    codes = _codes(text)
    kinds, folded = _characters()
    kind = kinds[codes]  # (C,)
    inside = kind != _SEPARATOR
    begins = inside.copy()
    begins[1:] &= ~((kind[1:] == _IN_WORD) & (kind[:-1] == _IN_WORD))
    places = np.flatnonzero(inside)  # (L,) of letters
    starts = np.flatnonzero(begins)  # (W,)
    if not len(starts):
        return Words(np.zeros(0, np.uint64), starts, starts)
    first = np.flatnonzero(begins[places])  # (W,) first letter of each word, among the letters
    last = np.append(first[1:], len(places)) - 1
    lengths = last - first + 1
    offsets = np.arange(len(places)) - np.repeat(first, lengths)
    letters = mix(folded[codes[places]].astype(np.uint64) + np.uint64(1))
    hashes = np.add.reduceat(letters * _powers(int(lengths.max()))[offsets], first)
    return Words(mix(hashes), starts, places[last] + 1)


def letters_of(text: str) -> np.ndarray:
    """The letters and digits alone, lower-cased, as code points (L,): uint32. Spaces and symbols are left out."""
    kinds, folded = _characters()
    codes = _codes(text)
    letters: np.ndarray = folded[codes[kinds[codes] != _SEPARATOR]]
    return letters


def to_string(letters: np.ndarray) -> str:
    """Code points as a string."""
    return letters.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def window_hashes(values: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of `length` values: (N,) uint64 -> (N - length + 1,) uint64.

    Equal runs have equal hashes; unequal ones by chance in 1 of 2^64. Takes log2(length) passes, not `length`.
    """
    count = len(values) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    result = np.zeros(count, np.uint64)
    done, size, block = 0, 1, values  # block: hashes of runs of `size`
    while size <= length:
        if length & size:
            result = result * np.uint64(pow(_BASE, size, 2**64)) + block[done : done + count]
            done += size
        if 2 * size <= length:
            block = block[:-size] * np.uint64(pow(_BASE, size, 2**64)) + block[size:]
        size *= 2
    return mix(result)


def mix(values: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the value: the finaliser of SplitMix64, uint64 -> uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """One hash for each run of `n` words of a text, in order: uint64."""
    return window_hashes(find_words(composed(text)).hashes, n)


class KeyTable:
    """A sorted set of 64-bit keys that looks up whole arrays. Most strangers are turned away by their first bits."""

    def __init__(self, keys: np.ndarray):
        self.keys = np.unique(keys.astype(np.uint64))
        bits = min(27, max(10, len(self.keys).bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(2**bits, bool)
        self._maybe[self.keys >> self._shift] = True

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places in `hashes`, numbers of the keys that stand there), both (H,) for H hits."""
        places = np.flatnonzero(self._maybe[hashes >> self._shift])
        if not len(places):
            return places, places
        numbers = np.minimum(np.searchsorted(self.keys, hashes[places]), len(self.keys) - 1)
        hit = self.keys[numbers] == hashes[places]
        return places[hit], numbers[hit]


class SubstringTable:
    """Which of many strings of letters stand in a text, in time that grows with the text alone. No false hits."""

    def __init__(self, strings: Sequence[str]):
        self.strings = tuple(strings)
        by_anchor: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, string in enumerate(self.strings):
            if string:
                length = next((anchor for anchor in _ANCHORS if anchor <= len(string)), len(string))
                by_anchor[length][string[:length]].append(number)
        self._tables = {}
        for length, numbers in by_anchor.items():
            values = _letter_values(_codes("".join(numbers)))  # all anchors in one array: one hash for each is wanted
            keys = window_hashes(values, length)[::length]
            by_key = dict(zip(keys.tolist(), numbers.values(), strict=True))
            table = KeyTable(keys)
            self._tables[length] = (table, [by_key[key] for key in table.keys.tolist()])

    def find(self, letters: np.ndarray) -> list[int]:
        """The numbers of the strings that stand anywhere in `letters` (see `letters_of`), sorted."""
        if not self._tables:
            return []
        values, text = _letter_values(letters), ""
        found: set[int] = set()
        for length, (table, strings) in self._tables.items():
            places, anchors = table.find(window_hashes(values, length))
            for place, anchor in zip(places.tolist(), anchors.tolist(), strict=True):
                text = text or to_string(letters)
                found.update(n for n in strings[anchor] if n not in found and text.startswith(self.strings[n], place))
        return sorted(found)


def _letter_values(letters: np.ndarray) -> np.ndarray:
    return mix(letters.astype(np.uint64) + np.uint64(1))


def _codes(text: str) -> np.ndarray:
    """Code points (C,); those beyond the table are space."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return codes if text.isascii() else np.where(codes < _NUM_CODES, codes, 32)


def _powers(count: int) -> np.ndarray:
    powers = np.full(count, _BASE, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


@cache
def _characters() -> tuple[np.ndarray, np.ndarray]:
    """Of each code point, its kind (uint8) and its lower-case form where that is one character (uint32)."""
    kinds = np.full(_NUM_CODES, _SEPARATOR, np.uint8)
    folded = np.arange(_NUM_CODES, dtype=np.uint32)
    for code in range(_NUM_CODES):
        character = chr(code)
        if unicodedata.category(character)[0] not in "LNM":
            continue
        kinds[code] = _IN_WORD
        lower = unicodedata.normalize("NFKC", character).casefold()
        folded[code] = ord(lower) if len(lower) == 1 else ord(character.lower()[0])
    for first, last in _UNSPACED:
        kinds[first : last + 1][kinds[first : last + 1] == _IN_WORD] = _WORD
    return kinds, folded
