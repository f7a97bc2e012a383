"""Yes or no, and this or that: what the captions of one image agree on against what is likely and not so.

The hard part is a "no" that is true. Captions leave much out, so a thing is denied only where something else stands in
its place (no cat where the dog is), or where nothing that usually comes with it is mentioned; and of those, what is
likely in such a scene is asked more often.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator

from mm_gpt.datasets.loading.caption_facts import (
    actions_of,
    clothes_of,
    colours_of,
    counts_of,
    main_thing_of,
    setting_of,
)
from mm_gpt.datasets.loading.caption_parsing import Caption, name_sets, related
from mm_gpt.datasets.loading.caption_words import (
    ANIMATE,
    COLOUR_FAMILIES,
    COLOURS,
    FURS,
    IMPLIED_BY,
    LIKELY_WITH,
    MASS,
    MISTAKEN_FOR,
    NOUNS,
    NUMBERS,
    OPPOSED,
    PEOPLE_NAMES,
    PRONOUNS,
    THIRD_PERSON,
)
from mm_gpt.datasets.samples import QuestionAnswer

MOST_CHECKS = 2
"""About one image: yes and no are to be no more than half of the answers."""


def ask(rng: random.Random, phrasings: str, answers: Iterable[str], **words: str) -> QuestionAnswer:
    """One of the phrasings (separated by |), filled in. The first answer is the answer."""
    question = rng.choice(phrasings.split("|")).format(**words)
    unique = tuple(dict.fromkeys(answers))
    return QuestionAnswer(question[0].upper() + question[1:], unique[0], unique)


def picture_word(rng: random.Random) -> str:
    return rng.choice(("photo", "picture", "image"))


def colour_words(colours: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(colours))


def presence(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Is there a dog? No only for what no caption mentions or implies."""
    words = {token for caption in captions for token in caption.tokens}
    mentioned = {m.name for caption in captions for m in caption.mentions}
    votes = Counter(
        name for c in captions for name in {m.name for m in c.mentions if m.is_real and m.surface not in PRONOUNS}
    )
    needed = min(2, len(captions))
    present = [n for n in sorted(votes) if NOUNS[n].weight and votes[n] >= (needed if n in ANIMATE else 1)]
    if {"man", "woman"} <= mentioned or {"boy", "girl"} <= mentioned:
        together = any({"man", "woman"} <= names or {"boy", "girl"} <= names for names in name_sets(captions))
        if not together:  # one figure that people see differently
            present = [n for n in present if n not in PEOPLE_NAMES]
    if any(votes[n] >= needed for n in PEOPLE_NAMES):
        present.append("person")
    # Captions rarely rule people out, so their "yes" is asked less often, and their "no" whenever it can be.
    present = [n for n in present if n not in PEOPLE_NAMES or rng.random() < (0.2 if n == "person" else 0.4)]
    blocked = set().union(*map(related, mentioned)) if mentioned else set()
    absent = [
        name
        for name, noun in sorted(NOUNS.items())
        if (noun.weight or name == "person")
        and name not in blocked
        and not words & set(IMPLIED_BY.get(name, "").split())
        and not words & {name, noun.plural}
    ]
    if len(captions) < 3:  # too little is said to conclude that something is missing
        absent = [name for name in absent if name not in (*MASS, "person")]
    categories = {parent for name in mentioned for parent in NOUNS[name].parents}
    weights = [_no_weight(name, categories, words) for name in absent]
    rng.shuffle(present)
    is_yes = rng.random() < 0.5
    while present and absent and any(weights):
        # A yes and a no together, so that neither outnumbers the other.
        no = rng.choices(range(len(absent)), weights)[0]
        pair = [(present.pop(), "yes"), (absent.pop(no), "no")]
        weights.pop(no)
        for name, answer in pair if is_yes else reversed(pair):
            yield _presence_question(name, answer, rng, captions)


def _no_weight(name: str, categories: set[str], words: set[str]) -> float:
    if name in PEOPLE_NAMES:
        return 10 * (NOUNS[name].weight or 200)
    near_miss = 3 if categories & set(NOUNS[name].parents) else 1  # harder, and so is what such scenes often have
    return NOUNS[name].weight * near_miss * (4 if words & LIKELY_WITH.get(name, set()) else 1)


def _presence_question(name: str, answer: str, rng: random.Random, captions: list[Caption]) -> QuestionAnswer:
    noun = NOUNS[name]
    # Only "any ...s" fits several, and it must not give the answer away: it is asked about absent things as often.
    is_plural = rng.random() < 0.3
    if answer == "yes" and name not in MASS:
        forms = [m.is_plural for c in captions for m in c.mentions if m.name == name]
        is_plural = all(forms) if forms else is_plural
    if name in MASS:
        phrasings = "is there any {x} in the {p}?|is there {x} in this {p}?|can you see {x} in the {p}?"
    elif is_plural:
        phrasings = "are there any {xs} in the {p}?|can you see any {xs} in this {p}?|do you see any {xs}?"
    else:
        phrasings = "is there {ax} in the {p}?|is there {ax} in this {p}?|can you see {ax}?|does the {p} show {ax}?"
    picture = picture_word(rng)
    return ask(rng, phrasings, [answer], x=name, ax=with_article(name), xs=noun.plural, p=picture)


