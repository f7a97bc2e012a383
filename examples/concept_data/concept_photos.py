"""Questions about the training photos whose answers their captions and the trunk's scores agree on.

A class is named only where the captions support it: they say dog, and the trunk says golden retriever. Where they do
not, what the captions say is the truth, and an animal that only the trunk sees is not there. That teaches when to trust
it.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from concept_words import NUM_ANIMALS, KindNames, is_plural, with_article
from torch import Tensor
from trunk_scores import Trunk, scores_of

from mm_gpt.datasets.formats.captioned import read_records
from mm_gpt.datasets.loading.caption_facts import MainThing, main_thing, shows_animal, shows_people
from mm_gpt.datasets.samples import ErrorCounter, QuestionAnswer
from mm_gpt.vision.imagenet import CLASSES, is_kind, is_named

TARS = (
    *("flickr8k/train-000000.tar", "flickr8k/train-000001.tar"),
    *("coco2017_mini/train-000000.tar", "daquar/train-000000.tar"),
)
NAMED = 0.5
"""The least score of a class that a caption's animal is named after."""
SURE = 0.6
"""The least score of a class where the captions' support is weaker, or of which another one is denied."""
SEEN = 0.08
"""The least score of an animal that captions without animals deny."""

Pair = dict[str, str]


class Seen:
    """What the trunk sees in a photo: classes that share a plain name are added up."""

    def __init__(self, scores: Tensor) -> None:
        """Probabilities (1000,)."""
        self._index: dict[str, int] = {}
        merged: dict[str, float] = {}
        for index in torch.argsort(scores, descending=True)[:40].tolist():
            name = CLASSES[index].plain
            merged[name] = merged.get(name, 0.0) + float(scores[index])
            self._index.setdefault(name, index)
        self.names = sorted(merged, key=lambda name: -merged[name])
        self.scores = merged

    def index(self, name: str) -> int:
        return self._index[name]


def photo_records(
    data: Path, kept: Path, trunk: Trunk, seed: int
) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """(key, `{"qa": ...}`, the image file as it is) of each photo that something can be asked about."""
    kinds = KindNames(CLASSES)
    for place in TARS:
        scores = scores_of(data / place, kept, trunk)
        for record in read_records(data / place, ErrorCounter()):
            if record.key not in scores or not isinstance(record.image, bytes):
                continue
            rng = random.Random(f"{seed}/photo/{place}/{record.key}")
            seen = Seen(scores[record.key])
            if record.captions:
                pairs = list(caption_pairs(record.captions, seen, kinds, rng))
            else:
                pairs = list(answer_pairs(record.questions, seen, rng))
            if pairs:
                rng.shuffle(pairs)
                yield f"{Path(place).parent.name}_{record.key}", {"qa": pairs}, record.image


def caption_pairs(captions: Sequence[str], seen: Seen, kinds: KindNames, rng: random.Random) -> Iterator[Pair]:
    """Questions about a photo with captions."""
    name = seen.names[0]
    index, score, kind = seen.index(name), seen.scores[name], kinds.of(name)
    thing = main_thing(captions)
    is_named_by = _supports(captions, thing, index, score)
    photo = rng.choice(("picture", "picture", "photo", "image"))
    if is_named_by or thing is not None:
        main = name if is_named_by else thing.word  # type: ignore[union-attr]
        yield _pair(f"What is the main thing in the {rng.choice(('picture', 'picture', photo))}?", main)
    is_this = "Are these" if is_plural(name) else "Is this"
    if is_named_by:
        if not is_plural(name):
            yield _pair(rng.choice(("What is this?", "What is it?", "What's this?")), name)
        if kind and kind != name and score >= SURE:
            yield _pair(f"What kind of {kind} is this?", name)
        second = next((n for n in seen.names[1:6] if kind and kinds.of(n) == kind and kinds.are_apart(n, name)), None)
        if score >= SURE and second is not None:
            yield _pair(f"{is_this} {with_article(name)}?", "yes")
            yield _pair(f"{is_this} {with_article(second)}?", "no")
        elif rng.random() < 0.3:
            yield _pair(f"{is_this} {with_article(name)}?", "yes")
    elif thing is not None and not thing.is_plural and thing.name not in ("person", "animal"):
        other = rng.choice(_OTHERS.get(thing.name, _OTHERS["dog"]))
        both = [_pair(f"Is this {with_article(thing.name)}?", "yes"), _pair(f"Is this {with_article(other)}?", "no")]
        if not any(other in caption.lower() for caption in captions):
            yield rng.choice(both)
    if len(captions) < 3:
        return
    asked = rng.choice(
        (f"Is there a person in the {photo}?", f"Are there people in the {photo}?", "Can you see a person?")
    )
    people = shows_people(captions)
    if people >= 3 and rng.random() < 0.15:
        yield _pair(asked, "yes")
    elif people == 0:
        yield _pair(asked, "no")
    yield from _presence(captions, seen, kinds, photo, rng)


