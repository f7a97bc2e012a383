"""The words that `caption_questions` knows: nouns and what they are kinds of, colours, places, actions.

Weights and choices come from reading Flickr8k's captions; the lists are short because every word in them was looked at.
"""

import re
from dataclasses import dataclass


def word_set(text: str) -> set[str]:
    return set(text.split())


# Nouns: `name` or `name/plural`, then other words for it in parentheses. A number is how many of 1000 photos show it
# (Flickr8k train): only such nouns are asked "Is there a ...?", and a "no" question draws them in proportion.
_ANIMALS = """
dog 234 (puppy, pup, greyhound, poodle, terrier, retriever, golden retriever, collie, german shepherd, dalmatian,
pitbull, pit bull, doberman, rottweiler, husky/huskies, bulldog, corgi, beagle, labrador, lab, pug, dachshund, canine,
doggy); cat 1 (kitten, kitty); horse 9 (pony, mare, stallion, bronco, foal); cow 3 (cattle/cattle, calf/calves,
ox/oxen); bull 3; sheep/sheep 2 (lamb); goat 0.5; bird 9 (seagull, gull, pigeon, parrot, eagle, hawk, owl, crane,
heron, pelican); duck 2 (mallard, duckling); goose/geese 1; swan 1; elephant 1; monkey 1 (ape, gorilla); camel 1; bear
0.5; tiger 0.5; lion 0.5; deer/deer 1; rabbit 0.5 (bunny); fox; wolf/wolves; turtle 0.5; dolphin; pig 0.5; zebra 0.5;
giraffe 0.5; snake 1; squirrel 0.5; chicken (rooster, hen); donkey (mule); llama; ferret; butterfly
"""
_PEOPLE = """
man/men 218 (guy, gentleman/gentlemen, businessman/businessmen, fisherman/fishermen, cowboy, policeman/policemen,
fireman/firemen, groom, father, dad, dude, male, grandfather, husband); woman/women 108 (lady, bride, mother, mom,
female, gal, businesswoman/businesswomen, grandmother, wife/wives, cheerleader); boy 104 (son, schoolboy); girl 102
(daughter, schoolgirl, ballerina); baby 8 (infant); child/children 80 (kid, toddler, youngster, youth)
"""
# Words for people whose sex and age they leave open.
_ANYONE = """
adult player surfer rider biker cyclist bicyclist skier snowboarder skateboarder skater climber hiker runner
racer swimmer diver dancer performer musician singer guitarist drummer worker athlete wrestler boxer fighter soldier
officer cop referee goalie catcher batter pitcher quarterback driver motorcyclist kayaker rower rollerblader jogger
walker pedestrian tourist teenager teen student friend couple crowd group team family audience spectator onlooker
bystander fan passenger owner artist vendor photographer cameraman clown pirate jockey gymnast acrobat teammate opponent
someone somebody everyone anyone others another hunter camper parent sibling brother sister twin trainer coach handler
civilian band orchestra class crew partner motocross bmxer parasailer paraglider wakeboarder waterskier
he she they him her his hers them himself herself themselves who human hand arm leg finger shoulder face
"""
_THINGS = """
vehicle: car 21 (jeep, taxi, suv, sedan, minivan, race car); truck 4 (pickup, pickup truck); bus/buses 2 (school
bus/school buses); train 4 (subway train, subway car, train car);
motorcycle 16 (motorbike, dirt bike, dirtbike, harley, moped);
bicycle 42 (bike, mountain bike, bmx bike, tricycle); boat 16 (canoe, kayak, sailboat, raft, ship, rowboat, speedboat);
airplane 1 (plane, helicopter, jet); scooter; wagon; sled; tractor; van; cart; carriage; wheelchair; stroller; unicycle;
atv; go-kart
sport: skateboard 24; surfboard 7; snowboard 6; ski; frisbee 11 (disc); ball 74 (tennis ball, soccer ball, basketball,
football, baseball, volleyball, soccerball, beach ball, rugby ball, golf ball); trampoline 2; tennis racket 3 (racket,
racquet); kite 0.5; hula hoop 0.5; bat (baseball bat); trophy; parachute; net; hoop; hurdle; paddle
furniture: couch/couches 4 (sofa); bed 5; bench/benches 9; table 10 (picnic table); chair 5; desk; shelf/shelves;
bathtub
object: guitar 6; umbrella 4; book 2; newspaper; camera; laptop 2; phone (cellphone, cell phone); microphone; balloon
2; tent 2; flag 6; ladder; cake 1; bottle; cup; cigarette; sword; toy; stick; rope; bucket; basket; box/boxes;
backpack; bag; leash/leashes; collar; tire; candle; drum; violin; mask; helmet; sign; hose; bone; blanket; towel;
pillow; plate; bowl; glass/glasses; log; pole; statue 5; fountain; bridge; fence; wall; building; house; swing; slide;
stairs/stairs; tree; flower; bush/bushes; rock; leaf/leaves; railing; ramp; pumpkin; snowball; lollipop; ice cream;
pizza; sandwich/sandwiches; apple; doll
"""
_GARMENTS = """
shirt (t-shirt, tee-shirt, tee shirt, t shirt); jacket; coat; sweater; sweatshirt (hoodie); hat; cap; dress/dresses;
skirt; vest; jersey; uniform; suit; scarf/scarves; swimsuit (bathing suit); bikini; wetsuit; costume; robe; tie; life
jacket; shorts/shorts; pants/pants; jeans/jeans; trunks/trunks; sunglasses/sunglasses; goggles/goggles;
overalls/overalls; tutu; tank top; bandanna; headband; apron; outfit; helmet
"""
# A place and what is said of somebody there.
PLACES = {
    **dict.fromkeys(("beach", "shore", "shoreline"), "on the beach"),
    **dict.fromkeys(("grass", "lawn"), "in the grass"),
    **dict.fromkeys(("field", "meadow"), "in a field"),
    **dict.fromkeys(("water", "ocean", "lake", "river", "sea", "pond", "stream", "surf", "creek"), "in the water"),
    **dict.fromkeys(("street", "road"), "on the street"),
    **dict.fromkeys(("woods", "forest"), "in the woods"),
    "snow": "in the snow",
    "sand": "in the sand",
    "pool": "in a pool",
    "park": "in a park",
    "sidewalk": "on the sidewalk",
    "kitchen": "in a kitchen",
    "yard": "in a yard",
    "backyard": "in a yard",
    "couch": "on a couch",
    "sofa": "on a couch",
    "bed": "on a bed",
    "bench": "on a bench",
    "trampoline": "on a trampoline",
    "swing": "on a swing",
    "rock": "on a rock",
    "track": "on a track",
    "stage": "on a stage",
    "restaurant": "in a restaurant",
    "gym": "in a gym",
    "bathtub": "in a bathtub",
}
OUTDOORS = word_set(
    "outside outdoors outdoor grass grassy beach snow snowy mountain mountains ocean sea lake river field "
    "street sidewalk "
    "road forest woods hill cliff sky tree trees sand park desert lawn yard sunset waves surfing surfer skier"
)
INDOORS = word_set(
    "indoors indoor kitchen bedroom bathroom couch sofa carpet carpeted gym gymnasium restaurant "
    "bathtub bed cafe "
    "office classroom hallway auditorium arena room living museum"
)
COLOURS = {
    w: w for w in word_set("black white brown red blue green yellow orange pink purple tan gray gold silver beige")
}
COLOURS |= {"grey": "gray", "golden": "gold", "maroon": "red", "turquoise": "blue", "navy": "blue"}
NUMBERS = {
    w: n for n, w in enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=2)
}
NUMBERS |= {str(n): n for n in range(2, 11)}
DETERMINERS = {
    "a",
    "an",
    "the",
    "one",
    "his",
    "her",
    "their",
    "its",
    "this",
    "that",
    "some",
    "another",
    "no",
    "several",
}
ADJECTIVES = word_set(
    "small large big little young old older elderly tall short long wet dirty furry fluffy shaggy hairy smiling happy "
    "light dark bright pale striped plaid wooden metal plastic middle-aged adult asian african american blond blonde "
    "bald bearded shirtless dressed colorful huge tiny cute beautiful lone single empty fast muddy spotted sandy rocky "
    "snowy grassy green-grassy open dry deep shallow sunny skinny fat lean muzzled leashed baby thick thin "
    "crowded busy "
    "long-haired short-haired dark-haired soccer football baseball basketball hockey tennis rugby toy swimming indoor "
    "outdoor city dirt paved public snow-covered leafy"
)
SPORTS = word_set("soccer tennis basketball baseball hockey volleyball rugby golf cricket lacrosse frisbee")
# Words that turn the noun before them into a description ("horse statue", "dog house"), and those that make
# the noun after them unreal.
HEADS = word_set(
    "statue house costume park race ride show suit gear sign rack lane track field court game player players team mask "
    "food treat toy ears ear collar leash pen trailer stop station driver riders rider owner walker event "
    "trail shop store "
    "stand bar competition show sculpture logo print painting head seat wheel handlebars lot wash door window hat rink "
    "hoop net club jersey uniform course arena stadium carriage sled cart ramp path bowl costumes stick line tracks "
    "trunks room shoes coach match practice helmet gloves fight riding racing jumping skating polo"
)
UNREAL = word_set(
    "toy stuffed fake plastic inflatable cardboard model paper carved painted like as no without not lego"
)
COLLECTIVE = word_set("couple crowd group team family audience band orchestra class crew others everyone people")
MASS = {"snow": 57.0, "water": 108.0}
PRONOUNS = word_set(
    "he she they him her his hers them himself herself themselves who someone somebody everyone anyone others another "
    "human hand arm leg finger shoulder face hands arms legs fingers shoulders faces"
)
# A word that makes "no" unsafe for these nouns even though they are not mentioned.
IMPLIED_BY = {
    "car": "street road traffic city parking highway vehicle intersection crosswalk driver race taxi lot "
    "driving drives",
    "truck": "street road traffic vehicle city highway fire construction driving",
    "bus": "street road traffic city stop",
    "bicycle": "cyclist biker bicyclist bmx rider biking cycling handlebars wheelie helmet motorcycle scooter street",
    "motorcycle": "biker motorcyclist motocross rider bike bikes wheelie racer atv bmx biking",
    "train": "station subway track tracks railroad platform",
    "boat": "surf surfer surfing surfs wave waves ocean sea lake river dock harbor paddle paddling kayaking "
    "rowing rapids rafting sailing wakeboarding pier raft",
    "airplane": "airport flying sky parachute",
    "skateboard": "skateboarder skateboarding skater skating ramp skate grind grinds grinding board rail "
    "skateboards trick",
    "surfboard": "surfer surfing surf surfs wave waves board ocean boogie bodyboard wakeboard surfers",
    "snowboard": "snowboarder snowboarding board skier snowboards snowboarders trick slope skiing skis",
    "frisbee": "disk disc toy object catch catches catching fetch frisbees something mouth ring dog dogs",
    "ball": "soccer football basketball baseball tennis volleyball rugby cricket golf lacrosse hockey softball "
    "bowling game "
    "player players team batter pitcher goalie toy object catch catches catching fetch playing play plays "
    "mouth juggling "
    "juggles bat court hoop something throwing throws dog dogs kick kicking kicks sport field snowball throw balls",
    "tennis racket": "tennis badminton court player",
    "couch": "room chair seat furniture living sitting lounge bed",
    "bed": "room bedroom sleeping sleeps asleep lying laying blanket pillow couch mattress",
    "bench": "sitting sits park seated sit street resting seat city",
    "table": "restaurant cafe room kitchen eating dinner food cake sitting drinking bar desk counter meal "
    "picnic market",
    "chair": "restaurant cafe room kitchen table seat sitting sits seated sit beach office lawn stool couch bench desk",
    "book": "reading reads read magazine newspaper paper library store writing school",
    "guitar": "band music musician musicians instrument playing plays guitarist concert stage performing sings singing",
    "umbrella": "rain raining parasol beach rainy patio cafe",
    "balloon": "party birthday parade festival carnival celebration",
    "flag": "parade protest stadium festival banner boat ship demonstration race flags kite ceremony",
    "tent": "camp camping festival market canopy camper fair",
    "kite": "flying parachute paraglider kites kitesurfing parasailing",
    "statue": "sculpture fountain monument museum figure statues snowman lion",
    "cake": "birthday party wedding dessert food eating table",
    "laptop": "computer office desk electronics",
    "trampoline": "bouncing bounces jumping jump flip air jumps bounce gymnast",
    "hula hoop": "hoop hoops hooping rings ring",
    "snow": "winter ice icy ski skis skier skiers skiing snowboarder snowboarding snowboard sled sledding mountain "
    "mountains white snowball snowy snowsuit snowmobile sledge igloo slope cold frozen snow-covered snowboarders hill",
    "water": "pool ocean lake river sea pond beach wave waves surf surfing surfer swim swims swimming swimmer boat wet "
    "splash splashing splashes sprinkler fountain puddle stream creek waterfall shore raft kayak canoe dock hose rain "
    "fishing rapids diving diver dive underwater bath bathtub wading drink drinking snow shower sand bridge spray mud "
    "island bay harbor pier coast cliff wetsuit swimsuit bikini wading wakeboard sprayed sprays squirt bottle rocks",
}
SIMILAR = [{"man", "boy", "baby", "child"}, {"woman", "girl", "baby", "child"}, {"duck", "goose", "swan", "bird"}]
SIMILAR += [{"cow", "bull"}, {"bicycle", "motorcycle"}, {"car", "truck", "bus"}, {"couch", "bed", "chair", "bench"}]
SIMILAR += [{"child", "boy", "girl", "baby"}, {"sheep", "goat"}, {"surfboard", "snowboard", "skateboard"}]

