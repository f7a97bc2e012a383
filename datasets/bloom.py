"""A Bloom filter of a corpus' n-grams, to ask later how much of a test set they cover (GPT-2, section 4).

An index of the test sets (`evaluation_index`) is smaller and exact, but needs the corpus again for every new test set.
At 38.34 bits for each different n-gram the filter answers wrongly "seen" at most once in 10^8 times, and never wrongly
"not seen".
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.contamination.overlap import mix, ngram_hashes
from mm_gpt.errors import MMGPTError

_CHUNK = 65536  # hashes at a time: 27 positions each make 14 MB


class BloomFilter:
    """A set of 64-bit hashes that may say yes to a stranger, in a fraction `false_positives`, and forgets nothing.

    Sized for `capacity` different hashes. Filters of the same size merge: one for each shard or machine.
    """

    def __init__(self, capacity: int, false_positives: float = 1e-8):
        """Raises ValueError unless capacity > 0 and 0 < false_positives < 1."""
        if capacity < 1 or not 0 < false_positives < 1:
            raise ValueError(f"no Bloom filter for {capacity} elements with {false_positives} false positives")
        bits_per_element = -math.log(false_positives) / math.log(2) ** 2
        self.capacity, self.false_positives = capacity, false_positives
        self.num_bits = math.ceil(bits_per_element * capacity)
        self.num_hashes = max(1, round(bits_per_element * math.log(2)))
        self.words = np.zeros(-(-self.num_bits // 8), np.uint8)

    def add(self, hashes: np.ndarray) -> None:
        """Add 64-bit hashes (N,): uint64."""
        for start in range(0, len(hashes), _CHUNK):
            places = self._places(hashes[start : start + _CHUNK]).ravel()
            np.bitwise_or.at(self.words, places >> np.uint64(3), self._bit(places))

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each hash (N,) was added, bool (N,)."""
        found = np.ones(len(hashes), bool)
        for start in range(0, len(hashes), _CHUNK):
            places = self._places(hashes[start : start + _CHUNK])
            set_bits = self.words[places >> np.uint64(3)] & self._bit(places)
            found[start : start + _CHUNK] = (set_bits != 0).all(axis=1)
        return found

    def merge(self, other: "BloomFilter") -> None:
        """Add everything that `other` holds. Raises ValueError when it is of another size."""
        if (self.num_bits, self.num_hashes) != (other.num_bits, other.num_hashes):
            raise ValueError("only Bloom filters of the same size merge")
        self.words |= other.words

    @property
    def fill(self) -> float:
        """The fraction of set bits: 1/2 at capacity. Above, false positives are more often than asked for."""
        return float(np.bitwise_count(self.words).sum(dtype=np.int64)) / self.num_bits

    def save(self, path: Path) -> None:
        """`path` (.npy) and a JSON file of its size beside it."""
        np.save(path, self.words, allow_pickle=False)
        about = {"capacity": self.capacity, "false_positives": self.false_positives}
        path.with_suffix(".json").write_text(json.dumps(about) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "BloomFilter":
        """Raises MMGPTError for files that `save` did not write."""
        try:
            about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            words = np.load(path, mmap_mode="r", allow_pickle=False)
            capacity, false_positives = int(about["capacity"]), float(about["false_positives"])
            if words.dtype != np.uint8 or words.shape != cls._shape(capacity, false_positives):
                raise ValueError("its size does not fit")
            result = cls(capacity, false_positives)
            result.words = np.array(words)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise MMGPTError(f"{path}: not a Bloom filter ({error})") from None
        return result

    @staticmethod
    def _shape(capacity: int, false_positives: float) -> tuple[int]:
        return (-(-math.ceil(-math.log(false_positives) / math.log(2) ** 2 * capacity) // 8),)

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        """(N,) -> (N, k) bit numbers. Two independent hashes make all k (Kirsch and Mitzenmacher 2006)."""
        first, step = mix(hashes), mix(hashes ^ np.uint64(0xA0761D6478BD642F)) | np.uint64(1)
        places: np.ndarray = first[:, None] + step[:, None] * np.arange(self.num_hashes, dtype=np.uint64)
        return places % np.uint64(self.num_bits)

    @staticmethod
    def _bit(places: np.ndarray) -> np.ndarray:
        return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))


def covered_fraction(texts: Iterable[str], seen: BloomFilter, n: int = 8) -> float:
    """The fraction of all `n`-grams of `texts` that `seen` holds, repeated ones counted each time; 0 without any.

    Fill the filter with `seen.add(ngram_hashes(text, n))` for each text of the corpus.
    """
    found = total = 0
    for text in texts:
        hits = seen.contains(ngram_hashes(text, n))
        found, total = found + int(hits.sum()), total + len(hits)
    return found / total if total else 0.0
