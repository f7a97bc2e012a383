"""Text rules: each has one text that it alone drops, and the measures agree with their definitions."""

import pickle
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_gpt.datasets.building.pipeline import Filter
from mm_gpt.datasets.filters.document_filters import (
    ImageCount,
    ImageLimit,
    Interspersed,
    OneImageSample,
    random_fraction,
)
from mm_gpt.datasets.filters.published_filters import kosmos, obelics
from mm_gpt.datasets.filters.text_filters import (
    DocumentFilter,
    ParagraphFilter,
    RepeatedSentences,
    TextBounds,
    Words,
    character_repetition,
    punctuation,
    special_characters,
    word_repetition,
)
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ConfigError

GOOD = "The harbour lies in the north of the town, and in the evening you can see the boats come in from the sea."

LONG = """We walked along the quay until it was dark, because nobody wanted to go home before the last boat was there.
Then a light came up behind us, so she turned and asked who had been waiting for so long in such a cold wind."""


def surprise(text: str) -> float:
    """Stands in for a language model: it has never met a xylophone."""
    return 9999.0 if "xylophone" in text else 100.0


COMMON = frozenset(Words(f"{GOOD} {LONG} it that with xylophone as be her can darkwaterharbour").words)
BOUNDS = {
    "min_words": 4,
    "max_words": 40,
    "max_character_repetition": 0.1,
    "max_word_repetition": 0.1,
    "max_special_characters": 0.3,
    "min_stop_words": 0.3,
    "max_flagged_words": 0.01,
    "flagged_words": frozenset({"sea"}),
    "min_punctuation": 0.001,
    "min_tokens_for_punctuation": 12,
    "min_common_words": 0.8,
    "common_words": COMMON,
    "max_emoji": 0.1,
    "max_hashtags": 0.1,
    "max_urls": 0.1,
    "max_perplexity": 1500,
    "perplexity": surprise,
}
NO_SEA = GOOD.replace("sea", "north of it")

DROPPED = {
    "too few words": "In the harbour.",
    "too many words": LONG,
    "emoji": "In the evening 🛥️ you can see 🌅 the boats come in 😀 from the north.",
    "hashtags": "In the evening you can #see the #boats come in.",
    "URLs": "In the evening you can see it: http://a.io",
    "repeated characters": "In the darkwaterharbour of it you see her darkwaterharbour, as darkwaterharbour can be.",
    "repeated words": "In the north of town you see it; the boats in the: north, of (town) you come.",
    "special characters": "It was in the town: 1 2 3 4 5 6 7 - (8)",
    "too few stop words": "Harbour town, evening boats, north lies.",
    "flagged words": GOOD,
    "too little punctuation": NO_SEA.replace(",", "").replace(".", ""),
    "too few common words": "It was a zorg and a blib in the mish of the town, with a plok.",
    "high perplexity": "It was a xylophone that you can see in the town.",
}


@pytest.mark.parametrize("rule", DROPPED)
def test_each_rule_has_a_text_that_it_alone_drops(rule: str) -> None:
    bounds = ParagraphFilter(**BOUNDS)  # type: ignore[arg-type]
    assert list(bounds.broken_rules(DROPPED[rule])) == [rule]
    removed: Counter[str] = Counter()
    document = Document((Text(NO_SEA), Text(DROPPED[rule]), Image("a.jpg")))
    assert bounds(document, removed).segments == (Text(NO_SEA), Image("a.jpg"))
    assert removed == {f"text: {rule}": 1}


@pytest.mark.parametrize("rule", DROPPED)
def test_the_same_rules_drop_whole_documents(rule: str) -> None:
    removed: Counter[str] = Counter()
    stage = DocumentFilter(**BOUNDS)  # type: ignore[arg-type]
    assert stage(Document((Text(DROPPED[rule]),)), removed) is None
    assert removed == {rule: 1}
    assert stage(Document((Text(NO_SEA), Image("a.jpg"))), removed) is not None


def test_no_bounds_drop_nothing_and_control_text_is_not_judged() -> None:
    removed: Counter[str] = Counter()
    document = Document((Text(""), Text("!!!"), Text("<s>", is_control=True)))
    assert ParagraphFilter()(document, removed) == document
    kept = ParagraphFilter(min_words=4)(document, removed)
    assert kept.segments == (Text("<s>", is_control=True),)
    assert DocumentFilter()(document, removed) == document
    assert removed == {"text: too few words": 2}


def test_words() -> None:
    text = "“Don’t stop!” he's 3 re-run (2023) x2y\n— हिन्दी की ÉTÉ"
    assert Words(text).words == ["don’t", "stop", "he's", "re-run", "x2y", "हिन्दी", "की", "été"]
    assert Words("東京は大きい").words == list("東京は大きい")
    assert Words("12 -- 34").words == []
    assert Words("").share_in(frozenset("a")) == 0


