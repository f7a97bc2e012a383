"""The table of ImageNet's classes, vision/imagenet_classes.tsv, from WordNet 3.0 and the class list that timm ships.

apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
python examples/make_imagenet_classes.py wordnet/usr/share/wordnet vision/imagenet_classes.tsv

From public data: the ids in the order of the classes (timm's list), all names of each synset and its hypernyms
(WordNet's data.noun). By hand: the column `plain`, which is edited in the table itself and kept, and the tables below.
"""

import argparse
import csv
from pathlib import Path

from mm_gpt.errors import MMGPTError
from mm_gpt.vision.imagenet import CLASSES, COLUMNS

# The kind that people name -> the synsets of WordNet below which it is used. The narrowest holds: a dog is no "animal".
# Of several that are equally narrow (a minivan is WordNet's car and its van) the first in this table holds.
KINDS = {
    "dog": "n02084071 dog, n02115335 wild dog",
    "cat": "n02121620 cat",
    "big cat": "n02127808 big cat, n02124623 wildcat",
    "wolf": "n02114100 wolf",
    "fox": "n02118333 fox",
    "bear": "n02131653 bear",
    "seal": "n02076196 seal",
    "whale": "n02062744 whale",
    "monkey": "n02484322 monkey",
    "ape": "n02470325 ape",
    "lemur": "n02496913 lemur",
    "elephant": "n02503517 elephant",
    "rabbit": "n02323902 leporid",
    "rodent": "n02329401 rodent",
    "horse": "n02374149 equine",
    "pig": "n02395003 swine",
    "cow": "n02402425 cattle",
    "buffalo": "n02407959 Old World buffalo",
    "sheep": "n02411705 sheep",
    "goat": "n02416519 goat",
    "antelope": "n02419796 antelope",
    "kangaroo": "n01877134 kangaroo",
    "animal": "n01861778 mammal, n00015388 animal",
    "bird": "n01503061 bird",
    "fish": "n02512053 fish",
    "shark": "n01482330 shark",
    "snake": "n01726692 snake",
    "lizard": "n01674464 lizard",
    "reptile": "n01696633 crocodilian reptile",
    "dinosaur": "n01699831 dinosaur",
    "turtle": "n01662784 turtle",
    "frog": "n01639765 frog",
    "salamander": "n01629276 salamander",
    "spider": "n01772222 spider",
    "insect": "n02159955 insect",
    "butterfly": "n02274259 butterfly",
    "crab": "n01976957 crab",
    "crustacean": "n01974773 crustacean",
    "sea creature": "n01909422 coelenterate, n02316707 echinoderm, n01968315 cephalopod",
    "worm": "n01922303 worm",
    "fruit": "n07705931 edible fruit",
    "vegetable": "n07707451 vegetable",
    "bread": "n07679356 bread",
    "food": "n00021265 food",
    "dessert": "n07609840 dessert",
    "drink": "n07881800 beverage",
    "mushroom": "n12992868 fungus",
    "flower": "n11669921 flower",
    "nut": "n13135832 seed",
    "car": "n02958343 car",
    "truck": "n04490091 truck",
    "van": "n04520170 van",
    "bus": "n02924116 bus",
    "train": "n04468005 train, n03684823 locomotive, n02959942 car",
    "boat": "n02858304 boat, n04128837 sailing vessel",
    "ship": "n04194289 ship",
    "airplane": "n03510583 heavier-than-air craft",
    "aircraft": "n02686568 aircraft",
    "bicycle": "n02834778 bicycle",
    "motorcycle": "n03790512 motorcycle",
    "cart": "n03484083 handcart, n02970849 cart",
    "sled": "n04235291 sled",
    "vehicle": "n04524313 vehicle",
    "hat": "n03502509 headdress",
    "helmet": "n03513376 helmet, n03513137 helmet",
    "clothes": "n03051540 clothing, n03419014 garment, n03540267 hosiery",
    "tie": "n03815615 necktie",
    "knife": "n03623556 knife",
    "glasses": "n04272054 spectacles",
    "jewelry": "n03597469 jewelry",
    "mask": "n03724870 mask, n03725035 mask",
    "armor": "n02739668 armor, n02740764 armor plate",
    "bag": "n02773037 bag",
    "bottle": "n02876657 bottle",
    "jug": "n03603722 jug",
    "cup": "n03797390 mug",
    "glass": "n03438257 glass",
    "bowl": "n02880940 bowl",
    "pot": "n03991062 pot, n03990474 pot",
    "pan": "n03880531 pan",
    "kitchen tool": "n03621049 kitchen utensil, n03848348 opener",
    "kitchen appliance": "n03620052 kitchen appliance",
    "appliance": "n03528263 home appliance",
    "furniture": "n03405725 furniture",
    "chair": "n03001627 chair",
    "table": "n04379243 table",
    "bed": "n02818832 bed, n02766320 baby bed",
    "lamp": "n03636248 lamp, n03636649 lamp",
    "clock": "n04437953 timepiece",
    "computer": "n03082979 computer",
    "phone": "n04401088 telephone",
    "camera": "n02942699 camera",
    "electronics": "n03278248 electronic equipment",
    "tool": "n04451818 tool, n03154446 cutting implement",
    "musical instrument": "n03800933 musical instrument",
    "ball": "n02778669 ball",
    "sports equipment": "n04285146 sports equipment",
    "gun": "n03467984 gun",
    "weapon": "n04565375 weapon",
    "house": "n03546340 housing",
    "building": "n02913152 building, n04079244 residence",
    "shop": "n04202417 shop",
    "bridge": "n02898711 bridge",
    "fence": "n03327234 fence",
    "monument": "n03743902 memorial, n03074380 column",
    "roof": "n04105068 roof",
    "pen": "n03906997 pen",
    "box": "n02883344 box",
    "basket": "n02801938 basket",
    "container": "n03094503 container",
    "cloth": "n03932670 piece of cloth, n03309808 fabric",
    "rug": "n03366823 floor cover",
    "curtain": "n03151077 curtain, n04589190 window blind",
    "cosmetics": "n04447443 toiletry",
    "machine": "n03699975 machine",
    "measuring instrument": "n03733925 measuring instrument",
    "person": "n00007846 person",
    "coast": "n09433442 shore, n09409512 ridge",
    "mountain": "n09359803 mountain",
    "toy": "n03964744 plaything",
}