def with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" and not name.startswith("uni") else "a ") + name


def checks(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Is this a dog? Is the dog black? Is it running or sleeping? Are there two? Is this outdoors?

    As many are true as false, as far as each of them could have been either.
    """
    found = [question for rule in _CHECKS for question in rule(captions, rng)]
    yield from rng.sample(found, min(MOST_CHECKS, len(found)))


def _check(
    rng: random.Random, phrasing: str, true: str, false: str, choice: str = "", answers: tuple[str, str] = ("", "")
) -> QuestionAnswer:
    """`phrasing` with what is so (yes) or is not (no), or the `choice` between both, answered by the first of
    `answers`."""
    roll = rng.random()
    if choice and roll < 0.3:
        first, second = rng.sample([true, false], 2)
        return ask(rng, choice, [answers[0] or true], a=first, b=second, p=picture_word(rng))
    said, answer = rng.choice(((true, "yes"), (false, "no")))
    return ask(rng, phrasing, [answer], x=said, p=picture_word(rng))


def _identity(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Is this a dog? Against what it may be mistaken for, where no caption mentions anything of the kind."""
    thing = main_thing_of(captions)
    if thing is None or thing.is_plural or len(captions) < 2 or thing.name not in MISTAKEN_FOR:
        return
    mentioned = set().union(*name_sets(captions))
    words = {token for caption in captions for token in caption.tokens}
    others = [
        other
        for other in MISTAKEN_FOR[thing.name].split()
        if other not in mentioned and other not in words and not (related(other) - {"person", "animal"}) & mentioned
    ]
    if others:
        other = rng.choice(others)
        choice = "is this {a} or {b}?|is it {a} or {b}?"
        true, false = with_article(thing.name), with_article(other)
        yield _check(rng, "is this {x}?|is this {x}?|is that {x}?", true, false, choice, (thing.name, other))


def _is_coloured(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Is the dog black? Against colours that nobody takes for it."""
    usual = sorted(set(COLOURS.values()) - {"gold", "silver", "beige", "tan"})
    coloured = [
        (f"the {name}", "is", colours, FURS if name in ANIMATE else usual)
        for name, colours in colours_of(captions).items()
    ]
    for garment in clothes_of(captions):
        verb = "are" if garment.is_pair else "is"
        coloured.append((f"the {garment.wearer}'s {garment.thing}", verb, garment.colours, usual))
    for thing, verb, colours, candidates in coloured:
        if len(colours) != 1:
            continue
        near = {colours[0]}.union(*(family for family in COLOUR_FAMILIES if colours[0] in family))
        others = [other for other in candidates if other not in near]
        if others:
            choice = f"{verb} {thing} {{a}} or {{b}}?"
            yield _check(rng, f"{verb} {thing} {{x}}?", colours[0], rng.choice(others), choice)


def _is_doing(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Is the dog running? Against what nobody does at the same time."""
    words = {token for caption in captions for token in caption.tokens}
    doing = words | {THIRD_PERSON[word] for word in words if word in THIRD_PERSON}
    for action in actions_of(captions):
        verb = action.answers[0]
        if action.votes < min(2, len(captions)) or verb not in OPPOSED:
            continue
        others = [other for other in OPPOSED[verb].split() if other not in doing]
        if others:
            noun = f"are the {NOUNS[action.name].plural}" if action.is_plural else f"is the {action.name}"
            yield _check(rng, f"{noun} {{x}}?", verb, rng.choice(others), f"{noun} {{a}} or {{b}}?")


def _are_there(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Are there two dogs?"""
    words = {count: word for word, count in NUMBERS.items() if not word.isdigit()}
    for name, count in counts_of(captions).items():
        if 2 <= count <= 8:
            near = [other for other in (count - 1, count + 1, count + 2) if other >= 2]
            things = NOUNS[name].plural
            phrasing = f"are there {{x}} {things} in the {{p}}?|are there {{x}} {things}?"
            yield _check(rng, phrasing, words[count], words[rng.choice(near)])


def _is_set(captions: list[Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Is this outdoors? Most photos are, so those less often."""
    answer = setting_of(captions)
    if answer == "indoors" or (answer and rng.random() < 1 / 3):
        other = "indoors" if answer == "outdoors" else "outdoors"
        yield _check(rng, "is this {x}?|was this {p} taken {x}?|is the {p} taken {x}?", answer, other)


_CHECKS = (_identity, _is_coloured, _is_doing, _are_there, _is_set)