# Words of scenes in which these are often seen, and mentioned where they are.
LIKELY_WITH = {
    name: word_set(words)
    for name, words in {
        "dog": "grass field park yard collar leash lawn beach backyard animal cat",
        "cat": "dog couch floor animal bed",
        "horse": "field track racing race fence dirt grass cow cowboy animal farm rodeo",
        "cow": "field grass horse animal farm",
        "sheep": "field grass animal hill",
        "bird": "lake water sea beach flying animal tree fountain",
        "duck": "lake pond water river",
        "boat": "beach shore water swimming swim dock",
        "bicycle": "skateboard skateboarder trail dirt ramp woods path sidewalk helmet",
        "motorcycle": "dirt track race racing helmet car",
        "skateboard": "bicycle bmx railing concrete stairs scooter rollerblader",
        "surfboard": "beach water swimming sand",
        "snowboard": "snow snowy mountain sled winter",
        "bench": "sidewalk wooden tree building couple",
        "chair": "floor baby couple older",
        "table": "couple lady cup plate glasses",
        "car": "sidewalk building house bicycle motorcycle",
        "truck": "car dirt",
        "bus": "car sidewalk building",
        "tree": "park field yard",
        "ball": "jersey uniform field",
        "frisbee": "field park grass jumps leaps",
        "flag": "crowd building street",
        "umbrella": "street coat couple",
        "guitar": "microphone crowd stage",
    }.items()
}
# What is no picture of the first, close as it stands to it. People see sex and age differently, so few of them.
MISTAKEN_FOR = {
    "dog": "cat horse sheep goat fox wolf rabbit cow",
    "cat": "dog rabbit fox squirrel",
    "horse": "cow dog camel donkey deer",
    "cow": "horse sheep goat pig",
    "bird": "squirrel butterfly airplane kite",
    "sheep": "dog cow horse pig",
    "monkey": "dog cat bear",
    "man": "woman girl",
    "woman": "man boy",
    "boy": "girl woman",
    "girl": "boy man",
    "baby": "man woman",
    "child": "dog cat",
    "car": "bicycle boat train airplane",
    "boat": "car airplane train",
    "train": "boat airplane",
    "airplane": "boat bird train",
    "motorcycle": "car boat horse",
    "bicycle": "car boat horse",
}
# Of two colours in one family people may say either.
COLOUR_FAMILIES = [
    word_set("brown tan gold beige orange red yellow"),
    word_set("white beige silver gray tan yellow"),
    word_set("black gray silver brown blue"),
    word_set("blue purple green gray"),
    word_set("red pink orange purple"),
    word_set("yellow green orange gold"),
]
FURS = ["black", "brown", "white"]
"""Colours of animals that another one is mistaken for: nobody takes a dog for a green one."""
# What nobody does who does the first.
OPPOSED = {
    "running": "sleeping sitting swimming lying",
    "jumping": "sleeping sitting swimming lying",
    "walking": "sleeping sitting swimming lying",
    "standing": "running swimming sleeping sitting lying",
    "sitting": "running jumping swimming climbing walking standing",
    "lying": "running jumping standing walking swimming",
    "sleeping": "running jumping walking swimming eating",
    "swimming": "sleeping climbing walking skiing",
    "climbing": "swimming sleeping sitting skiing",
    "surfing": "sleeping skiing climbing sitting",
    "skiing": "swimming surfing sleeping sitting",
    "snowboarding": "swimming surfing sleeping sitting",
    "skateboarding": "swimming surfing sleeping sitting",
    "dancing": "sleeping swimming sitting",
    "sliding": "sleeping swimming standing",
    "playing soccer": "sleeping swimming sitting",
}