# Where WordNet knows no such kind, or not the one that people name: the plain words. "" is for what has none.
KINDS_BY_HAND = {
    "fossil": "trilobite",
    "shell": "conch, chiton, nautilus",
    "sea creature": "sea slug, dugong",
    "bug": "tick, centipede, isopod, scorpion",
    "crab": "hermit crab",
    "spider": "daddy longlegs",
    "elephant": "elephant",
    "sheep": "bighorn sheep",
    "buffalo": "bison",
    "bear": "panda",
    "clothes": "cloak, bib",
    "belt": "seat belt, buckle",
    "hair": "wig",
    "decoration": "Christmas stocking",
    "bag": "wallet",
    "weapon": "holster, scabbard, missile",
    "shoe": "clog, cowboy boot, loafer, running shoe, sandal",
    "optical instrument": "binoculars, magnifying glass",
    "telescope": "radio telescope",
    "camera": "lens cap",
    "medical equipment": "Band-Aid, crutch, neck brace, stethoscope, stretcher, syringe",
    "mask": "oxygen mask",
    "railing": "banister",
    "tower": "lighthouse, bell tower, water tower",
    "beehive": "beehive, honeycomb",
    "house": "birdhouse, mobile home",
    "tent": "tent, yurt",
    "stationery": "ring binder, envelope, pencil sharpener, eraser, pencil case, ruler",
    "lid": "bottle cap, manhole cover",
    "wall": "breakwater, dam, stone wall",
    "pier": "dock, pier",
    "tool": "broom, mop, tool kit, paintbrush, spindle, thimble",
    "car part": "car mirror, disc brake, car grille, oil filter, car wheel",
    "ride": "carousel",
    "building": "castle, sawmill, prison, dome",
    "hardware": "chain, hook, nail, screw, safety pin, combination lock, padlock",
    "rope": "knot",
    "machine": (
        "construction crane, gas pump, guillotine, typewriter, photocopier, lawn mower, parking meter, pottery wheel"
    ),
    "platform": "oil rig, stage",
    "stick": "matchstick",
    "musical instrument": "drumstick",
    "appliance": "electric fan, hair dryer, heater, radiator",
    "kitchen appliance": "stove, refrigerator, dishwasher",
    "fireplace": "fireplace screen",
    "pole": "flagpole, maypole, pole",
    "water": "fountain, geyser, lake",
    "shop": "grocery store",
    "computer equipment": "hard disk, computer mouse, keyboard, printer",
    "screen": "computer monitor, television",
    "puzzle": "jigsaw puzzle, crossword, maze",
    "toy": "pinwheel",
    "lamp": "lampshade",
    "light": "candle, spotlight, torch, traffic light",
    "pumpkin": "jack-o'-lantern",
    "electronics": "speaker, microphone, remote control, radio, projector, cassette",
    "measuring instrument": "compass",
    "calculator": "slide rule, abacus",
    "sports equipment": "paddle, snorkel, ski, hockey puck, tennis racket, punching bag, fishing reel",
    "vehicle": "tank",
    "stand": "pedestal, tripod",
    "bedding": "pillow, quilt",
    "sign": "scoreboard, street sign, plaque",
    "door": "shoji screen, sliding door",
    "gate": "turnstile",
    "kitchen tool": (
        "strainer, cocktail shaker, ladle, measuring cup, salt shaker, wooden spoon, mortar and pestle, tray"
    ),
    "pot": "crock pot, Dutch oven",
    "window": "window screen",
    "airplane": "airplane wing",
    "book": "comic book, book cover",
    "rock": "cliff",
    "coast": "headland",
    "landscape": "valley",
    "sea": "coral reef",
    "nut": "acorn",
    "fruit": "rose hip",
    "vegetable": "corn",
    "flower": "rapeseed, thistle",
    "mushroom": "mushroom",
    "food": "mashed potatoes, meat loaf",
    "paper": "toilet paper, paper towel",
    "grass": "hay",
    "bathroom fixture": "toilet, sink, bathtub",
    "jug": "pitcher",
    "cup": "cup",
    "train": "tram",
    "motorcycle": "scooter",
    "bicycle": "tricycle, unicycle",
    "car": "go-kart",
    "truck": "snowplow",
    "spacecraft": "space shuttle",
    "room": "home theater",
    "boat": "paddle wheel",
    "": "bubble, website, menu",
    "cloth": "towel",
    "furniture": "park bench",
    "table": "dining table",
    "glasses": "sunglasses",
    "container": "barrel, beaker, Petri dish",
    "van": "minivan",
}


