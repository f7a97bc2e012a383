"""The 1,000 classes of ImageNet-1k: WordNet's names of each, the words that people use for it, and its broader kind.

The classes stand in the usual order (sorted by WordNet id): class i is row i of a classifier's scores. The names are
those of WordNet 3.0 (Fellbaum 1998; its licence: WORDNET_LICENSE.txt), the classes those of Russakovsky et al. 2015
(arXiv 1409.0575). examples/make_imagenet_classes.py made the table.
"""

import csv
import functools
import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("imagenet_classes.tsv")
COLUMNS = ["index", "wnid", "names", "plain", "kind"]

# Other words for a thing of this kind; hyphens, case and plurals are no difference. Another class is no synonym: who
# calls a goose a duck has not named its kind.
KIND_SYNONYMS = {
    "airplane": ("aeroplane", "plane", "aircraft", "jet"),
    "ape": ("primate",),
    "appliance": ("household appliance",),
    "armor": ("armour",),
    "bicycle": ("bike", "cycle"),
    "big cat": ("cat", "wild cat", "feline"),
    "bird": ("fowl",),
    "boat": ("ship", "vessel"),
    "bug": ("insect",),
    "bus": ("vehicle", "coach"),
    "butterfly": ("insect",),
    "car": ("automobile", "vehicle"),
    "cat": ("kitten", "kitty", "feline"),
    "chair": ("seat",),
    "clock": ("watch", "timepiece"),
    "cloth": ("fabric", "textile"),
    "clothes": ("clothing", "garment", "outfit"),
    "coast": ("shore", "shoreline", "coastline", "seaside"),
    "computer": ("PC",),
    "cosmetics": ("cosmetic", "makeup"),
    "cow": ("cattle", "bull", "calf"),
    "crab": ("crustacean",),
    "crustacean": ("shellfish",),
    "curtain": ("blind",),
    "dessert": ("sweet", "food"),
    "dog": ("puppy", "pup", "doggy", "hound"),
    "drink": ("beverage",),
    "electronics": ("electronic device",),
    "flower": ("blossom", "plant"),
    "food": ("dish", "meal"),
    "frog": ("toad",),
    "glasses": ("eyeglasses", "spectacles"),
    "gun": ("weapon", "firearm"),
    "hat": ("cap",),
    "horse": ("pony", "foal"),
    "insect": ("bug",),
    "jewelry": ("jewellery",),
    "jug": ("pitcher",),
    "kitchen appliance": ("appliance",),
    "kitchen tool": ("utensil",),
    "lamp": ("light",),
    "light": ("lamp",),
    "lizard": ("reptile",),
    "measuring instrument": ("instrument", "gauge"),
    "monkey": ("primate",),
    "monument": ("memorial",),
    "motorcycle": ("motorbike",),
    "mountain": ("hill",),
    "mushroom": ("fungus", "fungi", "toadstool"),
    "musical instrument": ("instrument",),
    "optical instrument": ("instrument",),
    "person": ("people", "man", "woman"),
    "phone": ("telephone",),
    "pig": ("hog", "piglet", "swine"),
    "puzzle": ("game",),
    "rabbit": ("bunny",),
    "rug": ("carpet", "mat"),
    "sea creature": ("sea animal", "marine animal"),
    "shark": ("fish",),
    "sheep": ("lamb",),
    "ship": ("boat", "vessel"),
    "shoe": ("footwear",),
    "shop": ("store",),
    "sled": ("sleigh", "sledge"),
    "snake": ("serpent", "reptile"),
    "truck": ("lorry", "vehicle"),
    "turtle": ("tortoise", "reptile"),
    "van": ("vehicle",),
    "vegetable": ("veggie",),
}
# Plurals that no rule makes.
_IRREGULAR = {
    "calf": "calves",
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "tooth": "teeth",
    "woman": "women",
}


@dataclass(frozen=True, kw_only=True)
class ImageNetClass:
    """One class of ImageNet-1k."""

    wnid: str
    """WordNet 3.0's id of the synset: "n" and its offset in data.noun"""
    names: tuple[str, ...]
    """all of WordNet's names of the synset, in its order"""
    plain: str
    """what people say: singular where they do, without an article; classes that nobody tells apart share one"""
    kind: str
    """the broader kind that people would name; empty where nothing broader is natural"""


