"""XLM's sampling of languages, and a tokenizer that suits all scripts."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.loading.multilingual import (
    SCRIPT_SPLIT,
    language_weights,
    sample_languages,
    tokens_per_character,
    train_tokenizer,
)
from mm_gpt.errors import MMGPTError

COUNTS = {"en": 90.0, "sw": 9.0, "ur": 1.0}
HINDI = "दिनांक और समय बदलने के लिए सेटिंग्स खोलें। "
THAI = "การตั้งค่าวันที่และเวลา "
TEXTS = {
    "en": [f"Open the settings of the clock number {n} and press the green button." for n in range(300)],
    "hi": [HINDI * 2 + str(n) for n in range(30)],
    "th": [THAI * 2 + str(n) for n in range(30)],
}


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.7, (0.8049, 0.1606, 0.0345)), (0.5, (0.7034, 0.2224, 0.0741)), (1.0, (0.9, 0.09, 0.01)), (0.0, (1 / 3,) * 3)],
)
def test_shares_are_those_of_xlm(alpha: float, expected: tuple[float, ...]) -> None:
    """q_i ∝ p_i^α; raising counts instead of shares, or normalising twice, gives other numbers at some α."""
    assert tuple(language_weights(COUNTS, alpha).values()) == pytest.approx(expected, abs=5e-5)


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0.01, 1e12), min_size=1, max_size=8), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_smaller_alpha_never_hurts_the_rarest(counts: dict[str, float], alpha: float) -> None:
    """Shares sum to 1, keep the order of the counts, and the rarest language gets at least its own share."""
    weights = language_weights(counts, alpha)
    rarest = min(counts, key=lambda name: counts[name])
    assert sum(weights.values()) == pytest.approx(1)
    assert weights[rarest] >= counts[rarest] / sum(counts.values()) * (1 - 1e-9)
    assert weights[rarest] <= min(weights.values()) * (1 + 1e-9)


def test_a_language_without_text_is_never_drawn() -> None:
    """0^0 is 1 in Python: at α = 0 an empty language would get a share, and the sampler would wait for ever."""
    assert language_weights({"en": 5, "xx": 0}, 0.0) == {"en": 1.0, "xx": 0.0}
    drawn = sample_languages({"en": ["abc"], "xx": [], "yy": [""]}, alpha=0.0, max_characters=30)
    assert {language for language, _ in drawn} == {"en"}


@pytest.mark.parametrize(
    ("counts", "alpha", "message"),
    [
        (COUNTS, 1.5, "alpha"),
        (COUNTS, -0.1, "alpha"),
        (COUNTS, float("nan"), "alpha"),
        ({"en": -1.0}, 0.5, "'en'"),
        ({"en": float("nan")}, 0.5, "'en'"),
        ({}, 0.5, "no language"),
        ({"en": 0.0}, 0.5, "no language"),
    ],
)
def test_impossible_counts_are_named(counts: dict[str, float], alpha: float, message: str) -> None:
    with pytest.raises(MMGPTError, match=message):
        language_weights(counts, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_samples_come_in_these_shares(alpha: float) -> None:
    """In characters, at every moment: a sample that is cut short has the same mixture."""
    weights = language_weights({name: sum(map(len, texts)) for name, texts in TEXTS.items()}, alpha)
    longest = max(len(text) for texts in TEXTS.values() for text in texts)
    given: Counter[str] = Counter()
    for language, text in sample_languages(TEXTS, alpha=alpha, max_characters=60_000):
        given[language] += len(text)
        assert all(abs(given[name] - weights[name] * given.total()) <= 2 * longest for name in weights)
    assert 60_000 <= given.total() < 60_000 + longest


def test_a_sample_is_a_function_of_its_arguments() -> None:
    """The order of the mapping says nothing; every text comes once before any comes twice."""

    def draw(texts: dict[str, list[str]], seed: int) -> list[tuple[str, str]]:
        return list(sample_languages(texts, alpha=0.5, max_characters=20_000, seed=seed))

    assert draw(TEXTS, 1) == draw(dict(reversed(TEXTS.items())), 1) != draw(TEXTS, 2)
    hindi = [text for language, text in draw(TEXTS, 1) if language == "hi"]
    first = hindi[: len(TEXTS["hi"])]
    assert len(hindi) > len(first)
    assert sorted(first) == sorted(TEXTS["hi"])


def test_marks_stay_in_their_words() -> None:
    """GPT-2's rule takes vowel signs for punctuation, and cuts every word of Hindi and Thai at them."""
    tokenizer = train_tokenizer(TEXTS, 600, max_characters=40_000)
    assert len(tokenizer.encode("दिनांक")) == 1
    for text in (*itertools.chain(*TEXTS.values()), "x = 12;\r\n\r\n\ty  z  ", "e\u0301\u200d🙂", "<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    english = train_tokenizer(TEXTS, 600, max_characters=40_000, split=None)
    for language in ("hi", "th"):
        ours = tokens_per_character(tokenizer, TEXTS[language])
        assert ours < 0.8 * tokens_per_character(english, TEXTS[language])


def test_numbers_are_written_digit_by_digit() -> None:
    """As SmolLM2 does: merges of digits depend on what numbers the corpus happens to hold."""
    tokenizer = train_tokenizer({"en": ["in 2024 2024 2024 2024"] * 50}, 400, max_characters=2000, split=SCRIPT_SPLIT)
    assert len(tokenizer.encode("2024")) == 4


def test_nothing_to_measure() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, max_characters=2000)
    with pytest.raises(MMGPTError, match="no text"):
        tokens_per_character(tokenizer, ["", ""])
