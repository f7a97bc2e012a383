"""Questions and short answers about an image, derived by rules from the captions that people wrote for it.

Several captions of one image check each other: a colour or a count is asked only where nobody disagrees, and an object
is absent only if no caption mentions it, anything it is a kind of, or anything that usually comes with it. Where
a rule is unsure it asks nothing: "I don't know" is no answer here.

Answers are short, lower-case and without an article, as in VQA; counts are digits, as in DAQUAR.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from mm_gpt.datasets.loading.caption_facts import (
    actions_of,
    clothes_of,
    colours_of,
    counts_of,
    main_thing_of,
    setting_of,
)
from mm_gpt.datasets.loading.caption_parsing import (
    Caption,
    action_of,
    name_sets,
    only_one,
    parse,
    places_of,
    settle_bikes,
    subject_of,
)
from mm_gpt.datasets.loading.caption_words import NOUNS, PEOPLE_NAMES, SPORTS
from mm_gpt.datasets.loading.caption_yes_no import ask, checks, colour_words, picture_word, presence
from mm_gpt.datasets.samples import QuestionAnswer


def derive_questions(captions: Sequence[str], rng: random.Random, *, max_questions: int) -> list[QuestionAnswer]:
    """Up to `max_questions` questions that the captions of one image answer, of as many kinds as possible.

    The same captions, `max_questions` and state of `rng` give the same questions. "Is there a ...?" questions alternate
    between yes and no, starting with either at random, and stop when one of them has no candidate left.
    """
    parsed = [parse(caption) for caption in settle_bikes(captions)]
    kinds: list[list[QuestionAnswer]] = []
    if parsed:
        for rule in _RULES:
            found = list(rule(parsed, rng))
            if rule is not presence:  # its order carries the balance
                rng.shuffle(found)
            kinds.append(found)
    rng.shuffle(kinds)
    chosen: list[QuestionAnswer] = []
    while any(kinds) and len(chosen) < max_questions:
        for kind in kinds:
            if kind and len(chosen) < max_questions:
                chosen.append(kind.pop(0))
    return chosen


def _colours(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What colour is the dog?"""
    for name, colours in colours_of(captions).items():
        yield _colour_question(rng, f"the {name}", "is", colours)


def _colour_question(rng: random.Random, thing: str, verb: str, colours: tuple[str, ...]) -> QuestionAnswer:
    phrasings = "what colour {v} {x}?|what color {v} {x}?|what is the colour of {x}?|what is the color of {x}?"
    return ask(rng, phrasings, [colour_words(colours)], x=thing, v=verb)


