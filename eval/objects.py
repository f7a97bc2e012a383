"""Unsupported objects: what a caption names that nothing else known of the photo mentions or implies.

Of each photo several people wrote a caption. An object that a model names and that none of them names, by this word
or another, nor implies, is unsupported. It may still be there, for people leave out much. So only things are checked
that people seldom leave out, clothes and backgrounds are not, and the same is measured of people: each photo's
captions in turn against its other ones.

To count named objects is the idea of CHAIR (Rohrbach et al. 2018, 1809.02156). This is not CHAIR, which knows the
objects that were outlined in COCO's images as well, and has COCO's 80 classes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_gpt.datasets.loading.caption_parsing import parse
from mm_gpt.datasets.loading.caption_words import HEADS, IMPLIED_BY, NOUNS, PRONOUNS, word_set
from mm_gpt.datasets.samples import Record
from mm_gpt.eval.base import ImageTask, RatioScore, Score
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.templates.prompts import CAPTION_PROMPT

# Of `caption_words`: what people who see it name. In the training captions of Flickr8k, at most three in
# ten mentions of each are unsupported by the photo's other captions, and two in a hundred of all; or it is rare there.
_NAMES = """
person, animal, man, woman, boy, girl, baby, child,
dog, cat, horse, cow, bull, sheep, goat, bird, duck, goose, swan, elephant, monkey, camel, bear, tiger, lion, deer,
rabbit, fox, wolf, turtle, dolphin, pig, zebra, giraffe, snake, squirrel, chicken, donkey, llama, ferret, butterfly,
car, truck, bus, train, motorcycle, bicycle, boat, airplane, scooter, sled, tractor, wheelchair, stroller, unicycle,
atv, go-kart, skateboard, surfboard, snowboard, frisbee, ball, trampoline, tennis racket, kite, hula hoop, parachute,
couch, bed, bench, table, chair, bathtub, guitar, umbrella, book, laptop, phone, microphone, balloon, tent, flag, cake,
bottle, cigarette, sword, statue, fountain, bridge, swing, slide, drum, violin, mask, ice cream, pizza, sandwich,
apple, lollipop, pumpkin, bucket, stick, snow, water
"""
# More things and places: name (other words for it): words of other captions that imply it or are often meant by it.
_MORE = """
skis (ski, skier, skiers, skiing): snowboard snowboarder snowboarding slope downhill
beach (beaches, shore, seashore, shoreline): lake river pond sand sandy ocean sea wave waves surf surfer coast surfing
  tide dune dunes
ocean (sea, waves, wave): beach surf surfs surfer surfers surfing surfboard shore lake river coast wakeboard
  wakeboarding boat splash tide kayak water
pool (pools, swimming pool, swimming pools): swim swims swimming swimmer diving dive dives underwater diver slide
  splash splashing fountain bath water
lake (lakes, river, rivers, pond, ponds, creek, stream): water ocean sea dock boat canoe kayak beach rapids fishing
  shore raft wet puddle marsh splashing waterfall
street (streets, road, roads, highway): city sidewalk car cars traffic crosswalk intersection pavement downtown curb
  alley town path bus truck parade race concrete cobblestone driveway track urban outside store corner building shop
  shops parking marathon walkway brick dirt paved trail bicyclist cyclist biker bike bikes bicycle motorcycle
kitchen (kitchens): cook cooks cooking stove oven counter food sink dishes refrigerator table bowl baking
restaurant (restaurants, cafe): table tables eating food dinner bar beer drinks menu meal coffee diner drinking
stage (stages): concert band perform performs performing performance performer singer sings microphone guitar show
  dancing dancers musicians musician auditorium audience
mountain (mountains, mountainside, mountaintop, cliff, cliffs): hill hills rock rocks rocky peak slope climb climbs
  climbing climber ski skier skiing snow snowy snowboarder hiker hikers hiking valley scenic canyon ridge ledge boulder
  desert
forest (forests, woods, jungle): tree trees wooded leaves path trail branch branches log woodland brush bushes foliage
  leafy
grass (lawn, field, fields, meadow, yard, backyard): park grassy green garden soccer football baseball outside ball
  hay weeds pasture hill ground hillside outdoors dirt trail path flowers game frisbee playground tree trees woods
  leaves bench bushes bush plants team players player
sand (dune, dunes): beach sandy desert shore ocean dirt sea volleyball
playground (playgrounds): slide swing swings monkey climbing play bars gym park equipment seesaw rope tire
rodeo (rodeos): bull horse bronco cowboy
ramp (ramps): skateboard skateboarder skate skating jump jumps bicycle bike bmx trick halfpipe stunt slope pipe board
  skateboarding scooter railing rail obstacle agility wooden ledge