_VERBS = word_set(
    "run jump sit stand walk sleep swim climb surf ski skate skateboard snowboard dance smile laugh slide "
    "swing leap dive "
    "fish sing crawl hike jog kneel pose fly wade rest dig bark lean crouch cry rollerblade wrestle fight paddle play "
    "read eat drink talk wait kayak juggle bike cycle sled lie yawn splash float scream shout"
)
_TRANSITIVE = word_set(
    "hold carry ride throw chase catch kick pull push hit chew bite climb read eat drink hug kiss lick fly"
)
_DOUBLING = word_set("run sit swim jog dig hug hit chat skip")
STILL = {"standing", "posing", "sitting", "lying", "sleeping", "resting"}


def _plural(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh)$", word) else "s")


def _ing(verb: str) -> str:
    if verb.endswith("ing"):
        return verb
    if verb == "lie":
        return "lying"
    if verb in _DOUBLING:
        return verb + verb[-1] + "ing"
    return (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"


@dataclass(frozen=True)
class _Noun:
    plural: str
    parents: tuple[str, ...]
    weight: float


def _read_lexicon() -> tuple[dict[str, _Noun], dict[tuple[str, ...], tuple[str, bool]]]:
    """Nouns by name, and (words of a surface form) -> (name, is plural)."""
    nouns: dict[str, _Noun] = {}
    surfaces: dict[tuple[str, ...], tuple[str, bool]] = {}

    def add(entry: str, parents: tuple[str, ...]) -> None:
        match = re.fullmatch(r"([a-z -]+)(?:/([a-z ]+))?(?: ([\d.]+))?(?: ?\((.*)\))?", " ".join(entry.split()))
        assert match, entry
        name, plural, weight, synonyms = match.groups()
        name = name.strip()
        nouns[name] = _Noun(plural or _plural(name), parents, float(weight or 0))
        for form in [f"{name}/{nouns[name].plural}", *(synonyms.split(",") if synonyms else ())]:
            one, _, many = form.strip().partition("/")
            surfaces.setdefault(tuple(one.split()), (name, one == many))
            surfaces.setdefault(tuple((many or _plural(one)).split()), (name, True))

    add("person/people", ())
    add("animal", ())
    for word in _ANYONE.split():
        surfaces[(word,)] = ("person", word in COLLECTIVE)
        if word not in PRONOUNS:
            surfaces[(_plural(word),)] = ("person", True)
    for table, parents in ((_ANIMALS, ("animal",)), (_PEOPLE, ("person",)), (_GARMENTS, ("garment",))):
        for entry in table.split(";"):
            name = entry.split()[0].partition("/")[0]
            add(entry, ("child", "person") if name in ("boy", "girl", "baby") else parents)
    for group in re.split(r"^(?=\w+: )", _THINGS.strip(), flags=re.MULTILINE):
        if group:
            parent, _, entries = group.partition(": ")
            for entry in filter(str.strip, entries.split(";")):
                add(entry, (parent,))
    for name, weight in MASS.items():
        nouns[name] = _Noun(name, (), weight)
    surfaces[("snow",)] = ("snow", False)
    surfaces[("water",)] = ("water", False)
    return nouns, surfaces


NOUNS, SURFACES = _read_lexicon()
LONGEST = max(len(words) for words in SURFACES)
ANIMATE = {
    name for name, noun in NOUNS.items() if name in ("person", "animal") or set(noun.parents) & {"person", "animal"}
}
PEOPLE_NAMES = {name for name in ANIMATE if name == "person" or "person" in NOUNS[name].parents}
THIRD_PERSON = {_plural(v): _ing(v) for v in sorted(_VERBS | _TRANSITIVE) if not v.endswith("ing")}
PARTICIPLES = {_ing(v) for v in _VERBS | _TRANSITIVE} | {"lying", "laying"}
OBJECT_ONLY = {_ing(v) for v in _TRANSITIVE - _VERBS}
MAY_TAKE_OBJECT = {_ing(v) for v in _TRANSITIVE} | {"playing"}