_OTHERS = {
    "dog": ("cat", "fox", "horse", "wolf", "goat"),
    "cat": ("dog", "rabbit", "fox"),
    "man": ("woman", "girl", "dog"),
    "woman": ("man", "boy", "dog"),
    "boy": ("woman", "dog", "cat"),
    "girl": ("man", "dog", "cat"),
    "child": ("dog", "cat"),
    "baby": ("dog", "cat", "doll"),
    "bird": ("dog", "squirrel", "airplane"),
    "horse": ("cow", "dog", "camel"),
}
"""What one photo of a thing is no photo of, though the words stand close together."""


def _supports(captions: Sequence[str], thing: MainThing | None, index: int, score: float) -> bool:
    """Whether the captions let the main thing be named after the class."""
    people = shows_people(captions)
    if thing is not None and thing.is_animate:
        return (
            thing.is_animal
            and not thing.is_plural
            and index < NUM_ANIMALS
            and is_kind(thing.name, index)
            and score >= NAMED
        )
    if people or score < SURE:
        return False
    if thing is not None:
        return is_kind(thing.name, index)
    return any(is_kind(caption, index) for caption in captions) and not shows_animal(captions)


def _presence(captions: Sequence[str], seen: Seen, kinds: KindNames, photo: str, rng: random.Random) -> Iterator[Pair]:
    """Is there a tennis ball? Yes where captions have the word; no for an animal of which none of them knows."""
    there = rng.choice(("Is there {} in the {}?", "Can you see {} in the {}?"))

    def ask(name: str, answer: str) -> Pair:
        return _pair(
            (there.replace("Is", "Are") if is_plural(name) else there).format(with_article(name), photo), answer
        )

    said = [n for n in seen.names[:5] if seen.scores[n] >= 0.2 and any(is_named(c, seen.index(n)) for c in captions)]
    if said and not is_plural(said[0]) and rng.random() < 0.7:
        yield ask(said[0], "yes")
    for name in seen.names[:5]:
        index = seen.index(name)
        if index >= NUM_ANIMALS or seen.scores[name] < SEEN:
            continue
        if not shows_animal(captions) and not any(is_kind(caption, index) for caption in captions):
            yield ask(rng.choice((name, kinds.of(name) or name)), "no")
            break


def answer_pairs(questions: Sequence[QuestionAnswer], seen: Seen, rng: random.Random) -> Iterator[Pair]:
    """Questions about a photo without captions, where its own answers have the word."""
    answers = {word.strip() for question in questions for answer in question.answers for word in answer.split(",")}
    name = seen.names[0]
    word = next((w for w in (name, name.rpartition(" ")[2], CLASSES[seen.index(name)].kind) if w in answers), None)
    if word and seen.scores[name] >= NAMED:
        yield _pair("What is the main thing in the picture?", word)
        if rng.random() < 0.3:
            yield _pair(f"Is there {with_article(word)} in the picture?", "yes")


def _pair(question: str, answer: str) -> Pair:
    return {"question": question, "answer": answer}