tunnel (tunnels): tube agility obstacle
waterfall (waterfalls): falls river cascade stream
television (televisions, tv, tvs): screen monitor
computer (computers): laptop laptops screen keyboard monitor
piano (pianos): keyboard
saxophone (saxophones, trumpet, trumpets, tuba, accordion, flute): instrument instruments band music musician horn
suitcase (suitcases, luggage): bag bags
toothbrush (toothbrushes): brushing teeth
scissors (knife, knives): cutting cut cuts
banana (bananas): fruit
carousel (merry-go-round): ride carnival
roller coaster (roller coasters): ride amusement
"""
_BY_ROLE = {
    "surfboard": word_set("surfer surfers surfing surfs"),
    "skateboard": word_set("skateboarder skateboarders skateboarding skateboards"),
    "snowboard": word_set("snowboarder snowboarders snowboarding snowboards"),
}
"""Who is said to do it has the thing."""
_EITHER = dict.fromkeys(("bike", "bikes"), ("bicycle", "motorcycle"))
_CONFUSED = [{"man", "boy"}, {"woman", "girl"}, {"boy", "girl", "baby", "child"}, {"cow", "bull"}, {"sheep", "goat"}]
_CONFUSED += [{"duck", "goose", "swan"}, {"couch", "bed", "chair"}, {"car", "truck", "bus"}, {"donkey", "horse"}]
_CONFUSED += [{"sled", "snowboard", "skis"}, {"fox", "wolf", "dog"}, {"water", "ocean", "pool", "lake", "fountain"}]
_CONFUSED += [{"chair", "bench"}, {"duck", "bird"}, {"boy", "child"}, {"girl", "child"}]
"""What one person calls this and another that."""


@dataclass(frozen=True)
class Named:
    """An object that a text names."""

    names: tuple[str, ...]
    """Of `OBJECTS`; more than one where the word may mean either."""
    words: str
    """As the text says it."""
    is_many: bool
    is_real: bool
    """Not a toy, a statue or a part of another word ("dog house")."""


def _more() -> Iterator[tuple[str, tuple[str, ...], frozenset[str]]]:
    """Of each entry of `_MORE`: its name, its forms, what implies it."""
    for entry in re.split(r"\n(?=\w)", _MORE.strip()):
        match = re.fullmatch(r"([\w ]+) \(([^)]*)\):([\w\s-]*)", entry)
        assert match, entry
        name, forms, implied_by = match.groups()
        yield name, (name, *forms.split(", ")), frozenset(implied_by.split())


_CHECKED = frozenset(name.strip() for name in _NAMES.split(","))
_FORMS = {tuple(form.split()): name for name, forms, _ in _more() for form in forms}
_LONGEST = max(map(len, _FORMS))
_TOO_WEAK = word_set("dog dogs mouth play plays playing white")
"""In `IMPLIED_BY`, which is careful for another purpose: a dog implies no ball, and what is white is no snow."""
_IMPLIED_BY = {name: frozenset(words.split()) - _TOO_WEAK for name, words in IMPLIED_BY.items()}
_IMPLIED_BY["mask"] = frozenset(word_set("muzzle muzzles muzzled costume costumes goggles helmet painted makeup"))
_IMPLIED_BY["parachute"] = frozenset(
    word_set("parasail parasailing parasailer paraglider paragliding glider kite sail")
)
_IMPLIED_BY |= {name: implied_by | {w for form in forms for w in form.split()} for name, forms, implied_by in _more()}
OBJECTS: frozenset[str] = _CHECKED | frozenset(_FORMS.values())
"""What is checked, by name."""
assert NOUNS.keys() >= _CHECKED, _CHECKED - NOUNS.keys()


def named_objects(text: str, *, pronouns: bool = False) -> list[Named]:
    """The objects of `OBJECTS` that a text names, in its order. `pronouns`: "someone" and "his arm" name a person."""
    caption = parse(text)
    found: list[tuple[int, Named]] = []
    taken: set[int] = set()
    for m in caption.mentions:
        taken.update(range(m.head, m.end))
        if m.name in _CHECKED and (pronouns or m.surface not in PRONOUNS):
            found.append((m.head, Named(_EITHER.get(m.surface, (m.name,)), m.surface, m.is_plural, m.is_real)))
    at = 0
    while at < len(caption.tokens):
        for length in range(_LONGEST, 0, -1):
            words = caption.tokens[at : at + length]
            if words in _FORMS and taken.isdisjoint(range(at, at + length)):
                following = caption.tokens[at + length : at + length + 1]
                is_real = HEADS.isdisjoint(following)
                found.append((at, Named((_FORMS[words],), " ".join(words), False, is_real)))
                at += length - 1
                break
        at += 1
    for at, word in enumerate(caption.tokens):
        found += [(at, Named((name,), word, False, True)) for name, words in _BY_ROLE.items() if word in words]
    return [named for _, named in sorted(found, key=lambda each: each[0])]


class Known:
    """What is known of a photo: texts about it, such as people's captions and the names of its classes."""

    def __init__(self, texts: Iterable[str]):
        texts = list(texts)
        self._named = [named_objects(text, pronouns=True) for text in texts]  # kept apart, for `common`
        self._words = {word for text in texts for word in parse(text).tokens}
        mentions = [named for of_text in self._named for named in of_text]
        self._names = {name for named in mentions for name in named.names}
        self._many = {name for named in mentions if named.is_many for name in named.names}

    def supports(self, name: str) -> bool:
        """Whether any text names the object, a kind of it, something that is confused with it or implies it, or a
        broader thing that may be it: of "a man" and "someone", someone is the man, and no woman."""
        same = {name}.union(*(group for group in _CONFUSED if name in group))
        if any(other in same or name in _broader(other) for other in self._names):
            return True
        for broader in _broader(name):
            if broader in self._many:
                return True
            if broader in self._names and not any(broader in _broader(other) for other in self._names):
                return True
        return not self._words.isdisjoint(_IMPLIED_BY.get(name, ()))

    def unsupported(self, text: str) -> list[str]:
        """The words for unsupported objects in a text, each once."""
        found = [n.words for n in named_objects(text) if n.is_real and not any(map(self.supports, n.names))]
        return list(dict.fromkeys(found))

    def counts(self, text: str) -> tuple[int, int]:
        """How many objects a text names, and how many of these are unsupported."""
        named = {n.names: n for n in named_objects(text) if n.is_real}
        return len(named), sum(not any(map(self.supports, names)) for names in named)

    def common(self) -> set[str]:
        """The objects that at least half of the texts name."""
        each = [{name for named in of_text if named.is_real for name in named.names} for of_text in self._named]
        return {name for name in self._names if 2 * sum(name in names for names in each) >= len(each)}


