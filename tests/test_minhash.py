"""MinHash: agreement is similarity, words are words in every script, bands are the best ones."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.duplicates.minhash import MinHash, agreement, best_bands, shingle_hashes, word_hashes
from mm_gpt.errors import ConfigError


@pytest.mark.parametrize("num_hashes", [16, 128, 512])
@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.9])
def test_agreement_is_the_jaccard_similarity(num_hashes: int, similarity: float) -> None:
    """Unbiased, and off by sqrt(J (1 - J) / h) <= 1 / (2 sqrt(h)): correlated functions would spread wider."""
    random = np.random.default_rng(0)
    minhash = MinHash(num_hashes=num_hashes)
    size = 500
    common = round(2 * size * similarity / (1 + similarity))
    true = common / (2 * size - common)
    errors = []
    for _ in range(100):
        numbers = random.integers(0, 2**32, 2 * size, dtype=np.uint32)
        first = numbers[:size]
        second = np.concatenate([first[:common], numbers[size : 2 * size - common]])
        errors.append(agreement(minhash.signature_of(first), minhash.signature_of(second)) - true)
    expected = (true * (1 - true) / num_hashes) ** 0.5
    assert abs(np.mean(errors)) < 4 * expected / 10 + 0.002
    assert 0.75 * expected < np.std(errors) < 1.3 * expected
    assert np.mean(np.abs(errors) < num_hashes**-0.5) > 0.85  # two standard deviations or more: 95 %


def test_agreement_of_texts() -> None:
    """From the text to the number: shingles of words, not of characters or lines."""
    words = [f"word{i}" for i in range(400)]
    other = [*words[:300], *(f"other{i}" for i in range(100))]
    sets = [{tuple(part[i : i + 5]) for i in range(len(part) - 4)} for part in (words, other)]
    true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    minhash = MinHash(num_hashes=1024)
    found = agreement(minhash.signature(" ".join(words)), minhash.signature(" ".join(other)))
    assert abs(found - true) < 1024**-0.5


def test_golden_numbers() -> None:
    """Signatures are compared over machines, versions and years: they must never change."""
    words = word_hashes("The cat sat on the mat.")
    assert words.tolist()[:2] == GOLDEN_WORDS
    assert shingle_hashes(words, 5).tolist() == GOLDEN_SHINGLES
    assert MinHash(num_hashes=4).signature("The cat sat on the mat.").tolist() == GOLDEN_SIGNATURE


GOLDEN_WORDS = [10782504054002369722, 14769564490181450524]
GOLDEN_SHINGLES = [1174960552, 480172014]
GOLDEN_SIGNATURE = [1121052650, 900419775, 1533504807, 747266288]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The cat, sat.", "the CAT sat"),
        ("  a\tb\n\nc ", "a b c"),
        ("ﬁne Ⅳ", "fine iv"),
        ("Straße", "STRASSE"),
        ("e\u0301t\u00e9", "\u00e9te\u0301"),
        ("“quoted” — text…", "quoted text"),
    ],
)
def test_what_makes_no_difference(first: str, second: str) -> None:
    assert word_hashes(first).tolist() == word_hashes(second).tolist()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("?! ...", 0),
        ("one two", 2),
        ("東京タワー", 5),
        ("東京 tower 3号", 5),
        ("สวัสดี", 6),
        ("안녕하세요 세계", 2),
        ("हिन्दी भाषा", 2),
        ("a+b", 3),
        ("🙂🙂", 2),
        ("\ud800 x", 1),
        ("x" * 5000, 1),
        ("\U0010ffff \U000e0001 y", 1),
    ],
)
def test_number_of_words(text: str, count: int) -> None:
    """A script without spaces must not make one word of a page; a mark must not cut a word; nothing may crash."""
    assert len(word_hashes(text)) == count


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(categories=["L", "M", "N", "P", "Z", "S"]), max_size=8), max_size=20))
def test_words_as_one_by_one(parts: list[str]) -> None:
    """All words at once are what each is alone: nothing leaks over the borders of words."""
    text = " . ".join(unicodedata.normalize("NFKC", part) for part in parts)
    alone = [hash_ for part in text.split() for hash_ in word_hashes(part).tolist()]
    assert word_hashes(text).tolist() == alone


def test_words_do_not_collide() -> None:
    """Sums and products over letters meet easily for anagrams and neighbours."""
    letters = "abcdefghij"
    words = [a + b + c + d for a in letters for b in letters for c in letters for d in letters]
    assert len(set(word_hashes(" ".join(words)).tolist())) == len(words)
    shingles = shingle_hashes(word_hashes(" ".join(words)), 5)
    assert len(set(shingles.tolist())) > len(words) - 5


def test_a_very_long_text_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays over a text of 100 MB would take gigabytes. Parts end between words, or anywhere where there is no end."""
    text = " ".join(f"word{i}" for i in range(1000))
    expected, unbroken = word_hashes(text).tolist(), len(word_hashes("x" * 1000))
    monkeypatch.setattr("mm_gpt.datasets.duplicates.minhash.PART", 100)
    assert word_hashes(text).tolist() == expected
    assert len(word_hashes("x" * 1000)) == 10 * unbroken


def test_order_counts_inside_a_shingle_only() -> None:
    words = word_hashes("a b c d e f")
    assert shingle_hashes(words, 3).tolist() != shingle_hashes(words[::-1], 3).tolist()
    assert sorted(shingle_hashes(words, 1)) == sorted(shingle_hashes(words[::-1], 1))
    assert len(shingle_hashes(words, 3)) == 4
    assert len(shingle_hashes(words, 9)) == 1
    assert len(shingle_hashes(words[:0], 3)) == 0


def test_long_texts_in_blocks() -> None:
    """The minimum over blocks is the minimum over all."""
    minhash = MinHash(num_hashes=8)
    shingles = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    parts = [minhash.signature_of(shingles[start : start + 100]) for start in range(0, 2000, 100)]
    assert np.min(parts, axis=0).tolist() == minhash.signature_of(shingles).tolist()
    assert set(minhash.signature_of(shingles[:0]).tolist()) == {2**32 - 1}


@pytest.mark.parametrize(("threshold", "expected"), [(0.9, (5, 25)), (0.8, (9, 13)), (0.5, (25, 5))])
def test_best_bands_golden(threshold: float, expected: tuple[int, int]) -> None:
    """The optimum for 128 hashes, as datasketch finds it by integrating."""
    assert best_bands(threshold, 128) == expected


def test_best_bands_for_recall() -> None:
    bands, rows = MinHash().shape
    assert bands * rows <= 128
    assert 1 - (1 - 0.8**rows) ** bands > 0.85


def test_bands_agree_where_all_their_rows_do() -> None:
    minhash = MinHash(num_hashes=12, bands=3, rows=4)
    signatures = np.arange(24, dtype=np.uint32).reshape(2, 12)
    signatures[1, :4] = signatures[0, :4]
    signatures[1, 8:11] = signatures[0, 8:11]
    bands = minhash.band_hashes(signatures)
    assert (bands[0] == bands[1]).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hashes": 0}, "num_hashes is 0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"bands": 4}, "given together"),
        ({"bands": 20, "rows": 10}, "20 bands of 10 rows do not fit into 128 hashes"),
        ({"false_negative_weight": 1.0}, "false_negative_weight is 1.0"),
    ],
)
def test_bad_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MinHash(**values)  # type: ignore[arg-type]
