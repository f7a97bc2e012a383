"""What the captions of one image agree on. Where a rule is unsure, it finds nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mm_gpt.datasets.loading.caption_parsing import (
    PAIRS,
    Caption,
    Mention,
    action_of,
    name_sets,
    only_one,
    parse,
    related,
    settle_bikes,
    subject_of,
)
from mm_gpt.datasets.loading.caption_words import (
    ANIMATE,
    COLLECTIVE,
    INDOORS,
    NOUNS,
    OUTDOORS,
    PEOPLE_NAMES,
    PRONOUNS,
    STILL,
    word_set,
)


@dataclass(frozen=True)
class MainThing:
    """What a photo is of."""

    word: str
    """As people say it: "dog", "dogs", "surfer"."""
    name: str
    """Of the lexicon: "dog", "person"."""
    is_plural: bool

    @property
    def is_animate(self) -> bool:
        return self.name in ANIMATE

    @property
    def is_animal(self) -> bool:
        return self.name in ANIMATE - PEOPLE_NAMES


def shows_people(captions: Sequence[str]) -> int:
    """How many of the captions mention people, real or not."""
    return sum(any(m.name in PEOPLE_NAMES for m in parse(caption).mentions) for caption in captions)


def shows_animal(captions: Sequence[str]) -> bool:
    """Whether any caption mentions an animal, real or not."""
    return any(m.name in ANIMATE - PEOPLE_NAMES for caption in captions for m in parse(caption).mentions)


def main_thing(captions: Sequence[str]) -> MainThing | None:
    """What most captions of one image begin with: somebody before something. None where they do not agree."""
    return main_thing_of([parse(caption) for caption in settle_bikes(captions)])


def main_thing_of(captions: list[Caption]) -> MainThing | None:
    """See `main_thing`."""
    subjects = [subject for caption in captions if (subject := first_named(caption)) is not None]
    needed = max(1, min(2, len(captions)), (len(captions) + 1) // 2)
    if len(subjects) < needed:
        return None
    votes = Counter((m.name, m.is_plural) for m in subjects)
    (name, is_plural), count = votes.most_common(1)[0]
    if count < needed or (name == "person" and not is_plural):
        # Told apart differently: a boy to some, a child to others.
        if len({m.is_plural for m in subjects}) > 1 or not all(m.name in PEOPLE_NAMES for m in subjects):
            return None
        is_plural = subjects[0].is_plural
        young = all(m.name == "child" or "child" in NOUNS[m.name].parents for m in subjects)
        name = name if count >= needed and name != "person" else "child" if young else "person"
    word = NOUNS[name].plural if is_plural else name
    if name == "person" and not is_plural:
        surfaces = Counter(m.surface for m in subjects if m.name == "person" and m.surface not in _VAGUE)
        if surfaces and surfaces.most_common(1)[0][1] >= needed:
            word = surfaces.most_common(1)[0][0]
    return MainThing(word, name, is_plural)


_VAGUE = PRONOUNS | COLLECTIVE | word_set("person adult other partner friend fan teen figure")


def first_named(caption: Caption) -> Mention | None:
    """The first person or animal; without one, the noun that the caption begins with."""
    mentions = caption.mentions
    for number, mention in enumerate(mentions):
        if mention.name not in ANIMATE or mention.surface in PRONOUNS:
            continue
        if not mention.is_real:
            return None
        following = mentions[number + 1] if number + 1 < len(mentions) else None
        is_group = caption.tokens[mention.end : mention.end + 1] == ("of",) and mention.surface in COLLECTIVE
        if is_group and following is not None and following.name in ANIMATE and following.is_real:
            return following
        return mention
    first = mentions[0] if mentions else None
    return first if first is not None and first.start <= 2 and first.is_real else None


# Of these, people name too many colours or mean too many things.
UNCOLOURED = word_set("animal snow water stick flower leaf tree building wall rock glass light toy")


def colours_of(captions: list[Caption]) -> dict[str, tuple[str, ...]]:
    """Colours by noun: of things that are there once, and nobody names another colour."""
    found = {}
    for name in sorted(set().union(*name_sets(captions))):
        if name in PEOPLE_NAMES or name in UNCOLOURED or set(NOUNS[name].parents) & {"garment"}:
            continue
        colours = _agreed_colours(name, captions)
        if colours and only_one(name, captions):
            found[name] = colours
    return found


def _agreed_colours(name: str, captions: list[Caption]) -> tuple[str, ...]:
    coloured = [m for c in captions for m in c.mentions if m.name == name and m.colours]
    is_one = len({tuple(sorted(m.colours)) for m in coloured}) == 1 and any(m.is_real for m in coloured)
    return min(m.colours for m in coloured) if is_one else ()


@dataclass(frozen=True)
class Garment:
    wearer: str
    thing: str
    """In the plural where it is a pair."""
    is_pair: bool
    colours: tuple[str, ...]
    """Empty where the captions tell none, or do not agree."""


def clothes_of(captions: list[Caption]) -> list[Garment]:
    """What the only man, woman, ... wears: from "a man in a red shirt"."""
    worn: set[tuple[str, str]] = set()
    for caption in captions:
        people = [m for m in caption.animate() if m.name in PEOPLE_NAMES]
        if len(people) != 1:
            continue
        wearer = people[0]
        for mention in caption.mentions:
            between = caption.tokens[wearer.end : mention.start]
            if (
                "garment" in NOUNS[mention.name].parents
                and {"in", "wearing", "wears"} & set(between)
                and len(between) <= 4
                and mention.is_real
                and not wearer.is_plural
            ):
                worn.add((wearer.name, mention.name))
    found = []
    for wearer_name, name in sorted(worn):
        if not only_one(wearer_name, captions):
            continue
        is_pair = name in PAIRS
        plain = all(m.is_plural == is_pair for c in captions for m in c.mentions if m.name == name)
        colours = _agreed_colours(name, captions) if plain and only_one(name, captions) else ()
        found.append(Garment(wearer_name, NOUNS[name].plural if is_pair else name, is_pair, colours))
    return found


def counts_of(captions: list[Caption]) -> dict[str, int]:
    """How many by noun: every caption that tells must tell the same."""
    words = {token for caption in captions for token in caption.tokens}
    needed = min(2, len(captions))
    if words & {"another", "other", "others", "third", "several", "many", "some", "few"}:
        return {}
    counted: dict[str, int] = {}
    for name in sorted(set().union(*name_sets(captions))):
        if name not in ANIMATE or name in ("person", "animal"):
            continue
        votes: list[int | None] = []
        for caption in captions:
            found = [m for m in caption.mentions if m.name == name]
            kin = [m for m in caption.mentions if m.name in related(name) - {name} and m.name in ANIMATE]
            if found or any(m.is_plural and m.surface not in PRONOUNS for m in kin):
                votes.append(_count(found) if len(found) == 1 and not any(m.is_plural for m in kin) else None)
        if None not in votes and len(set(votes)) == 1 and len(votes) >= (needed if votes[0] != 1 else needed + 1):
            counted[name] = votes[0] or 0
    people = []
    for caption in captions:
        found = [m for m in caption.animate() if m.name in PEOPLE_NAMES]
        if found:
            counts = [_count([m]) for m in found]
            people.append(None if None in counts else sum(c for c in counts if c))
    if people and None not in people and len(set(people)) == 1 and len(people) >= min(3, len(captions)):
        counted["person"] = people[0] or 0
    return counted


def _count(mentions: list[Mention]) -> int | None:
    mention = mentions[0]
    if not mention.is_real or (mention.is_plural and mention.number is None):
        return None
    return mention.number or (1 if mention.determiner in ("a", "an", "one", "") else None)


@dataclass(frozen=True)
class Action:
    name: str
    is_plural: bool
    answers: tuple[str, ...]
    """The one that most captions tell, then others: "riding bicycle", "riding a bicycle down the street"."""
    votes: int
    """Captions that tell the first."""


def actions_of(captions: list[Caption]) -> list[Action]:
    """What somebody does: from captions that start with them and name nobody else."""
    done: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for caption in captions:
        subject = subject_of(caption, may_have_animal=True)
        action = action_of(caption, subject) if subject else None
        if subject and action:
            done.setdefault((subject.name, subject.is_plural), []).append(action)
    found = []
    for (name, is_plural), actions in sorted(done.items()):
        if (name, not is_plural) in done or (not is_plural and not only_one(name, captions)):
            continue
        if name == "person" and any(other in PEOPLE_NAMES - {"person"} for other, _ in done):
            continue  # the same one, and others say who it is
        counted = Counter(short for short, _ in actions)
        if len({short in STILL for short in counted}) > 1 and len(set(counted.values())) == 1:
            continue  # one saw it stand, one saw it run
        best = max(counted, key=lambda short: (counted[short], short not in STILL))
        answers = [best, *(long for short, long in actions if short == best and long), *counted]
        found.append(Action(name, is_plural, tuple(dict.fromkeys(answers)), counted[best]))
    return found


def setting_of(captions: list[Caption]) -> str:
    """ "outdoors" or "indoors": two captions have words for one and none has any for the other; else ""."""
    tokens = [set(caption.tokens) for caption in captions]
    outside, inside = (sum(bool(t & words) for t in tokens) for words in (OUTDOORS, INDOORS))
    if bool(outside) == bool(inside) or max(outside, inside) < min(2, len(captions)):
        return ""
    return "outdoors" if outside else "indoors"
