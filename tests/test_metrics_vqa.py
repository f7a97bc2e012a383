"""VQA accuracy against what the official script returns (golden pairs come from running it)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_gpt.errors import MMGPTError
from mm_gpt.eval.metrics.vqa import exact_match, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("1,000", "1000"),  # the comma between digits deletes all marks
        ("1,000 a-b", "1000 ab"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("a-b", "b"),  # "-" becomes a space, then the article goes
        ("twenty-one", "twenty 1"),
        ("x - y", "x y"),
        ("red/white", "red white"),
        ("none", "0"),
        ("Ten", "10"),
        ("The Dog", "dog"),
        ("a", ""),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),  # the script's key is "Im", which never matches
        ("lets", "lets"),
        ("10:30 am", "10:30 am"),
        ("man's", "man's"),
        (" yes\n", "yes"),
        ("what?!", "what"),
        ("." * 40, "." * 8),  # re.UNICODE, 32, is taken as a count
    ],
)
def test_normalisation_is_that_of_the_official_script(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_leaves_one_annotator_out_by_position(matches: int, expected: float) -> None:
    """Leaving out every equal answer instead gives 0 for any number of matches."""
    answers = ["dog"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("dog", answers) == pytest.approx(expected)


def test_unanimous_answers_are_compared_as_they_are() -> None:
    """The official script normalises only when annotators differ; others always do and report higher scores."""
    assert vqa_accuracy("yes", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("2", ["two"] * 5 + ["Two!"] * 5) == 1.0


@given(st.text(max_size=12), st.lists(st.text(max_size=6), min_size=4, max_size=10), st.randoms())
def test_accuracy_is_a_fraction_and_ignores_the_order_of_annotators(prediction: str, answers: list[str], rng) -> None:  # type: ignore[no-untyped-def]
    score = vqa_accuracy(prediction, answers)
    assert 0 <= score <= 1
    shuffled = list(answers)
    rng.shuffle(shuffled)
    assert vqa_accuracy(prediction, shuffled) == pytest.approx(score)


def test_too_few_or_malformed_answers_are_refused() -> None:
    """One answer would silently score 0 for ever, a bare string would be read as one annotator a letter."""
    with pytest.raises(MMGPTError, match="at least 4 annotators, got 1"):
        vqa_accuracy("dog", ["dog"])
    with pytest.raises(MMGPTError, match="list of strings"):
        vqa_accuracy("dog", "dogs")
    with pytest.raises(MMGPTError, match="list of strings"):
        exact_match("dog", "dog")
    with pytest.raises(MMGPTError, match="at least one"):
        exact_match("dog", [])


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Garbage bin.", ["garbage bin"], 1.0),
        (" plant,books ", ["Plant, Books"], 1.0),
        ("dont", ["don't"], 1.0),
        ("t-shirt", ["t shirt"], 1.0),
        ("3.5", ["35"], 0.0),
        ("the dog", ["dog"], 0.0),
        ("two", ["2"], 0.0),
        ("cat", ["dog", "cat"], 1.0),
        ("?", ["!"], 0.0),
        ("", ["dog"], 0.0),
        ("", [""], 0.0),  # nothing said matches nothing
        ("**Red**", ["`red`"], 1.0),
        ("5-10", ["5 - 10"], 1.0),
        ("2023-01-05", ["2023/01/05"], 1.0),
        ("STRASSE", ["Straße"], 1.0),
        ("cafe\u0301", ["café"], 1.0),
        ("\u22125 °C", ["-5 °c"], 1.0),
        ("(-5)", ["-5"], 1.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], expected: float) -> None:
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("दिन", "दान"),  # day, gift
        ("किला", "कली"),  # fort, bud
        ("ป่า", "ป้า"),  # forest, aunt
        ("ขับ", "ขิบ"),
        ("பால்", "பல்"),  # milk, tooth
        ("দিন", "দান"),
        ("résumé", "resume"),
        ("-5", "5"),
        (".5", "5"),
        ("3.5", "3 5"),
        ("C++", "C"),
        ("C#", "C"),
        ("$5", "5"),
        ("50%", "50"),
        ("30°", "30"),
        ("+", "-"),
        ("×", "+"),
        ("?", "!"),
        ("😀", "😢"),
    ],
)
def test_exact_match_keeps_what_tells_answers_apart(first: str, second: str) -> None:
    """Signs of vowels are no letters for `re`: two Hindi words were equal, and "+" was no answer at all."""
    assert exact_match(first, [second]) == exact_match(second, [first]) == 0.0
    assert exact_match(first, [first]) == exact_match(second, [f" {second}"]) == 1.0
