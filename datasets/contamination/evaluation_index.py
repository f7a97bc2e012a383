"""An index of evaluation sets, in which a corpus is looked up: their n-grams, substrings and images.

It holds what these methods ask for, all answered by one pass over the corpus (see `contamination`):
- `overlap`: the 8-grams of each set (GPT-2, section 4)
- `n-gram`: the N-grams of each set, N between 8 and 13 by the length of its texts; shorter texts whole (GPT-3, app. C)
- `13-gram`: those that are cut out of training documents, shorter texts whole (GPT-3, app. C; see `decontaminate`)
- `substring`: three random runs of 50 letters of each text, shorter texts whole (GPT-4 report, app. C)
- `same file` and `image`: the bytes of each image, and its look (a perceptual hash within a few bits).
"""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.datasets.contamination.overlap import (
    KeyTable,
    SubstringTable,
    composed,
    find_words,
    letters_of,
    to_string,
    window_hashes,
)
from mm_gpt.datasets.duplicates.image_hash import content_hash, perceptual_hash
from mm_gpt.errors import ConfigError, ImageError, MMGPTError
from mm_gpt.images import ImageSource, image_bytes, is_url, load_image

GRAM_METHODS = ("overlap", "n-gram", "13-gram")
OVERLAP_WORDS = 8
REMOVED_WORDS = 13
MIN_WORDS, MAX_WORDS = 8, 13
"""Bounds of N: below 8 strangers collide, above 13 copies are missed (GPT-3)."""
MIN_HASH_BITS = 24
"""A look with fewer set bits has no detail (plain areas, gradients): strangers share it. Photos have about 32."""
_VERSION = 1
_FILES = ("index.safetensors", "index.json")


