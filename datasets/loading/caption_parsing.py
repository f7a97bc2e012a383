"""Captions in parts: which nouns they have, of what colour and number, who does what, and where.

The words are those of `caption_words`. A noun that stands for something else (a toy dog, a dog statue) is not real.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mm_gpt.datasets.loading.caption_words import (
    ADJECTIVES,
    ANIMATE,
    COLLECTIVE,
    COLOURS,
    DETERMINERS,
    HEADS,
    LONGEST,
    MAY_TAKE_OBJECT,
    NOUNS,
    NUMBERS,
    OBJECT_ONLY,
    PARTICIPLES,
    PEOPLE_NAMES,
    PLACES,
    PRONOUNS,
    SIMILAR,
    SPORTS,
    SURFACES,
    THIRD_PERSON,
    UNREAL,
    word_set,
)


@dataclass(frozen=True)
class Mention:
    """A noun phrase: tokens [start, end), the noun itself from `head`."""

    name: str
    surface: str
    start: int
    head: int
    end: int
    determiner: str
    is_plural: bool
    number: int | None
    colours: tuple[str, ...]
    is_real: bool


@dataclass(frozen=True)
class Caption:
    tokens: tuple[str, ...]
    mentions: tuple[Mention, ...]

    def animate(self) -> list[Mention]:
        return [m for m in self.mentions if m.name in ANIMATE and m.surface not in PRONOUNS]


def parse(text: str) -> Caption:
    text = text.lower().replace("-and-", " and ").replace("\u2019", "'")
    tokens = tuple(re.findall(r"n't|'s|[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]", text))
    mentions = []
    i = 0
    while i < len(tokens):
        for length in range(min(LONGEST, len(tokens) - i), 0, -1):
            if tokens[i : i + length] in SURFACES:
                mentions.append(_mention(tokens, i, i + length))
                i += length
                break
        else:
            i += 1
    return Caption(tokens, tuple(mentions))


def _mention(tokens: tuple[str, ...], head: int, end: int) -> Mention:
    name, is_plural = SURFACES[tokens[head:end]]
    start, colours = head, []
    while start > 0:
        word = tokens[start - 1]
        if word in COLOURS:
            colours.append(COLOURS[word])
        elif word in ("and", ",") and start > 1 and tokens[start - 2] in COLOURS and tokens[start] in COLOURS:
            pass
        elif word not in ADJECTIVES and word not in UNREAL - {"no", "without", "like", "as", "not"}:
            break
        start -= 1
    before = tokens[start - 1] if start else ""
    following = tokens[end] if end < len(tokens) else ""
    is_noun_next = following in HEADS or ((following,) in SURFACES and following not in PRONOUNS)
    if name == "ball" and following in ("player", "players", "team", "game", "uniform", "field", "court", "jersey"):
        is_noun_next = True
    is_unreal = any(t in UNREAL for t in tokens[max(0, start - 1) : head]) or before in UNREAL
    is_unreal |= "costume" in tokens[end : end + 2] or "dressed as" in " ".join(tokens[max(0, start - 4) : start])
    is_verb = tokens[head:end] in _VERB_LIKE and before not in DETERMINERS and before not in NUMBERS and before != "'s"
    number = NUMBERS.get(before)
    return Mention(
        name,
        " ".join(tokens[head:end]),
        start,
        head,
        end,
        before if before in DETERMINERS else "",
        is_plural,
        number if is_plural else None,
        tuple(reversed(colours)),
        not is_noun_next and not is_unreal and not is_verb and following != "'s",
    )


# Nouns that are as often verbs or parts of other words: trusted only behind a determiner.
_VERB_LIKE = {
    (w,) for w in word_set("swing swings slide slides book bat duck ducks bear bears train trains ride fish ski")
}


def settle_bikes(captions: Sequence[str]) -> list[str]:
    """A "bike" is a motorcycle where another caption says so, and neither where the captions disagree."""
    text = " ".join(captions).lower()
    has_motor = re.search(r"motocross|motor ?cycl|motor ?bike|dirt ?bike|motorized|moped|harley", text)
    has_pedals = re.search(r"bicycl|cyclist|bmx|mountain bike", re.sub(r"motor ?cyclist", "", text))
    if not has_motor:
        return list(captions)
    if has_pedals:  # a bare "bike" may be either; a mountain bike stays one
        bare = r"(?<!mountain )(?<!dirt )(?<!bmx )\bbike(s?)\b"
        return [re.sub(bare, r"thing\1", c, flags=re.IGNORECASE) for c in captions]
    return [re.sub(r"\b(?:dirt ?)?bike(s?)\b", r"motorcycle\1", c, flags=re.IGNORECASE) for c in captions]


def related(name: str) -> set[str]:
    """`name`, what it is a kind of, what is a kind of it, and what people mix it up with."""
    related = {name, *NOUNS[name].parents}
    related |= {other for other, noun in NOUNS.items() if name in noun.parents}
    for group in SIMILAR:
        if name in group:
            related |= group
    return related


def name_sets(captions: list[Caption]) -> Iterator[set[str]]:
    return ({m.name for m in caption.mentions} for caption in captions)


def only_one(name: str, captions: list[Caption]) -> bool:
    """True if every caption that has the noun has it once and in the singular."""
    if name in ANIMATE and any({"another", "other", "others", "both", "each"} & set(c.tokens) for c in captions):
        return False
    kin = {name, *NOUNS[name].parents} & ANIMATE | {name}
    for caption in captions:
        found = [m for m in caption.mentions if m.name == name]
        if any(m.is_plural for m in caption.mentions if m.name in kin) and name not in PAIRS:
            return False
        if sum(m.determiner in ("a", "an", "one", "another", "") or m.number is not None for m in found) > 1:
            return False
    return True


PAIRS = {n for n, noun in NOUNS.items() if noun.plural == n}


def subject_of(caption: Caption, *, may_have_animal: bool = False) -> Mention | None:
    """The noun the caption starts with, if nobody else is in it (`may_have_animal`: but perhaps a person's horse)."""
    animate = caption.animate()
    if not animate or not animate[0].is_real or animate[0].start > 1 or animate[0].name == "animal":
        return None
    if animate[0].surface in COLLECTIVE - {"people"}:
        return None
    rest = animate[1:]
    if may_have_animal and animate[0].name in PEOPLE_NAMES:
        rest = [m for m in rest if m.name in PEOPLE_NAMES]
    return None if rest else animate[0]


def action_of(caption: Caption, subject: Mention) -> tuple[str, str] | None:
    """(short, long or ""): ("riding bike", "riding a bike down the street")."""
    tokens = caption.tokens
    at = subject.end
    if tokens[at : at + 1] and tokens[at] in ("in", "with", "wearing"):
        stops = [i for i in range(at + 1, min(at + 12, len(tokens) - 1)) if tokens[i] in ("is", "are")]
        if not stops or "," in tokens[at : stops[0]]:
            return None
        at = stops[0]
    if tokens[at : at + 1] and tokens[at] in ("is", "are"):
        at += 1
    if at >= len(tokens):
        return None
    verb = THIRD_PERSON.get(tokens[at], tokens[at] if tokens[at] in PARTICIPLES else "")
    verb = "lying" if verb == "laying" else verb
    if not verb:
        return None
    end = at + 1
    while end < len(tokens) and end < at + 7 and tokens[end] not in _STOPS and not tokens[end].endswith("ing"):
        end += 1
    nouns = [m for m in caption.mentions if at < m.head and m.end <= end]
    short = verb
    if verb == "playing" and tokens[at + 1 : at + 2] and tokens[at + 1] in SPORTS | {"football"}:
        short = f"playing {tokens[at + 1]}"
    elif verb in MAY_TAKE_OBJECT:
        thing = next((m for m in nouns if m.start - bool(m.determiner or m.number) == at + 1 and m.is_real), None)
        if thing:
            short = f"{verb} {NOUNS[thing.name].plural if thing.is_plural else thing.name}"
        elif verb in OBJECT_ONLY:
            return None
    if short == "flying" and subject.name in PEOPLE_NAMES:  # over a jump
        return None
    long = ""
    is_whole = end == len(tokens) or tokens[end] in _STOPS
    if is_whole and at + 1 < end and (tokens[end - 1] in PLACES or any(m.end == end for m in nouns)):
        long = " ".join((verb, *tokens[at + 1 : end]))
    return short, long


_STOPS = word_set('. , ; ! ? " ( ) and while as with that who which is are on-looking near wearing after before')


def places_of(caption: Caption) -> Iterator[str]:
    """What is said of somebody there: "on the beach"."""
    tokens = caption.tokens
    for i, token in enumerate(tokens):
        if token in PLACES and tokens[i + 1 : i + 2] and tokens[i + 1] in HEADS:
            continue
        if token in PLACES:
            start = i
            while start and (
                tokens[start - 1] in ADJECTIVES
                or tokens[start - 1] in COLOURS
                or tokens[start - 1] in ("a", "the", "an")
            ):
                start -= 1
            if start and tokens[start - 1] in ("in", "on", "through", "across", "down", "along"):
                yield PLACES[token]