CLASSES: tuple[ImageNetClass, ...]  # read by __getattr__ when it is first asked for: importing reads no file


@functools.cache
def read_classes(path: Path = TABLE) -> tuple[ImageNetClass, ...]:
    """The 1,000 classes of a table, the package's own where none is given. Raises ValueError for a damaged one."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, "excel-tab", quoting=csv.QUOTE_NONE))
    if not rows or rows[0] != COLUMNS:
        raise ValueError(f"{path}: its columns are not {', '.join(COLUMNS)}")
    classes: list[ImageNetClass] = []
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(COLUMNS) or row[0] != str(len(classes)) or not all(row[:-1]):
            raise ValueError(f"{path}, line {line}: is not class {len(classes)} with its {len(COLUMNS)} columns")
        classes.append(ImageNetClass(wnid=row[1], names=tuple(row[2].split("; ")), plain=row[3], kind=row[4]))
    if len(classes) != 1000:
        raise ValueError(f"{path}: {len(classes):,} classes instead of 1,000")
    return tuple(classes)


def __getattr__(name: str) -> tuple[ImageNetClass, ...]:
    if name == "CLASSES":
        return read_classes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_named(text: str, index: int) -> bool:
    """Whether the text names the class strictly: one of WordNet's names, or the last word of one, as whole words.

    Case, hyphens and plurals are no difference, nor is a name written as one word or as two ("pick-up trucks").
    Raises IndexError for an index outside 0 to 999.
    """
    return not _said(text).isdisjoint(_strict_forms(_checked(index)))


def is_kind(text: str, index: int) -> bool:
    """Whether the text names the class (`is_named`), its kind, or a synonym of the kind. Raises IndexError like it."""
    return is_named(text, index) or not _said(text).isdisjoint(_kind_forms(read_classes()[index].kind))


def _checked(index: int) -> int:
    if not 0 <= index < 1000:  # a negative one would silently count from the end
        raise IndexError(f"ImageNet has classes 0 to 999, not {index}")
    return index


@functools.cache
def _strict_forms(index: int) -> frozenset[str]:
    names = [_words(name) for name in read_classes()[index].names]
    last = [words[-1:] for words in names if len(words[-1]) > 1]  # "T" of "Model T" would be found in any T-shirt
    return frozenset(form for words in names + last for form in _forms(words))


@functools.cache
def _kind_forms(kind: str) -> frozenset[str]:
    names = (kind, *KIND_SYNONYMS.get(kind, ())) if kind else ()
    return frozenset(form for name in names for form in _forms(_words(name)))


def _forms(words: list[str]) -> set[str]:
    """A name in singular and plural, written as one word."""
    before, last = "".join(words[:-1]), words[-1]
    forms = {last, last + "s", last + "es", _IRREGULAR.get(last, last)}
    if last.endswith("y"):
        forms.add(last[:-1] + "ies")
    if last.endswith(("f", "fe")):
        forms.add(re.sub("fe?$", "ves", last))
    if len(last) > 3 and last.endswith("s") and not last.endswith("ss"):
        forms.add(last[:-1])  # binoculars, sunglasses
    return {before + form for form in forms}


MAX_WORDS = 5
"""Of a name."""


@functools.lru_cache(maxsize=1024)  # a text is compared with many classes in turn
def _said(text: str) -> frozenset[str]:
    """All sequences of up to MAX_WORDS words of a text, each written as one word."""
    words = _words(text)
    spans = ((start, start + length) for length in range(1, MAX_WORDS + 1) for start in range(len(words) - length + 1))
    return frozenset("".join(words[start:end]) for start, end in spans)


def _words(text: str) -> list[str]:
    """The words in lower case, without hyphens and apostrophes: "jack-o'-lantern" has three, "dog's" is one."""
    return re.findall(r"[^\W_]+", re.sub("['’]", "", text.lower()))