@dataclass(frozen=True)
class EvaluationItem:
    """One thing that a model is tested on. `id` is its name in the results of `mm-gpt eval`."""

    id: str
    texts: tuple[str, ...] = ()
    """Each is looked for on its own: a caption; a question with its answer."""
    images: tuple[ImageSource, ...] = ()

    def fingerprint(self) -> str:
        """Of its content, 16 hexadecimal digits. Raises ImageError for an image that cannot be read."""
        digest = hashlib.sha256(json.dumps(self.texts).encode())
        for image in self.images:
            digest.update(file_hash(image).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How evaluation sets are looked for."""

    min_words: int = 5
    """Shorter texts are not looked for: "a dog" is everywhere. Counted in the report as too short."""
    substrings: int = 3
    """Random substrings of each text."""
    substring_length: int = 50
    """In letters and digits."""
    seed: int = 0
    """Of the random substrings."""
    max_image_distance: int = 4
    """Bits of 64 in which the perceptual hashes of two copies may differ."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("min_words", 1, MAX_WORDS),
            ("substrings", 1, 100),
            ("substring_length", 8, 1000),
            ("max_image_distance", 0, 16),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")


@dataclass(frozen=True)
class EvaluationSet:
    """What the index knows of one set."""

    name: str
    first: int
    """Number of its first item, over all sets."""
    fingerprints: Mapping[str, str]
    """Item id -> fingerprint, in order."""
    ngram_words: int
    """N of the n-gram method."""
    too_short: int
    """Items without a text of `min_words`."""
    broken_images: int

    def __len__(self) -> int:
        return len(self.fingerprints)


@dataclass(frozen=True)
class EvaluationIndex:
    """Evaluation sets as tables of keys, and who owns each key. Build it, or load it. It pickles."""

    config: IndexConfig
    sets: tuple[EvaluationSet, ...]
    gram_keys: Mapping[int, np.ndarray]
    """Words of a gram -> the different hashes, sorted, uint64."""
    grams: Mapping[str, np.ndarray]
    """Method -> (P, 3) int64: item, words of the gram, number of the key. One row for each gram of each text."""
    strings: tuple[str, ...]
    string_items: np.ndarray
    """(P, 2) int64: item, number of the string."""
    image_hashes: np.ndarray
    """(M,) uint64, the look of each image."""
    image_files: tuple[str, ...]
    """M SHA-256 of the files."""
    image_items: np.ndarray
    """(M,) int64."""

    @classmethod
    def build(
        cls, sets: Mapping[str, Iterable[EvaluationItem]], config: IndexConfig | None = None
    ) -> "EvaluationIndex":
        """Index the items of each set, by its name. Raises MMGPTError for a set without items or with an id twice."""
        return _Builder(config or IndexConfig()).build(sets)

    @property
    def num_items(self) -> int:
        return sum(len(s) for s in self.sets)

    @cached_property
    def ids(self) -> list[str]:
        """The id of each item, over all sets."""
        return [id for s in self.sets for id in s.fingerprints]

    @cached_property
    def tables(self) -> dict[int, KeyTable]:
        return {words: KeyTable(keys) for words, keys in sorted(self.gram_keys.items())}

    @cached_property
    def substrings(self) -> SubstringTable:
        return SubstringTable(self.strings)

    @cached_property
    def owners(self) -> dict[tuple[str, int], np.ndarray]:
        """(method, words) -> for each key the first item that has it, or -1."""
        result = {}
        for method, rows in self.grams.items():
            for words, keys in self.gram_keys.items():
                owner = np.full(len(keys), -1, np.int64)
                mine = rows[rows[:, 1] == words][::-1]
                owner[mine[:, 2]] = mine[:, 0]
                if len(mine):
                    result[method, words] = owner
        return result

    @cached_property
    def string_owners(self) -> np.ndarray:
        owner = np.full(len(self.strings), -1, np.int64)
        owner[self.string_items[::-1, 1]] = self.string_items[::-1, 0]
        return owner

    @cached_property
    def files(self) -> dict[str, list[int]]:
        """SHA-256 -> numbers of the images."""
        result: dict[str, list[int]] = {}
        for number, name in enumerate(self.image_files):
            result.setdefault(name, []).append(number)
        return result

    def near_images(self, look: int) -> np.ndarray:
        """Numbers of the images that look like this one. None do if it, or they, have no detail."""
        if look.bit_count() < MIN_HASH_BITS:
            return np.zeros(0, np.int64)
        distance = np.bitwise_count(self.image_hashes ^ np.uint64(look))
        return np.flatnonzero((distance <= self.config.max_image_distance) & self._detailed)

    @cached_property
    def _detailed(self) -> np.ndarray:
        return np.bitwise_count(self.image_hashes) >= MIN_HASH_BITS

    def set_of(self, item: int) -> EvaluationSet:
        return self.sets[int(np.searchsorted([s.first for s in self.sets], item, side="right")) - 1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables, which are quickly made again."""
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    def save(self, folder: Path) -> None:
        """`index.safetensors` and `index.json` in `folder`."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"keys.{words}": keys for words, keys in self.gram_keys.items()}
        arrays |= {f"grams.{method}": rows for method, rows in self.grams.items()}
        arrays |= {name: getattr(self, name) for name in ("string_items", "image_hashes", "image_items")}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / _FILES[0])
        about = {
            "version": _VERSION,
            "config": asdict(self.config),
            "sets": [asdict(s) for s in self.sets],
            "strings": self.strings,
            "image_files": self.image_files,
        }
        (folder / _FILES[1]).write_text(json.dumps(about) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "EvaluationIndex":
        """Raises MMGPTError for a folder that `save` did not write."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            about = json.loads((folder / _FILES[1]).read_text(encoding="utf-8"))
            if about["version"] != _VERSION:
                raise MMGPTError(f"{folder}: index of version {about['version']}, and this program reads {_VERSION}")
            arrays = load_file(folder / _FILES[0])
            result = cls(
                IndexConfig(**about["config"]),
                tuple(EvaluationSet(**s) for s in about["sets"]),
                {int(name[5:]): keys for name, keys in arrays.items() if name.startswith("keys.")},
                {method: arrays[f"grams.{method}"] for method in GRAM_METHODS},
                tuple(about["strings"]),
                arrays["string_items"],
                arrays["image_hashes"],
                tuple(about["image_files"]),
                arrays["image_items"],
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, MMGPTError):
                raise
            raise MMGPTError(f"{folder}: not an index of evaluation sets ({error})") from None
        return result


class _Builder:
    """The rows of all sets, before the keys are numbered."""

    def __init__(self, config: IndexConfig):
        self.config = config
        self.grams: dict[str, list[_Grams]] = {method: [] for method in GRAM_METHODS}
        self.strings: dict[str, int] = {}
        self.string_items: list[tuple[int, int]] = []
        self.looks: list[int] = []
        self.files: list[str] = []
        self.image_items: list[int] = []

    def build(self, sets: Mapping[str, Iterable[EvaluationItem]]) -> EvaluationIndex:
        described: list[EvaluationSet] = []
        first = 0
        for name, items in sets.items():
            described.append(self._add_set(name, items, first))
            first += len(described[-1])
        keys: dict[int, list[np.ndarray]] = {}
        for rows in self.grams.values():
            for _, words, hashes in rows:
                keys.setdefault(words, []).append(np.unique(hashes))
        tables = {words: np.unique(np.concatenate(hashes)) for words, hashes in keys.items()}
        return EvaluationIndex(
            self.config,
            tuple(described),
            tables,
            {method: _numbered(rows, tables) for method, rows in self.grams.items()},
            tuple(self.strings),
            np.array(self.string_items, np.int64).reshape(-1, 2),
            np.array(self.looks, np.uint64),
            tuple(self.files),
            np.array(self.image_items, np.int64),
        )

    def _add_set(self, name: str, items: Iterable[EvaluationItem], first: int) -> EvaluationSet:
        fingerprints: dict[str, str] = {}
        texts: list[tuple[int, str]] = []
        counts: Counter[str] = Counter()
        for number, item in enumerate(items, start=first):
            if item.id in fingerprints:
                raise MMGPTError(f"evaluation set {name}: two items are named {item.id!r}")
            try:
                fingerprints[item.id] = item.fingerprint()
            except ImageError:
                fingerprints[item.id] = ""
            texts += [(number, composed(text)) for text in item.texts]
            counts["broken image"] += sum(not self._add_image(number, image) for image in item.images)
        if not fingerprints:
            raise MMGPTError(f"evaluation set {name}: no items")
        num_words, hashes = _words_of([text for _, text in texts])
        is_long = num_words >= self.config.min_words
        owners = np.array([number for number, _ in texts], np.int64)
        ngram_words = ngram_length(num_words[is_long].tolist())
        for method, n, whole_from in (
            ("overlap", OVERLAP_WORDS, OVERLAP_WORDS),
            ("n-gram", ngram_words, self.config.min_words),
            ("13-gram", REMOVED_WORDS, max(MIN_WORDS, self.config.min_words)),
        ):
            lengths = np.where(num_words >= whole_from, np.minimum(num_words, n), 0)
            self.grams[method] += _grams(owners, num_words, lengths, hashes)
        for number, text in itertools.compress(texts, is_long):
            self._add_strings(number, f"{name}/{number - first}", text)
        too_short = len(fingerprints) - len(set(owners[is_long].tolist()))
        return EvaluationSet(name, first, fingerprints, ngram_words, too_short, counts["broken image"])

    def _add_strings(self, item: int, name: str, text: str) -> None:
        letters = to_string(letters_of(text))
        chance = random.Random(f"{self.config.seed}/{name}/{letters}")
        for start in _starts(len(letters), self.config, chance):
            string = letters[start : start + self.config.substring_length]
            number = self.strings.setdefault(string, len(self.strings))
            self.string_items.append((item, number))

    def _add_image(self, item: int, source: ImageSource) -> bool:
        try:
            look, file = perceptual_hash(load_image(source)), file_hash(source)
        except ImageError:
            return False
        self.looks.append(look)
        self.files.append(file)
        self.image_items.append(item)
        return True


def ngram_length(num_words: Sequence[int]) -> int:
    """N of a set by the lengths of its texts in words: their 5th percentile, from 8 to 13 (GPT-3, appendix C)."""
    if not num_words:
        return MIN_WORDS
    return min(MAX_WORDS, max(MIN_WORDS, int(np.percentile(num_words, 5))))


def file_hash(source: ImageSource) -> str:
    """SHA-256 of the image's file; of its pixels where there is no file. Raises ImageError."""
    if isinstance(source, str | bytes | bytearray) or hasattr(source, "__fspath__"):
        return content_hash(image_bytes(source))
    image = load_image(source)
    return content_hash(f"{image.size}".encode() + image.tobytes())


def is_fetched(source: ImageSource) -> bool:
    """Whether the image is here, rather than at an address that would have to be fetched first."""
    return not (is_url(source) and str(source)[:5].lower() != "data:")


def _starts(length: int, config: IndexConfig, chance: random.Random) -> Iterator[int]:
    """Where the random substrings of a text begin; only at 0 when it is not longer than one of them."""
    places = length - config.substring_length + 1
    if places <= 1:
        yield 0
    else:
        yield from sorted(chance.sample(range(places), min(config.substrings, places)))


_Grams = tuple[np.ndarray, int, np.ndarray]
"""Items (G,), words of a gram, hashes (G,)."""


def _words_of(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(number of words of each text, hashes of all words in order)."""
    numbers: list[np.ndarray] = []
    hashes: list[np.ndarray] = [np.zeros(0, np.uint64)]
    for start in range(0, len(texts), 1000):  # as one text: numpy pays for each call, not for each word
        part = texts[start : start + 1000]
        words = find_words("\n".join(part))
        ends = np.cumsum([len(text) + 1 for text in part])
        numbers.append(np.diff(np.searchsorted(words.starts, ends), prepend=0))
        hashes.append(words.hashes)
    return np.concatenate([np.zeros(0, np.int64), *numbers]), np.concatenate(hashes)


def _grams(owners: np.ndarray, num_words: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> Iterator[_Grams]:
    """All grams of each text, of the number of words that `lengths` says; 0 for none. One entry for each length."""
    text_of = np.repeat(np.arange(len(num_words)), num_words)  # (W,)
    for words in np.unique(lengths[lengths > 0]).tolist():
        windows = window_hashes(hashes, words)
        text = text_of[: len(windows)]
        inside = (text == text_of[words - 1 :]) & (lengths[text] == words)
        yield owners[text[inside]], words, windows[inside]


def _numbered(rows: list[_Grams], keys: Mapping[int, np.ndarray]) -> np.ndarray:
    """(P, 3) item, words of the gram, number of its key; by item, the grams of one in their order."""
    parts = [np.zeros((0, 3), np.int64)]
    for items, words, hashes in rows:
        parts.append(np.stack([items, np.full(len(items), words), np.searchsorted(keys[words], hashes)], axis=1))
    every = np.concatenate(parts)
    return every[np.argsort(every[:, 0], kind="stable")]