def _clothes(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What colour is the man's shirt? What is he wearing?"""
    asked: dict[str, list[str]] = {}
    for garment in clothes_of(captions):
        asked.setdefault(garment.wearer, []).append(garment.thing)
        if garment.colours:
            verb = "are" if garment.is_pair else "is"
            yield _colour_question(rng, f"the {garment.wearer}'s {garment.thing}", verb, garment.colours)
    for wearer, things in asked.items():
        yield ask(rng, "what is the {x} wearing?", things, x=wearer)


def _counts(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """How many dogs are there?"""
    phrasings = (
        "how many {xs} are there?|how many {xs} are in the {p}?|how many {xs} can you see?|how many {xs} are visible?"
    )
    for name, count in counts_of(captions).items():
        if count > 1 or rng.random() < 0.15:  # else nine answers in ten are 1
            yield ask(rng, phrasings, [str(count)], xs=NOUNS[name].plural, p=picture_word(rng))


def _actions(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What is the dog doing?"""
    for action in actions_of(captions):
        noun, verb = (NOUNS[action.name].plural, "are") if action.is_plural else (action.name, "is")
        phrasings = "what {v} the {x} doing?|what {v} the {x} doing in the {p}?"
        yield ask(rng, phrasings, action.answers, x=noun, v=verb, p=picture_word(rng))


def _setting(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Indoors or outdoors? Most photos are outdoors, so those less often."""
    answer = setting_of(captions)
    if answer == "indoors" or (answer and rng.random() < 1 / 3):
        phrasings = (
            "is this indoors or outdoors?|is the {p} taken indoors or outdoors?|was this {p} taken inside or outside?"
        )
        question = ask(rng, phrasings, [answer], p=rng.choice(("photo", "picture")))
        if "inside" in question.question:
            question = QuestionAnswer(question.question, answer[:-5] + "side", (answer[:-5] + "side", answer))
        yield question


def _riding(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What is the man riding? What is the dog holding in its mouth? What sport is this?"""
    found: dict[tuple[str, str], list[str]] = {}
    for caption in captions:
        subject = subject_of(caption, may_have_animal=True)
        action = action_of(caption, subject) if subject and not subject.is_plural else None
        if subject and action:
            verb, _, thing = action[0].partition(" ")
            if thing and verb in ("riding", "holding", "carrying", "chasing", "kicking", "throwing", "reading"):
                found.setdefault((subject.name, verb), []).append(thing)
    for (name, verb), things in sorted(found.items()):
        if only_one(name, captions):
            yield ask(rng, "what is the {x} {v}?", [t for t, _ in Counter(things).most_common()], x=name, v=verb)
    sports = {token for caption in captions for token in caption.tokens if token in SPORTS - {"frisbee"}}
    votes = [bool(sports & set(caption.tokens)) for caption in captions]
    played = {"player", "players", "playing", "plays", "game", "play"} & {t for c in captions for t in c.tokens}
    is_sure = len(sports) == 1 and sum(votes) >= min(2, len(captions)) and played
    if is_sure and not any("football" in caption.tokens for caption in captions):  # soccer to some, rugby to others
        yield ask(rng, "what sport is being played?|what sport is this?|which sport is shown?", sports)


def _where(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Where is the dog? From "runs through the grass", in captions that name nobody else."""
    found: dict[tuple[str, bool], list[str]] = {}
    for caption in captions:
        subject = subject_of(caption)
        if subject:
            places = [p for p in places_of(caption) if p]
            if len(places) == 1:
                found.setdefault((subject.name, subject.is_plural), []).append(places[0])
    for (name, is_plural), places in sorted(found.items()):
        ranked = Counter(places).most_common()
        if (name, not is_plural) in found or ranked[0][1] < min(2, len(captions)):
            continue
        if is_plural or only_one(name, captions):
            noun, verb = (NOUNS[name].plural, "are") if is_plural else (name, "is")
            yield ask(rng, "where {v} the {x}?", [place for place, _ in ranked], x=noun, v=verb)


def _main(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What is the main thing in the picture? Only people: of an animal, captions rarely tell which kind it is."""
    thing = main_thing_of(captions)
    if thing is not None and thing.name in PEOPLE_NAMES:
        phrasings = "what is the main thing in the {p}?|what is the main subject of the {p}?|who is in the {p}?"
        yield ask(rng, phrasings, [thing.word], p=picture_word(rng))


def _animal(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What animal is in the picture? Only if it is one kind."""
    sets = list(name_sets(captions))
    animals = sorted({n for names in sets for n in names if n != "animal" and "animal" in NOUNS[n].parents})
    if len(animals) == 1:
        mentions = [m for c in captions for m in c.mentions if m.name == animals[0]]
        if all(m.is_real for m in mentions) and sum(animals[0] in names for names in sets) >= min(2, len(captions)):
            phrasings = "what animal is in the {p}?|which animal is this?|what kind of animal is in the {p}?"
            if any(m.is_plural for m in mentions):
                phrasings = "what kind of animal is in the {p}?|what kind of animals are these?"
            yield ask(rng, phrasings, [animals[0]], p=picture_word(rng))


_Rule = Callable[[list[Caption], random.Random], Iterator[QuestionAnswer]]
_RULES: tuple[_Rule, ...] = (
    presence, checks, _colours, _clothes, _counts, _actions, _riding, _setting, _where, _animal, _main,
)  # fmt: skip
