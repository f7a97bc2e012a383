"""One line where the packaged model is asked beyond its world.

That world is small, and known: beside the weights lies a list of the words that its training said about its pictures
(`examples/seen_words.py` made it), and its configuration names its concepts (`mm_gpt.vision.concepts`). A question
about a picture with another word in it, about written text, about several pictures, or for more than a few words gets
an answer all the same, and the same confidence. So people are told once, and what would do better.
"""

import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from mm_gpt.hub.checkpoint import model_folder, shipped_models
from mm_gpt.hub.weights import read_json

WORDS = "words.txt"
LARGER = "--model smolvlm"
_ASKING = """
able actually already also always answer anything because believe best better both brief briefly can caption certain
could count describe describing description does don each else enough especially even ever everyone everything exactly
explanation false first following general give given guess happen happened happening happens here hint how however
idea image images important instead isn just kindly know known least less let likely list main maybe mean means
mention might more most name named need never nothing now often okay photo photograph picture pictures please possible
possibly probably question quickly quite rather really say see seen sentence sentences short shortly should show shown
shows simply since single somehow something specific such suggest sure tell than thank thanks that then there these
they thing things think this those though true understand until use used using very visible want was well were what
when where whether which while who whose why will with word words would yes yet you your
"""
ASKING = frozenset(_ASKING.split())
"""Words about asking, not about pictures."""
READING = re.compile(r"\b(read|written|transcribe|ocr|spell|spelled|text)\b|\bwhat (does|do|is) .*\bsay(ing)?\b", re.I)
LONG = re.compile(
    r"\b(in (great |full )?detail|detailed|step by step|explain|poem|essay|paragraphs?|\d{3,} words)\b"
    r"|\b(tell|write)\b.*\bstory\b",
    re.I,
)


class Hints:
    """Says at most one thing about one model."""

    def __init__(self, model: str):
        """`model` as it is named; only those of the package, with a list of words, are spoken about."""
        folder = model_folder(model) if model in shipped_models() else None
        self._words = known_words(folder) if folder is not None and (folder / WORDS).is_file() else None

    def about(self, question: str, images: int) -> str | None:
        """What to tell before a question about so many images is answered; None: nothing, or it was told already."""
        if self._words is None or not images:
            return None
        found = beyond(question, images, self._words)
        if found is None:
            return None
        self._words = None
        return f"mm-gpt: hint: the packaged model {found}, and may guess; {LARGER} fetches one that knows more"


def beyond(question: str, images: int, words: Collection[str]) -> str | None:
    """What of a question about images is beyond a model whose training had these words; None: nothing that is known."""
    if READING.search(question):
        return "cannot read text in pictures"
    if LONG.search(question):
        return "learned answers of a few words and captions of one sentence"
    unseen = next((word for word in _words_of(question) if not any(form in words for form in _forms(word))), None)
    if unseen is not None:
        return f"hardly met {unseen!r} in training"
    return "learned from one picture at a time" if images > 1 else None


@cache
def known_words(folder: Path) -> frozenset[str]:
    """Of a model's folder: what its training said about pictures, and the names and kinds of its concepts, if any.

    Raises CheckpointError naming a configuration that cannot be read.
    """
    words = (folder / WORDS).read_text(encoding="utf-8").split()
    concepts = (read_json(folder / "config.json").get("vision") or {}).get("concepts") or {}
    told = " ".join([*concepts.get("names", ()), *concepts.get("kinds", ())])
    return frozenset([*words, *_letters(told.lower())])


def _words_of(text: str) -> Iterator[str]:
    """Lower-case words of three letters and more that are about something."""
    text = re.sub(r"(n['’]t|['’]\w+)\b", "", text.lower())
    return (word for word in _letters(text) if word not in ASKING)


def _letters(text: str) -> list[str]:
    """Its runs of three letters and more."""
    return re.findall(r"[^\W\d_]{3,}", text)


def _forms(word: str) -> Iterator[str]:
    """A word, and what it may be the plural or another form of."""
    yield from (word, f"{word}s")
    for ending in ("s", "es", "d", "ed", "er", "ing"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3:
            yield from (stem, f"{stem}e")
    if word.endswith("ies"):
        yield word[:-3] + "y"
