"""The 1,000 classes of ImageNet-1k: WordNet's names of each, the words that people use for it, and its broader kind.

The classes stand in the usual order (sorted by WordNet id), so that class i is row i of a classifier's scores. Names are
WordNet's (Fellbaum 1998; ImageNet: Russakovsky et al. 2015, 1409.0575); examples/make_imagenet_classes.py makes the table.
"""

import csv
import functools
import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("imagenet_classes.tsv")
COLUMNS = ["index", "wnid", "names", "plain", "kind"]

# What people also call a thing of this kind. The kind's own words, and for a kind of two words its last one, need no entry.
KIND_SYNONYMS = {
    "dog": ("puppy", "pup", "hound"),
    "cat": ("kitten", "kitty"),
}


@dataclass(frozen=True, kw_only=True)
class ImageNetClass:
    """One class of ImageNet-1k."""

    wnid: str
    """WordNet 3.0's id of the synset: "n" and its offset in data.noun"""
    names: tuple[str, ...]
    """all of WordNet's names of the synset, its first one first"""
    plain: str
    """what people say: singular where they do, without an article; classes that nobody tells apart share one"""
    kind: str
    """the broader kind that people would name; empty where nothing broader is natural"""


CLASSES: tuple[ImageNetClass, ...]  # read by __getattr__ when it is first asked for: importing reads no file


@functools.cache
def read_classes() -> tuple[ImageNetClass, ...]:
    """The 1,000 classes, read once from the package's table. ValueError for a damaged table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or rows[0] != COLUMNS:
        raise ValueError(f"{TABLE.name}: its columns are not {', '.join(COLUMNS)}")
    classes = []
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(COLUMNS) or row[0] != str(len(classes)) or not row[3]:
            raise ValueError(f"{TABLE.name}, line {line}: not class {len(classes)} with {len(COLUMNS)} columns")
        classes.append(ImageNetClass(wnid=row[1], names=tuple(row[2].split("; ")), plain=row[3], kind=row[4]))
    if len(classes) != 1000:
        raise ValueError(f"{TABLE.name}: {len(classes)} classes instead of 1000")
    return tuple(classes)


def __getattr__(name: str) -> tuple[ImageNetClass, ...]:
    if name == "CLASSES":
        return read_classes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_named(text: str, index: int) -> bool:
    """Whether the text names the class strictly: one of its WordNet names, or the last word of one, as whole words.

    Case, hyphens and a plural are no difference, nor is a name written as one word or as two ("pick-up trucks").
    IndexError for an index outside 0 to 999.
    """
    return not _said(text).isdisjoint(_names(_checked(index)))


def is_kind(text: str, index: int) -> bool:
    """Whether the text names the class (`is_named`), its kind, the last word of its kind, or a synonym of it."""
    return is_named(text, index) or not _said(text).isdisjoint(_kind_words(read_classes()[_checked(index)].kind))


def _checked(index: int) -> int:
    """The index itself: a negative one would silently count from the end."""
    if not 0 <= index < 1000:
        raise IndexError(f"ImageNet has classes 0 to 999, not {index}")
    return index


@functools.cache
def _names(index: int) -> frozenset[str]:
    """The strict names of a class, in the form of `_said`."""
    names = [_words(name) for name in read_classes()[index].names]
    return frozenset("".join(part) for words in names for part in (words, words[-1:]))


@functools.cache
def _kind_words(kind: str) -> frozenset[str]:
    """The kind, its last word and its synonyms, in the form of `_said`; nothing for no kind."""
    if not kind:
        return frozenset()
    return frozenset("".join(_words(word)) for word in (kind, kind.split()[-1], *KIND_SYNONYMS.get(kind, ())))


MAX_WORDS = 6  # of WordNet's names of the classes


@functools.lru_cache(maxsize=4096)
def _said(text: str) -> frozenset[str]:
    """All that a text says in one to MAX_WORDS words: written as one word, in lower case, singular."""
    words = _words(text)
    lengths = range(1, MAX_WORDS + 1)
    return frozenset("".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1))


def _words(text: str) -> list[str]:
    """The words in lower case and singular: letters and digits; an apostrophe belongs to its word and is left out."""
    return [_singular(word) for word in re.findall(r"[^\W_]+", re.sub(r"['’.]", "", text.lower()))]


def _singular(word: str) -> str:
    """One form for a word and its regular plural; not always a word ("glas"), but the same for both."""
    irregular = {"mice": "mouse", "geese": "goose", "wolves": "wolf", "knives": "knife", "loaves": "loaf",
                 "shelves": "shelf", "scarves": "scarf", "oxen": "ox", "teeth": "tooth", "feet": "foot",
                 "children": "child", "men": "man", "women": "woman"}  # fmt: skip
    if word in irregular:
        return irregular[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
