"""Questions and short answers about an image, derived by rules from the captions that people wrote for it.

Several captions of one image check each other: a colour or a count is asked only where nobody disagrees, and an object
is absent only if no caption mentions it, anything it is a kind of, or anything that usually comes with it. Where
a rule is unsure it asks nothing.

Answers are short, lower-case and without an article, as in VQA; counts are digits, as in DAQUAR.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mm_gpt.datasets.loading.caption_words import (
    ADJECTIVES,
    ANIMATE,
    COLLECTIVE,
    COLOURS,
    DETERMINERS,
    HEADS,
    IMPLIED_BY,
    INDOORS,
    LONGEST,
    MASS,
    MAY_TAKE_OBJECT,
    NOUNS,
    NUMBERS,
    OBJECT_ONLY,
    OUTDOORS,
    PARTICIPLES,
    PEOPLE_NAMES,
    PLACES,
    PRONOUNS,
    SIMILAR,
    SPORTS,
    STILL,
    SURFACES,
    THIRD_PERSON,
    UNREAL,
    word_set,
)
from mm_gpt.datasets.samples import QuestionAnswer


@dataclass(frozen=True)
class _Mention:
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
class _Caption:
    tokens: tuple[str, ...]
    mentions: tuple[_Mention, ...]

    def animate(self) -> list[_Mention]:
        return [m for m in self.mentions if m.name in ANIMATE and m.surface not in PRONOUNS]


def _parse(text: str) -> _Caption:
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
    return _Caption(tokens, tuple(mentions))


def _mention(tokens: tuple[str, ...], head: int, end: int) -> _Mention:
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
    return _Mention(
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


def derive_questions(captions: Sequence[str], rng: random.Random, *, max_questions: int) -> list[QuestionAnswer]:
    """Up to `max_questions` questions that the captions of one image answer, of as many kinds as possible.

    The same captions, `max_questions` and state of `rng` give the same questions. "Is there a ...?" questions alternate
    between yes and no, starting with either at random, and stop when one of them has no candidate left.
    """
    parsed = [_parse(caption) for caption in _settle_bikes(captions)]
    kinds: list[list[QuestionAnswer]] = []
    if parsed:
        for rule in _RULES:
            found = list(rule(parsed, rng))
            if rule is not _presence:  # its order carries the balance
                rng.shuffle(found)
            kinds.append(found)
    rng.shuffle(kinds)
    chosen: list[QuestionAnswer] = []
    while any(kinds) and len(chosen) < max_questions:
        for kind in kinds:
            if kind and len(chosen) < max_questions:
                chosen.append(kind.pop(0))
    return chosen


def _settle_bikes(captions: Sequence[str]) -> list[str]:
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


def _ask(rng: random.Random, phrasings: str, answers: Iterable[str], **words: str) -> QuestionAnswer:
    """One of the phrasings (separated by |), filled in. The first answer is the answer."""
    question = rng.choice(phrasings.split("|")).format(**words)
    unique = tuple(dict.fromkeys(answers))
    return QuestionAnswer(question[0].upper() + question[1:], unique[0], unique)


def _related(name: str) -> set[str]:
    """`name`, what it is a kind of, what is a kind of it, and what people mix it up with."""
    related = {name, *NOUNS[name].parents}
    related |= {other for other, noun in NOUNS.items() if name in noun.parents}
    for group in SIMILAR:
        if name in group:
            related |= group
    return related


def _presence(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Is there a dog? No only for what no caption mentions or implies."""
    words = {token for caption in captions for token in caption.tokens}
    mentioned = {m.name for caption in captions for m in caption.mentions}
    votes = Counter(
        name for c in captions for name in {m.name for m in c.mentions if m.is_real and m.surface not in PRONOUNS}
    )
    needed = min(2, len(captions))
    present = [n for n in sorted(votes) if NOUNS[n].weight and votes[n] >= (needed if n in ANIMATE else 1)]
    if {"man", "woman"} <= mentioned or {"boy", "girl"} <= mentioned:
        together = any({"man", "woman"} <= names or {"boy", "girl"} <= names for names in _name_sets(captions))
        if not together:  # one figure that people see differently
            present = [n for n in present if n not in PEOPLE_NAMES]
    if any(votes[n] >= needed for n in PEOPLE_NAMES):
        present.append("person")
    # Captions rarely rule people out, so their "yes" is asked less often, and their "no" whenever it can be.
    present = [n for n in present if n not in PEOPLE_NAMES or rng.random() < (0.2 if n == "person" else 0.4)]
    blocked = set().union(*map(_related, mentioned)) if mentioned else set()
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
    weights = [_no_weight(name, categories) for name in absent]
    rng.shuffle(present)
    is_yes = rng.random() < 0.5
    while present and absent and any(weights):
        # A yes and a no together, so that neither outnumbers the other.
        no = rng.choices(range(len(absent)), weights)[0]
        pair = [(present.pop(), "yes"), (absent.pop(no), "no")]
        weights.pop(no)
        for name, answer in pair if is_yes else reversed(pair):
            yield _presence_question(name, answer, rng, captions)