def test_measures_by_hand() -> None:
    # "ab" 3 times, "ba" 2 times: 2 different strings, the root of 2 is 1, so 3 of 5.
    assert character_repetition("ababab", 2) == 3 / 5
    assert character_repetition("abcdef", 2) == 0  # nothing occurs twice
    assert character_repetition("a", 2) == 0
    assert word_repetition(["a", "b", "a", "b", "c"], 2) == 2 / 4
    assert word_repetition(["a"], 2) == 0
    assert special_characters("ab1 !ä") == 3 / 6
    assert special_characters("हिन्दी") == 0  # vowel signs are no signs
    assert special_characters("") == 0
    assert punctuation("Yes, no.") == (2 / 4, 4)
    assert punctuation("") == (0, 0)
    assert punctuation("दिन में खेल।") == (1 / 4, 4), "vowel signs do not break words"


@given(st.text(alphabet="ab ", max_size=40), st.integers(1, 4))
def test_character_repetition_as_published(text: str, length: int) -> None:
    """The definition in OBELICS, written out."""
    counts = sorted(Counter(text[i : i + length] for i in range(len(text) - length + 1)).values(), reverse=True)
    top = min(int(len(counts) ** 0.5), len([count for count in counts if count != 1]))
    expected = sum(counts[:top]) / sum(counts) if counts else 0
    assert character_repetition(text, length) == pytest.approx(expected)
    assert 0 <= character_repetition(text, length) <= 1


def test_emoji_hashtags_and_urls_are_told_from_look_alikes() -> None:
    bounds = TextBounds(max_emoji=0, max_hashtags=0, max_urls=0)
    assert not list(bounds.broken_rules("C# and #1, page#top, a→b, № 5, © 2020 ™, ∀x, and/or, item &#39; www"))
    assert list(bounds.broken_rules("👩‍👩‍👧")) == ["emoji"]
    assert list(bounds.broken_rules("❤️")) == ["emoji"]
    assert list(bounds.broken_rules("so #fun")) == ["hashtags"]
    assert list(bounds.broken_rules("see www.example.com")) == ["URLs"]
    # A family of three is one emoji for one word, not three.
    assert not list(TextBounds(max_emoji=1).broken_rules("us 👩‍👩‍👧"))


@pytest.mark.parametrize(
    "unit", ["a", "a ", "😀", "#a", "http://a ", ".", "\n", "हि", "東", "e\u0301", "#", "👩‍", "1", "'"]
)
def test_hostile_text_is_measured_in_linear_time(unit: str) -> None:
    text = unit * (300_000 // len(unit))
    bounds = {**BOUNDS, "max_words": None, "min_words": 0}
    start = time.process_time()
    list(TextBounds(**bounds).broken_rules(text))  # type: ignore[arg-type]
    RepeatedSentences()(Document((Text(text),)), Counter())
    assert time.process_time() - start < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_flagged_words": 0.1}, "max_flagged_words needs flagged_words"),
        ({"min_common_words": 0.1}, "min_common_words needs common_words"),
        ({"max_perplexity": 10}, "max_perplexity needs perplexity"),
        ({"min_words": 5, "max_words": 4}, "min_words 5 is above max_words 4"),
        ({"max_emoji": float("nan")}, "max_emoji: must be at least 0"),
        ({"max_special_characters": -1}, "max_special_characters"),
        ({"word_repetition_length": 0}, "at least 1"),
    ],
)
def test_impossible_bounds_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParagraphFilter(**options)  # type: ignore[arg-type]


def test_repeated_sentences_go_from_the_second_on() -> None:
    notice = "Sign up for our weekly letter today!"
    document = Document(
        (
            Text(f"The first paragraph is here. {notice}"),
            Image("a.jpg"),
            Text(f"sign up for our WEEKLY letter, today. Another sentence stands here now. {notice}"),
            Text(notice),
            Text("Yes. Yes."),
        )
    )
    removed: Counter[str] = Counter()
    out = RepeatedSentences()(document, removed)
    assert [s.text for s in out.segments if isinstance(s, Text)] == [
        f"The first paragraph is here. {notice}",
        "Another sentence stands here now.",
        "Yes. Yes.",
    ]
    assert removed == {"text: repeated sentence": 3}
    assert RepeatedSentences()(out, removed) == out


def images(number: int) -> tuple[Segment, ...]:
    return tuple(Image(f"{at}.jpg") for at in range(number))


def test_image_count_and_limit() -> None:
    removed: Counter[str] = Counter()
    assert ImageCount()(Document((Text("a"),)), removed) is None
    assert ImageCount()(Document(images(31)), removed) is None
    assert ImageCount()(Document(images(30)), removed) is not None
    assert removed == {"too few images": 1, "too many images": 1}
    removed.clear()
    out = ImageLimit(maximum=5)(Document((*images(7), Text("end"))), removed)
    assert out.segments == (*images(5), Text("end"))
    assert removed == {"image: over the document's limit": 2}
    with pytest.raises(ConfigError, match="no range"):
        ImageCount(minimum=3, maximum=2)


