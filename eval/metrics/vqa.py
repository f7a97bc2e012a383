"""VQA accuracy as the official script of the VQA challenge computes it, and exact match for single-answer sets.

VQA: Antol et al. 2015 (arXiv:1505.00468); script `vqaEval.py` of github.com/GT-Vision-Lab/VQA. Its quirks are kept,
because published numbers have them: what is normalised when, which punctuation becomes a space, and a cap of 32 removed
full stops (the script passes the flag `re.UNICODE`, 32, where `sub` expects a count). One is not: "the other nine"
annotators are chosen by position, where the script compares dicts, which drops equal answers without an `answer_id`.
"""

import re
import unicodedata
from collections.abc import Sequence

from mm_gpt.errors import MMGPTError

_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # in the order of the script
_MAX_FULL_STOPS = 32
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_APOSTROPHE = re.compile("['\u2019]")
_MINUS = re.compile(r"(?<![\w)\]-])[-\u2013](?=\.?\d)")
_DECIMAL_POINT = re.compile(r"\.(?=\d)")
_POINT = "\N{DOT OPERATOR}"
"""Stands for a decimal point where punctuation goes: it is a symbol."""
_TELLING = frozenset(["Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Sm", "Sc", "So"])
"""Unicode's categories of letters, marks, numbers, and of mathematical, monetary and other symbols."""
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = frozenset(["a", "an", "the"])

# The script restores one missing apostrophe of these words. Left out: its keys with capitals (Im, Ive, Id've), which
# never match the lower-cased answer, and those that map to themselves (let's, she's).
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
_RESTORED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
}
_RESTORED["somebody'd"] = "somebodyd"  # the wrong way round in the script


def normalize_answer(text: str) -> str:
    """The official normalisation: punctuation, case, number words, articles, contractions."""
    text = _strip(text)
    spaced = text
    has_digits_around_comma = bool(_DIGITS_AROUND_COMMA.search(text))
    for mark in _MARKS:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if is_beside_space or has_digits_around_comma else " ")
    words = _FULL_STOP.sub("", spaced, count=_MAX_FULL_STOPS).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official VQA accuracy, 0..1, of one prediction against the answers of (usually ten) annotators.

    The mean over annotators of min(1, matches among the others / 3): with ten, 0, .3, .6, .9 and 1 for 0 to 4 matches.
    Answers are normalised only when the annotators do not all agree to the letter, as in the script: against ten times
    "yes" the prediction "Yes" scores 0. Raises MMGPTError for fewer than 4 answers, where 1 cannot be reached.
    """
    if isinstance(answers, str):
        raise MMGPTError("answers must be a list of strings, got one string")
    if len(answers) < 4:
        raise MMGPTError(f"VQA accuracy needs at least 4 annotators, got {len(answers)}; use exact_match")
    prediction = _strip(prediction)
    answers = [_strip(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = normalize_answer(prediction)
        answers = [normalize_answer(answer) for answer in answers]
    is_match = [answer == prediction for answer in answers]
    total = sum(is_match)
    return sum(min(1.0, (total - own) / 3) for own in is_match) / len(answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers but for case, punctuation and spaces, else 0.0.

    For sets with one true answer per question (DAQUAR, easy-VQA). Apostrophes vanish, other punctuation is a space;
    articles and number words count as they are. What tells answers apart stays: letters with their accents and vowel
    signs, a minus and a decimal point before a digit, symbols as in `C++`, `C#`, `$5` and `50%`. An answer that is
    nothing but punctuation is compared to the letter. An answer that is a list of objects is one string ("plant,
    books"). Raises MMGPTError without answers.
    """
    if isinstance(answers, str):
        raise MMGPTError("answers must be a list of strings, got one string")
    if not answers:
        raise MMGPTError("exact match needs at least one answer")
    predicted = _compared(prediction)
    return float(bool(predicted) and any(_compared(answer) == predicted for answer in answers))


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _compared(text: str) -> str:
    """What `exact_match` compares. Its own normalisation: the official one above is wrong for most of the world."""
    text = unicodedata.normalize("NFC", text).casefold()
    kept = _DECIMAL_POINT.sub(_POINT, _MINUS.sub("\N{MINUS SIGN}", _APOSTROPHE.sub("", text)))
    kept = "".join(c if unicodedata.category(c) in _TELLING or c in "#%" else _other(c) for c in kept)
    return " ".join(kept.split()) or text.strip()


def _other(character: str) -> str:
    """Joiners and marks of direction have no width; the rest stands between words."""
    return "" if unicodedata.category(character) == "Cf" else " "
