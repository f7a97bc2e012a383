"""Names of classes in sentences, and which of them exclude each other."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mm_gpt.vision.imagenet import ImageNetClass

NUM_ANIMALS = 398
"""ImageNet's first classes are the animals."""


def _words(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(";"))


PLURAL = _words(
    "binoculars; jeans; maracas; pajamas; panpipes; parallel bars; sunglasses; swimming trunks; mashed "
    "potatoes; clothes; "
    "glasses; cosmetics"
)
MASS = _words(
    "broccoli; cauliflower; corn; guacamole; ice cream; face powder; hair spray; lotion; sunscreen; perfume; "
    "velvet; wool; "
    "hay; dough; chocolate sauce; red wine; espresso; eggnog; soup; toilet paper; chain mail; rapeseed; coral; "
    "pasta carbonara; food; furniture; water; clothing; jewelry; equipment; bread; armor; fabric; pasta; paper; sports "
    "equipment; cloth; wine; coffee; dessert; land; meat; "
    "medical equipment; lab equipment; computer equipment; electronics; stationery; hardware; bedding; grass; "
    "hair; shelter"
)
# Kinds that one picture may be called by both names of.
RELATED = tuple(
    map(
        _words,
        (
            "bird; airplane; aircraft",
            "dog; wolf; fox",
            "fish; shark; sea creature",
            "insect; butterfly; bug; spider; arachnid; worm",
            "cat; big cat",
            "bear; rodent",
            "monkey; ape; lemur",
            "snake; lizard; turtle; reptile; dinosaur; salamander; frog; worm",
            "crab; crustacean; sea creature; shell; bug; fossil",
            "cow; buffalo; antelope",
            "sheep; goat; antelope",
            "horse; donkey; cart",
            "whale; shark; fish; seal; sea creature",
            "rodent; rabbit",
            "worm; snake; sea creature; shell; crab",
            "car; truck; van; bus; vehicle; cart; train; bicycle; motorcycle; military vehicle; car part; "
            "ride; machine; sled",
            "boat; ship; vehicle; pier; water; sea; coast",
            "airplane; aircraft; spacecraft; vehicle; weapon",
        ),
    )
)
# What stands in one picture with the other as a rule, or is a part of it.
TOGETHER = tuple(
    map(
        _words,
        (
            "desktop computer; computer monitor; keyboard; computer mouse; laptop; desk; computer; television; website",
            "refrigerator; stove; microwave; dishwasher; sink; dining table; plate of food",
            "plate of food; cheeseburger; hot dog; pizza; soup; mashed potatoes; burrito; guacamole; hot pot; "
            "meat loaf",
            "cup; coffee mug; espresso; soup bowl; teapot; saucer",
            "car wheel; car grille; sports car; convertible; car mirror; station wagon; race car; taxi; "
            "limousine; vintage "
            "car; jeep; minivan; pickup truck; seat belt; car; truck",
            "horse; horse cart; ox; ox cart; plow",
            "lake; boathouse; dock; canoe; pier; water; boat; mountain; valley; cliff; beach; sandbar; "
            "headland; breakwater",
            "church; bell tower; dome; altar; monastery; palace; castle; mosque; vaulted ceiling; building; tower",
            "orange; lemon; banana; apple; pineapple; grocery store; fruit",
            "bottle cap; soda bottle; beer bottle; wine bottle; water bottle; red wine; beer glass; goblet",
            "ski; ski mask; snowmobile; mountain; volcano",
            "bikini; swimsuit; swimming trunks; beach; sarong; sunscreen; sunglasses",
            "graduation cap; graduation gown",
            "suit; tie; bow tie; groom; gown",
            "bee; honeycomb; beehive; daisy; flower; insect",
            "corn; cauliflower; broccoli; cucumber; zucchini; bell pepper; cabbage; vegetable",
            "bookcase; library; bookstore; comic book; book",
            "tripod; camera; Polaroid camera; lens cap; projector",
            "couch; pillow; table lamp; lampshade; window shade; home theater; entertainment center; television; rug",
            "coral reef; coral; sea anemone; clown fish; angelfish; lionfish; starfish; sea urchin; scuba "
            "diver; sea cucumber",
        ),
    )
)


def is_plural(name: str) -> bool:
    return name in PLURAL


def with_article(name: str) -> str:
    """ "a dog", "an owl", but "jeans" and "broccoli"."""
    if name in PLURAL or name in MASS:
        return name
    word = name.lower()
    takes_an = word[0] in "aeiou" and not word.startswith(("uni", "eu", "one", "uke"))
    return f"{'an' if takes_an or word.startswith('hourglass') or name.startswith('RV') else 'a'} {name}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


class KindNames:
    """The names of the classes and their kinds: lower case where they are compared."""

    def __init__(self, classes: Sequence[ImageNetClass]) -> None:
        self._kinds: dict[str, str] = {}
        self._members: dict[str, list[str]] = defaultdict(list)
        self._also: dict[str, set[str]] = defaultdict(set)
        """What else a thing of this plain name is called, and the last word of that."""
        for own in classes:
            self._kinds.setdefault(own.plain, own.kind)
            if own.plain not in self._members[own.kind]:
                self._members[own.kind].append(own.plain)
            for name in (own.plain, own.kind, *own.names):
                self._also[own.plain] |= {name.lower(), name.lower().rpartition(" ")[2]}
        kinds = {classes[n].kind for n in range(NUM_ANIMALS)} - {"", "animal"}
        self._animal_kinds = sorted(kinds)
        things = {own.kind for own in classes[NUM_ANIMALS:]} - {""} - kinds
        self._vehicle_kinds = sorted(things & _words("car; truck; bus; train; boat; airplane; bicycle; motorcycle"))

    def of(self, plain: str) -> str:
        return self._kinds[plain]

    def members(self, kind: str) -> list[str]:
        """Plain names of a kind."""
        return self._members[kind]

    def are_apart(self, one: str, other: str) -> bool:
        """Whether a picture of `one` is surely none of `other`."""
        if one.lower() in self._also[other] or other.lower() in self._also[one]:
            return False
        return not any({one, other} <= group for group in TOGETHER)

    def absent(self, kind: str, seen: Iterable[str], is_animal: bool, rng: random.Random) -> str:
        """A kind that is surely not in a picture of `kind`, near it where there is one."""
        blocked = {kind, *seen}.union(*(group for group in RELATED if kind in group))
        candidates = [other for other in self._animal_kinds if other not in blocked]
        if not is_animal:
            candidates += [other for other in self._vehicle_kinds if other not in blocked] * 3
        return rng.choice(candidates)