def _no_weight(name: str, categories: set[str]) -> float:
    if name in PEOPLE_NAMES:
        return 10 * (NOUNS[name].weight or 200)
    return NOUNS[name].weight * (2 if categories & set(NOUNS[name].parents) else 1)  # a near miss is harder


def _presence_question(name: str, answer: str, rng: random.Random, captions: list[_Caption]) -> QuestionAnswer:
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
    picture = rng.choice(("photo", "picture", "image"))
    return _ask(rng, phrasings, [answer], x=name, ax=_with_article(name), xs=noun.plural, p=picture)


def _with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" and not name.startswith("uni") else "a ") + name


def _name_sets(captions: list[_Caption]) -> Iterator[set[str]]:
    return ({m.name for m in caption.mentions} for caption in captions)


def _only_one(name: str, captions: list[_Caption]) -> bool:
    """True if every caption that has the noun has it once and in the singular."""
    if name in ANIMATE and any({"another", "other", "others", "both", "each"} & set(c.tokens) for c in captions):
        return False
    kin = {name, *NOUNS[name].parents} & ANIMATE | {name}
    for caption in captions:
        found = [m for m in caption.mentions if m.name == name]
        if any(m.is_plural for m in caption.mentions if m.name in kin) and name not in _PAIRS:
            return False
        if sum(m.determiner in ("a", "an", "one", "another", "") or m.number is not None for m in found) > 1:
            return False
    return True


_PAIRS = {n for n, noun in NOUNS.items() if noun.plural == n}