def read_nouns(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """WordNet's data.noun: the id of each synset -> its names, and the ids of its hypernyms.

    The format is that of wndb(5WN). Raises MMGPTError for a file that is something else.
    """
    nouns = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("  "):  # the licence, on top
            continue
        fields = line.split(" | ")[0].split()
        try:
            num_names = int(fields[3], 16)
            pointers = fields[5 + 2 * num_names :]
            if len(pointers) != 4 * int(fields[4 + 2 * num_names]):
                raise ValueError("pointers are missing")
        except (IndexError, ValueError):
            raise MMGPTError(f"{path}, line {number}: not a synset of WordNet's data.noun") from None
        names = [name.replace("_", " ") for name in fields[4 : 4 + 2 * num_names : 2]]
        above = [f"n{target}" for symbol, target in zip(pointers[::4], pointers[1::4], strict=True) if symbol[0] == "@"]
        nouns[f"n{fields[0]}"] = (names, above)
    return nouns


def ancestors(wnid: str, nouns: dict[str, tuple[list[str], list[str]]]) -> set[str]:
    """All hypernyms of a synset, the synset itself included."""
    found, waiting = set(), [wnid]
    while waiting:
        if (synset := waiting.pop()) not in found:
            found.add(synset)
            waiting.extend(nouns[synset][1])
    return found


def kind_of(wnid: str, plain: str, nouns: dict[str, tuple[list[str], list[str]]]) -> str:
    """The kind of a class: the one by hand, or the narrowest of KINDS above it; empty where there is none."""
    for kind, words in KINDS_BY_HAND.items():
        if plain in words.split(", "):
            return kind
    kinds = {entry.split(" ")[0]: kind for kind, entries in KINDS.items() for entry in entries.split(", ")}
    found = [synset for synset in kinds if synset in ancestors(wnid, nouns)]  # in the order of KINDS
    wider = {synset for other in found for synset in ancestors(other, nouns) - {other}}
    return next((kinds[synset] for synset in found if synset not in wider), "")


def check_kinds(nouns: dict[str, tuple[list[str], list[str]]]) -> None:
    """Raises MMGPTError where a synset of KINDS is not the one that its name says, or one by hand is no plain word."""
    for entry in ", ".join(KINDS.values()).split(", "):
        wnid, name = entry.split(" ", 1)
        if wnid not in nouns or name not in nouns[wnid][0]:
            raise MMGPTError(f"KINDS: {wnid} is not {name!r} in this WordNet; use version 3.0")
    plain = {entry.plain for entry in CLASSES}
    for word in ", ".join(KINDS_BY_HAND.values()).split(", "):
        if word not in plain:
            raise MMGPTError(f"KINDS_BY_HAND: {word!r} is the plain word of no class")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="the folder of WordNet's data.noun")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    from timm.data import ImageNetInfo  # takes seconds, and only this function needs it

    nouns = read_nouns(args.wordnet / "data.noun")
    check_kinds(nouns)
    plain = {entry.wnid: entry.plain for entry in CLASSES}
    rows = [
        (index, wnid, "; ".join(nouns[wnid][0]), plain[wnid], kind_of(wnid, plain[wnid], nouns))
        for index, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())
    ]
    with args.out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, "excel-tab", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None).writerows(
            [COLUMNS, *rows]
        )
    print(f"{len(rows):,} classes, {len({row[-1] for row in rows if row[-1]})} kinds in {args.out}")


if __name__ == "__main__":
    main()
