"""ImageNet's classes: their order, plain words and kinds; and what counts as naming one."""

import collections
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm_gpt.errors import MMGPTError
from mm_gpt.vision import imagenet
from mm_gpt.vision.imagenet import CLASSES, KIND_SYNONYMS, TABLE, is_kind, is_named, read_classes

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("make_imagenet_classes", reason="the examples are not installed")

import make_imagenet_classes  # noqa: E402

# What people call these is none of WordNet's names, nor the last word of one.
PEOPLE_SAY_OTHERWISE = {
    "angelfish", "apple", "bathtub", "beach", "beehive", "bell tower", "Belgian sheepdog", "breastplate",
    "chest of drawers", "computer monitor", "corn", "cruise ship", "duck", "elephant", "graduation cap", "hair clip",
    "hawk", "horse", "keyboard", "lake", "laptop", "Leonberger", "magnifying glass", "messenger bag", "mountain",
    "newt", "pacifier", "rooster", "sailboat", "scarf", "shipwreck", "sink", "skirt", "solar panel", "soup",
    "spiked helmet", "standing stone", "swimsuit", "thistle", "toilet", "typewriter", "vaulted ceiling", "vintage car",
}  # fmt: skip


def test_the_classes_stand_in_the_order_of_the_scores() -> None:
    assert len(CLASSES) == 1000
    assert [entry.wnid for entry in CLASSES] == sorted({entry.wnid for entry in CLASSES})
    for index, plain in {
        0: "tench",
        207: "golden retriever",
        281: "tabby cat",
        340: "zebra",
        999: "toilet paper",
    }.items():
        assert CLASSES[index].plain == plain
    assert CLASSES[281].names == ("tabby", "tabby cat")