def _colours(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What colour is the dog? Only one dog, and nobody names another colour."""
    for name in sorted(set().union(*_name_sets(captions))):
        if name in PEOPLE_NAMES or name in _UNCOLOURED or set(NOUNS[name].parents) & {"garment"}:
            continue
        named = {m.colours for c in captions for m in c.mentions if m.name == name and m.colours}
        if len({tuple(sorted(c)) for c in named}) == 1 and _only_one(name, captions):
            yield _colour_question(rng, f"the {name}", "is", sorted(named)[0])


def _colour_question(rng: random.Random, thing: str, verb: str, colours: tuple[str, ...]) -> QuestionAnswer:
    phrasings = "what colour {v} {x}?|what color {v} {x}?|what is the colour of {x}?|what is the color of {x}?"
    return _ask(rng, phrasings, [" and ".join(dict.fromkeys(colours))], x=thing, v=verb)


_UNCOLOURED = {
    "animal",
    "snow",
    "water",
    "stick",
    "flower",
    "leaf",
    "tree",
    "building",
    "wall",
    "rock",
    "glass",
    "light",
}


def _clothes(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What colour is the man's shirt? From "a man in a red shirt"."""
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
    asked: dict[str, list[str]] = {}
    for wearer_name, name in sorted(worn):
        if not _only_one(wearer_name, captions):
            continue
        thing = NOUNS[name].plural if name in _PAIRS else name
        asked.setdefault(wearer_name, []).append(thing)
        named = {m.colours for c in captions for m in c.mentions if m.name == name and m.colours}
        plain = all(m.is_plural == (name in _PAIRS) for c in captions for m in c.mentions if m.name == name)
        if len({tuple(sorted(c)) for c in named}) == 1 and plain and _only_one(name, captions):
            verb = "are" if name in _PAIRS else "is"
            yield _colour_question(rng, f"the {wearer_name}'s {thing}", verb, sorted(named)[0])
    for wearer_name, things in asked.items():
        yield _ask(rng, "what is the {x} wearing?", things, x=wearer_name)


def _counts(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """How many dogs are there? Every caption that tells must tell the same."""
    words = {token for caption in captions for token in caption.tokens}
    needed = min(2, len(captions))
    if words & {"another", "other", "others", "third", "several", "many", "some", "few"}:
        return
    phrasings = (
        "how many {xs} are there?|how many {xs} are in the {p}?|how many {xs} can you see?|how many {xs} are visible?"
    )
    counted: dict[str, int] = {}
    for name in sorted(set().union(*_name_sets(captions))):
        if name not in ANIMATE or name in ("person", "animal"):
            continue
        votes: list[int | None] = []
        for caption in captions:
            found = [m for m in caption.mentions if m.name == name]
            kin = [m for m in caption.mentions if m.name in _related(name) - {name} and m.name in ANIMATE]
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
    for name, count in counted.items():
        if count > 1 or rng.random() < 0.15:  # else nine answers in ten are 1
            yield _ask(rng, phrasings, [str(count)], xs=NOUNS[name].plural, p=rng.choice(("photo", "picture", "image")))


def _count(mentions: list[_Mention]) -> int | None:
    mention = mentions[0]
    if not mention.is_real or (mention.is_plural and mention.number is None):
        return None
    return mention.number or (1 if mention.determiner in ("a", "an", "one", "") else None)


def _actions(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What is the dog doing? From captions that start with the dog and name nobody else."""
    done: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for caption in captions:
        subject = _subject(caption, may_have_animal=True)
        if subject:
            action = _action(caption, subject)
            if action:
                done.setdefault((subject.name, subject.is_plural), []).append(action)
    for (name, is_plural), actions in sorted(done.items()):
        if (name, not is_plural) in done or (not is_plural and not _only_one(name, captions)):
            continue
        counted = Counter(short for short, _ in actions)
        if len({short in STILL for short in counted}) > 1 and len(set(counted.values())) == 1:
            continue  # one saw it stand, one saw it run
        best = max(counted, key=lambda short: (counted[short], short not in STILL))
        answers = [best, *(long for short, long in actions if short == best and long), *counted]
        noun, verb = (NOUNS[name].plural, "are") if is_plural else (name, "is")
        yield _ask(rng, "what {v} the {x} doing?|what {v} the {x} doing in the {p}?", answers, x=noun, v=verb,
                   p=rng.choice(("photo", "picture", "image")))  # fmt: skip


def _subject(caption: _Caption, *, may_have_animal: bool = False) -> _Mention | None:
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


def _action(caption: _Caption, subject: _Mention) -> tuple[str, str] | None:
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


def _riding(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What is the man riding? What is the dog holding in its mouth? What sport is this?"""
    found: dict[tuple[str, str], list[str]] = {}
    for caption in captions:
        subject = _subject(caption, may_have_animal=True)
        action = _action(caption, subject) if subject and not subject.is_plural else None
        if subject and action:
            verb, _, thing = action[0].partition(" ")
            if thing and verb in ("riding", "holding", "carrying", "chasing", "kicking", "throwing", "reading"):
                found.setdefault((subject.name, verb), []).append(thing)
    for (name, verb), things in sorted(found.items()):
        if _only_one(name, captions):
            yield _ask(rng, "what is the {x} {v}?", [t for t, _ in Counter(things).most_common()], x=name, v=verb)
    sports = {token for caption in captions for token in caption.tokens if token in SPORTS - {"frisbee"}}
    votes = [bool(sports & set(caption.tokens)) for caption in captions]
    played = {"player", "players", "playing", "plays", "game", "play"} & {t for c in captions for t in c.tokens}
    is_sure = len(sports) == 1 and sum(votes) >= min(2, len(captions)) and played
    if is_sure and not any("football" in caption.tokens for caption in captions):  # soccer to some, rugby to others
        yield _ask(rng, "what sport is being played?|what sport is this?|which sport is shown?", sports)


def _setting(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Indoors or outdoors? Two words for one and none for the other; most photos are outdoors, so those less often."""
    tokens = [set(caption.tokens) for caption in captions]
    outside, inside = (sum(bool(t & words) for t in tokens) for words in (OUTDOORS, INDOORS))
    needed = min(2, len(captions))
    if bool(outside) != bool(inside) and max(outside, inside) >= needed and (inside or rng.random() < 1 / 3):
        answer = "outdoors" if outside else "indoors"
        phrasings = (
            "is this indoors or outdoors?|is the {p} taken indoors or outdoors?|was this {p} taken inside or outside?"
        )
        question = _ask(rng, phrasings, [answer], p=rng.choice(("photo", "picture")))
        if "inside" in question.question:
            question = QuestionAnswer(question.question, answer[:-5] + "side", (answer[:-5] + "side", answer))
        yield question


def _where(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """Where is the dog? From "runs through the grass", in captions that name nobody else."""
    found: dict[tuple[str, bool], list[str]] = {}
    for caption in captions:
        subject = _subject(caption)
        if subject:
            places = [p for p in _places(caption) if p]
            if len(places) == 1:
                found.setdefault((subject.name, subject.is_plural), []).append(places[0])
    for (name, is_plural), places in sorted(found.items()):
        ranked = Counter(places).most_common()
        if (name, not is_plural) in found or ranked[0][1] < min(2, len(captions)):
            continue
        if is_plural or _only_one(name, captions):
            noun, verb = (NOUNS[name].plural, "are") if is_plural else (name, "is")
            yield _ask(rng, "where {v} the {x}?", [place for place, _ in ranked], x=noun, v=verb)


def _places(caption: _Caption) -> Iterator[str]:
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
    return sum(any(m.name in PEOPLE_NAMES for m in _parse(caption).mentions) for caption in captions)


def shows_animal(captions: Sequence[str]) -> bool:
    """Whether any caption mentions an animal, real or not."""
    return any(m.name in ANIMATE - PEOPLE_NAMES for caption in captions for m in _parse(caption).mentions)


def main_thing(captions: Sequence[str]) -> MainThing | None:
    """What most captions of one image begin with: somebody before something. None where they do not agree."""
    return _main_thing([_parse(caption) for caption in _settle_bikes(captions)])


def _main_thing(captions: list[_Caption]) -> MainThing | None:
    subjects = [subject for caption in captions if (subject := _first_named(caption)) is not None]
    needed = max(min(2, len(captions)), (len(captions) + 1) // 2)
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


def _first_named(caption: _Caption) -> _Mention | None:
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


def _main(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What is the main thing in the picture? Only people: of an animal, captions rarely tell which kind it is."""
    thing = _main_thing(captions)
    if thing is not None and thing.name in PEOPLE_NAMES:
        phrasings = "what is the main thing in the {p}?|what is the main subject of the {p}?|who is in the {p}?"
        yield _ask(rng, phrasings, [thing.word], p=rng.choice(("photo", "picture", "image")))


def _animal(captions: list[_Caption], rng: random.Random) -> Iterator[QuestionAnswer]:
    """What animal is in the picture? Only if it is one kind."""
    sets = list(_name_sets(captions))
    animals = sorted({n for names in sets for n in names if n != "animal" and "animal" in NOUNS[n].parents})
    if len(animals) == 1:
        mentions = [m for c in captions for m in c.mentions if m.name == animals[0]]
        if all(m.is_real for m in mentions) and sum(animals[0] in names for names in sets) >= min(2, len(captions)):
            phrasings = "what animal is in the {p}?|which animal is this?|what kind of animal is in the {p}?"
            if any(m.is_plural for m in mentions):
                phrasings = "what kind of animal is in the {p}?|what kind of animals are these?"
            yield _ask(rng, phrasings, [animals[0]], p=rng.choice(("photo", "picture", "image")))


_Rule = Callable[[list[_Caption], random.Random], Iterator[QuestionAnswer]]
_RULES: tuple[_Rule, ...] = (
    _presence, _colours, _clothes, _counts, _actions, _riding, _setting, _where, _animal, _main,
)  # fmt: skip