def _broader(name: str) -> tuple[str, ...]:
    return tuple(parent for parent in NOUNS[name].parents if parent in OBJECTS) if name in NOUNS else ()


@dataclass(frozen=True)
class _Share(RatioScore):
    """A share of what captions name; 0 where they name nothing."""

    @property
    def score(self) -> float:
        return float(_ratio(self.totals.sum(), self.weights.sum()))

    @property
    def per_item(self) -> np.ndarray:
        return _ratio(self.totals, self.weights)

    def resampled(self, indices: np.ndarray) -> np.ndarray:
        totals, weights = np.bincount(self.groups, self.totals), np.bincount(self.groups, self.weights)
        return _ratio(totals[indices].sum(axis=1), weights[indices].sum(axis=1))


def _ratio(totals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.divide(totals, weights, out=np.zeros_like(totals, dtype=np.float64), where=weights > 0)


class UnsupportedObjects(ImageTask):
    """Of one caption for each photo: how many captions, and how many of the objects that they name, are unsupported.

    Beside it, of the objects that most people name, the share that the caption names or implies: to say less is no way
    to do well. The baseline is people's: each caption of a photo against its others. These are one fewer than what a
    model's caption is held against, which favours the model a little.
    """

    name = "unsupported_objects"
    num_beams = 3
    max_new_tokens = 40
    lower_is_better = True

    def generation(self) -> GenerationConfig:
        return self.assistant.caption_config(self._options())

    @classmethod
    def _asked(cls, record: Record) -> list[tuple[str, str, dict[str, Any]]]:
        if len(record.captions) < 2:
            return []
        return [("", CAPTION_PROMPT, {"references": list(record.captions)})]

    @classmethod
    def _texts(cls, record: Record) -> list[tuple[str, ...]]:
        return [record.captions]

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
        return object_scores([row["prediction"] for row in rows], [row["references"] for row in rows])

    def baselines(self) -> dict[str, tuple[str, dict[str, Score]]]:
        """What people write, each photo's captions in turn against its others."""
        texts, known, groups = [], [], []
        for instance in self.instances:
            references = instance.row["references"]
            for number, text in enumerate(references):
                texts.append(text)
                known.append([*references[:number], *references[number + 1 :]])
                groups.append(instance.group)
        return {"people": ("each caption against the photo's others", object_scores(texts, known, groups))}


def object_scores(
    captions: Sequence[str], known: Sequence[Sequence[str]], groups: Sequence[int] | None = None
) -> dict[str, Score]:
    """The metrics of `UnsupportedObjects`. `known`: the texts about each caption's photo; `groups`: the number of its
    photo from 0 on, which the bootstrap draws; where it is not given, each caption has its own photo."""
    evidence = [Known(texts) for texts in known]
    counts = np.array([each.counts(text) for each, text in zip(evidence, captions, strict=True)], dtype=np.float64)
    named, unsupported = counts.reshape(-1, 2).T
    common = [each.common() for each in evidence]
    covered = [sum(map(Known([text]).supports, names)) for text, names in zip(captions, common, strict=True)]
    of = np.arange(len(captions)) if groups is None else np.array(groups)
    return {
        "captions": RatioScore((unsupported > 0).astype(np.float64), np.ones(len(captions)), of),
        "objects": _Share(unsupported, named, of),
        "coverage": _Share(np.array(covered, dtype=np.float64), np.array([float(len(c)) for c in common]), of),
    }