def test_the_order_is_timm_s() -> None:
    """Whose weights the trunk has. The list is read as a file: importing timm takes seconds."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    listed = Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt"
    assert [entry.wnid for entry in CLASSES] == listed.read_text().split()


def test_plain_words_are_words_and_have_one_kind() -> None:
    """The scores of classes with one plain word are added up: two kinds (the bird and the machine) would be mixed."""
    kinds = collections.defaultdict(set)
    for entry in CLASSES:
        assert re.fullmatch(r"[A-Za-z]+(?:[-' ]+[A-Za-z]+){0,3}", entry.plain), entry.plain
        assert not re.match(r"an? |the ", entry.plain), entry.plain
        kinds[entry.plain].add(entry.kind)
    assert not {plain for plain, found in kinds.items() if len(found) > 1}


def test_plain_words_are_names_unless_people_say_otherwise() -> None:
    """A model that says the plain word of the right class has named it, and no slip of the table changes that."""
    assert {
        entry.plain for index, entry in enumerate(CLASSES) if not is_named(entry.plain, index)
    } == PEOPLE_SAY_OTHERWISE


def test_kinds() -> None:
    for plain, kind in {
        "golden retriever": "dog",
        "whippet": "dog",  # WordNet's greyhound is a racer too, and so an animal
        "tabby cat": "cat",
        "lion": "big cat",
        "grouse": "bird",  # and WordNet's game
        "hammerhead": "shark",
        "monarch butterfly": "butterfly",
        "crane": "bird",
        "construction crane": "machine",
        "umbrella": "",
    }.items():
        assert {entry.kind for entry in CLASSES if entry.plain == plain} == {kind}
    assert set(KIND_SYNONYMS) <= {entry.kind for entry in CLASSES}


def test_importing_reads_no_file() -> None:
    code = (
        "from mm_gpt.vision import imagenet as i; assert not i.read_classes.cache_info().misses; print(len(i.CLASSES))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1000\n"
    with pytest.raises(AttributeError, match="CLASES"):
        imagenet.CLASES  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "its columns are not index, wnid"),
        (lambda text: text.replace("\n5\t", "\n6\t", 1), "line 7: is not class 5"),
        (lambda text: text.replace("\ttench\t", "\t\t", 1), "line 2: is not class 0"),
        (lambda text: text[: text.index("999\t")], "999 classes instead of 1,000"),
    ],
)
def test_a_damaged_table_is_refused(damage, message: str, tmp_path: Path) -> None:
    table = tmp_path / "classes.tsv"
    table.write_text(damage(TABLE.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(table)) + ".*" + message):
        read_classes(table)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("A Golden Retriever lies on the grass.", 207),
        ("two golden-retrievers", 207),
        ("a retriever", 207),  # the last word of a name
        ("Tabby cats", 281),
        ("It is a pick-up truck.", 717),
        ("a pickup", 717),
        ("a jack o'lantern", 607),
        ("the zebra's stripes", 340),
        ("some geese", 99),
        ("timber wolves", 269),
        ("butterflies", 323),
        ("a pair of binocular lenses", 447),
        ("an ice-cream cone", 928),
        ("a clown fish", 393),
        ("an RV", 757),
    ],
)
def test_named(text: str, index: int) -> None:
    assert is_named(text, index)
    assert is_kind(text, index)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("a dog", 207),
        ("", 207),
        ("a golden statue", 207),
        ("caterpillar", 281),
        ("a white T-shirt", 661),  # Model T
        ("a category", 281),
        ("an anteater", 310),
    ],
)
def test_not_named(text: str, index: int) -> None:
    assert not is_named(text, index)


def test_kind_or_synonym() -> None:
    for text, index in [
        ("Puppies are playing.", 207),
        ("a brown dog", 207),
        ("It plays an instrument.", 889),
        ("a wild-cat", 291),
        ("some aeroplanes", 404),
        ("a reptile", 60),
        ("a BUG", 301),
    ]:
        assert is_kind(text, index)
        assert not is_named(text, index)
    assert not is_kind("a duck", 99)  # another bird is neither the goose nor its kind
    assert not is_kind("a hot meal", 207)
    assert not is_kind("", 879)  # an umbrella has no kind, and says nothing with nothing


@pytest.mark.parametrize("index", [-1, 1000])
def test_a_class_that_does_not_exist(index: int) -> None:
    """-1 would be toilet paper."""
    with pytest.raises(IndexError, match=f"0 to 999, not {index}"):
        is_named("paper", index)
    with pytest.raises(IndexError, match=f"0 to 999, not {index}"):
        is_kind("paper", index)


def test_no_name_is_longer_than_what_is_searched() -> None:
    """A name of more words than a text is cut into would never be found."""
    names = [name for entry in CLASSES for name in entry.names] + [
        word for row in KIND_SYNONYMS.values() for word in row
    ]
    assert max(len(imagenet._words(name)) for name in names) == imagenet.MAX_WORDS


# ---- examples/make_imagenet_classes.py ----

# Three synsets in WordNet's format: a thing, an animal below it, and a dog (with a second name) that is both.
NOUNS = """  1 This software and database is being provided to you, the LICENSEE.
00000001 03 n 01 thing 0 000 | something
00000002 05 n 01 animal 0 001 @ 00000001 n 0000 | a living thing
00000003 05 n 02 dog 0 house_dog 0 003 @ 00000002 n 0000 @i 00000001 n 0000 ~ 00000002 n 0000 | a "dog"
"""


def test_wordnet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    path.write_text(NOUNS, encoding="utf-8")
    nouns = make_imagenet_classes.read_nouns(path)
    assert nouns["n00000003"] == (["dog", "house dog"], ["n00000002", "n00000001"])
    assert make_imagenet_classes.ancestors("n00000003", nouns) == {"n00000001", "n00000002", "n00000003"}


def test_the_narrowest_kind_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.noun"
    path.write_text(NOUNS, encoding="utf-8")
    nouns = make_imagenet_classes.read_nouns(path)
    monkeypatch.setattr(make_imagenet_classes, "KINDS", {"object": "n00000001 thing", "animal": "n00000002 animal"})
    monkeypatch.setattr(make_imagenet_classes, "KINDS_BY_HAND", {"pet": "lapdog, cat"})
    assert make_imagenet_classes.kind_of("n00000003", "dog", nouns) == "animal"
    assert make_imagenet_classes.kind_of("n00000003", "lapdog", nouns) == "pet"
    monkeypatch.setattr(make_imagenet_classes, "KINDS", {})
    assert make_imagenet_classes.kind_of("n00000003", "dog", nouns) == ""


@pytest.mark.parametrize("line", ["word", "00000003 05 n 01 dog 0 002 @ 00000002 n 0000 | cut off", "1 2 3 zz 5"])
def test_what_is_not_wordnet_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    path.write_text(NOUNS + line + "\n", encoding="utf-8")
    with pytest.raises(MMGPTError, match=r"data.noun, line 5: not a synset"):
        make_imagenet_classes.read_nouns(path)


def test_another_version_of_wordnet_is_refused() -> None:
    """Its ids mean other synsets."""
    with pytest.raises(MMGPTError, match=r"n02084071 is not 'dog' in this WordNet; use version 3\.0"):
        make_imagenet_classes.check_kinds({"n02084071": (["teapot"], [])})


def test_the_table_holds_the_kinds_of_the_script() -> None:
    """A kind that is changed in the script alone, or in the table alone, would be lost with the next table."""
    by_hand = {plain: kind for kind, row in make_imagenet_classes.KINDS_BY_HAND.items() for plain in row.split(", ")}
    assert by_hand == {entry.plain: entry.kind for entry in CLASSES if entry.plain in by_hand}
    assert {entry.kind for entry in CLASSES} <= {"", *make_imagenet_classes.KINDS, *by_hand.values()}