@pytest.mark.parametrize(
    ("layout", "is_kept"),
    [
        ("TIT", True),
        ("TTIIT", True),
        ("ITIT", True),
        ("IT", False),
        ("TI", False),
        ("TTII", False),
        ("T", False),
        ("I", False),
    ],
)
def test_interspersed(layout: str, is_kept: bool) -> None:
    document = Document(tuple(Text("text") if kind == "T" else Image("a.jpg") for kind in layout))
    removed: Counter[str] = Counter()
    assert (Interspersed()(document, removed) is not None) == is_kept
    assert removed == ({} if is_kept else {"images not interspersed": 1})


def test_blank_text_does_not_make_an_image_interspersed() -> None:
    assert Interspersed()(Document((Text("text"), Image("a.jpg"), Text(" \n"))), Counter()) is None


def test_half_of_the_one_image_documents_by_id() -> None:
    documents = [Document((Text("a"), Image("a.jpg")), id=str(number)) for number in range(2000)]
    stage = OneImageSample()
    kept = {document.id for document in documents if stage(document, Counter())}
    assert 0.45 < len(kept) / 2000 < 0.55  # 4.5 standard deviations
    again = {document.id for document in reversed(documents) if pickle.loads(pickle.dumps(stage))(document, Counter())}
    assert again == kept, "depends on order or process"
    other = {document.id for document in documents if OneImageSample(seed=1)(document, Counter())}
    assert 0.4 < len(kept & other) / len(kept) < 0.6, "another seed must choose anew"
    assert all(stage(Document((*d.segments, Image("b.jpg")), id=d.id), Counter()) for d in documents[:50])
    without_id = [Document((Text(str(number)), Image("a.jpg"))) for number in range(200)]
    assert 0 < sum(stage(document, Counter()) is None for document in without_id) < 200


def test_random_choices_are_independent_of_each_other() -> None:
    """Stops one hash for two rules: quality would then pick among the same half of the documents."""
    documents = [Document((), id=str(number)) for number in range(2000)]
    low = [d for d in documents if random_fraction(d, "one image", 0) < 0.5]
    assert 0.4 < sum(random_fraction(d, "quality", 0) < 0.5 for d in low) / len(low) < 0.6
    assert all(0 < random_fraction(d, "x", 0) < 1 for d in documents)


def test_published_lists() -> None:
    """The values of the papers, and stages that survive the way to another process."""
    full = obelics(flagged_words=frozenset({"x"}), common_words=COMMON, perplexity=surprise)
    paragraphs = next(stage for stage in full.stages if isinstance(stage, ParagraphFilter))
    documents = next(stage for stage in full.stages if isinstance(stage, DocumentFilter))
    assert (paragraphs.min_words, paragraphs.max_words, documents.min_words, documents.max_words) == (4, 1000, 10, 2000)
    assert (paragraphs.min_stop_words, documents.min_stop_words) == (0.3, 0.35)
    assert (paragraphs.min_common_words, documents.min_common_words, documents.max_perplexity) == (0.8, 0.9, 1500)
    assert paragraphs not in obelics().stages, "rules without their lists are off"
    with pytest.raises(ConfigError, match="stop_words of the languages de"):
        obelics(languages=("de",))
    assert obelics(languages=("de",), stop_words=frozenset({"der"}))
    for filters in (full, obelics(), kosmos()):
        stages: list[Filter] = filters.stages
        assert pickle.loads(pickle.dumps(stages)) == stages
        names = [stage.name for stage in stages]
        assert all(names)


def test_published_lists_keep_a_good_page_and_drop_bad_ones() -> None:
    pytest.importorskip("py3langid")
    more = (
        "We walked along the quay until it was dark, because nobody wanted to go home before the last boat was there."
    )
    good = Document((Text(GOOD), Image("http://example.com/a.jpg"), Text(more)), id="good", metadata={"url": "u"})
    spam = replace(
        good, segments=(Text("Buy #now and #cheap and see"), *images(1), Text("It is for you 😀 😀 😀")), id="s"
    )
    german = "Der Hafen liegt im Norden der Stadt, und abends sieht man die Boote vom Meer hereinkommen."
    other = replace(good, segments=(Text(german), *images(1), Text(german + " Das ist schön, und wir bleiben lange.")))
    for filters, spam_rule in ((obelics().before_fetch, ""), (kosmos().before_fetch, "hashtags")):
        for document, rule in ((good, None), (spam, spam_rule), (other, "other language")):
            removed: Counter[str] = Counter()
            out: Document | None = document
            for stage in filters:
                out = stage(out, removed) if out else None
            assert (out is not None) == (rule is None), removed
            if rule and rule != "other language":
                assert any(rule in name for name in removed)
