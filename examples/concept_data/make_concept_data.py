"""Write training data for a model with concepts: what to say of class scores, and when to trust them.

    python examples/concept_data/make_concept_data.py DATA OUT

`OUT/classes.tar` has records without an image for each of ImageNet's 1,000 classes: scores as the classifier might give
them, with questions and captions whose answers hold whatever such a picture shows. So the model learns to say words
that no caption of its photos has. `OUT/photos.tar` has the training photos of DATA, with questions whose answers the
photo's captions and the trunk's scores agree on (see `concept_photos.py`). The same seed gives the same bytes.
"""

import argparse
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from concept_photos import photo_records
from concept_words import NUM_ANIMALS, KindNames, capital, is_plural, with_article
from torch import Tensor
from tqdm import tqdm
from trunk_scores import Trunk

from mm_gpt.system.writing import whole_file
from mm_gpt.vision.imagenet import CLASSES

LISTED = 10
"""Names with scores in a record."""
CAPTIONS = (
    *("{A}.", "{A}.", "A close-up of {a}.", "A photo of {a}.", "A picture of {a}.", "{This} {a}."),
    *("A close-up photo of {a}.", "{There} {a} in the picture.", "{A} in a photo.", "The photo shows {a}."),
    "{A} can be seen in the picture.",
)  # fmt: skip
ANIMAL_CAPTIONS = (*CAPTIONS, "{A} looks at the camera.", "{A} is looking at something.", "{A} up close.")
UNSURE = 0.4
"""Below this top score a caption may say the kind instead of the name."""


def simulated_scores(target: int, nearness: Tensor, rng: random.Random) -> dict[str, float]:
    """Probabilities by plain name, the target's the highest. The rest goes to what looks like it, a little anywhere.

    `nearness`: cosines (1000,) of the classifier's rows with the target's.
    """
    top = 0.25 + 0.74 * rng.betavariate(1.8, 1.0)
    left = (1 - top) * rng.uniform(0.6, 0.95)  # what remains is spread over all classes: too little to be listed
    order = [index for index in torch.argsort(nearness, descending=True).tolist() if index != target][:14]
    weights = {index: 2.718 ** (float(nearness[index]) / 0.1) * rng.gammavariate(0.6, 1.0) for index in order}
    if rng.random() < 0.3:  # something else in the picture, or a mistake
        weights[rng.choice([n for n in range(len(CLASSES)) if n != target])] = rng.random() * max(weights.values())
    total = sum(weights.values())
    scores = {index: left * weight / total for index, weight in weights.items()}
    merged: Counter[str] = Counter({CLASSES[target].plain: top})
    for index, score in scores.items():
        merged[CLASSES[index].plain] += min(score, 0.9 * top)
    own = merged[CLASSES[target].plain]
    limited = {
        name: value if name == CLASSES[target].plain else min(value, 0.9 * own) for name, value in merged.items()
    }
    best = sorted(limited.items(), key=lambda item: (-item[1], item[0]))[:LISTED]
    return {name: round(min(value, 1.0), 4) for name, value in best if value >= 0.003}


def class_record(target: int, nearness: Tensor, rng: random.Random) -> dict[str, Any]:
    """What a record without an image says: `{"concepts", "captions", "qa"}`."""
    own = CLASSES[target]
    scores = simulated_scores(target, nearness, rng)
    top = scores[own.plain]
    said = own.plain
    if top < UNSURE and own.kind and rng.random() < 0.5:
        mass = sum(score for name, score in scores.items() if KINDS.of(name) == own.kind)
        said = own.kind if mass > 1.3 * top else said
    is_animal = target < NUM_ANIMALS
    forms = ANIMAL_CAPTIONS if is_animal and own.kind not in ("sea creature", "shell", "worm", "fossil") else CAPTIONS
    captions = [_caption(form, said) for form in rng.sample(forms, 2)]
    return {"concepts": scores, "captions": captions, "qa": list(_questions(target, scores, is_animal, rng))}


def _caption(form: str, name: str) -> str:
    """Plural names have plural verbs."""
    phrase = with_article(name)
    this, there = ("These are", "There are") if is_plural(name) else ("This is", "There is")
    text = form.format(a=phrase, A=capital(phrase), This=this, There=there)
    if is_plural(name):
        text = text.replace(" looks at ", " look at ").replace(" is looking ", " are looking ")
    return text


def _questions(target: int, scores: dict[str, float], is_animal: bool, rng: random.Random) -> Iterator[dict[str, str]]:
    name, kind = CLASSES[target].plain, CLASSES[target].kind
    photo = rng.choice(("picture", "picture", "photo", "image"))
    these = is_plural(name)
    yield _pair("What is the main thing in the picture?", name)
    others = [f"What is the main thing in this {photo}?", f"What is the main subject of the {photo}?"]
    others += ["What are these?", "What are they?"] if these else ["What is this?", "What is it?", "What's this?"]
    naming = [_pair(rng.choice(others), name)]
    if is_animal:
        general = kind if kind in ("dog", "cat") else name
        naming.append(_pair(rng.choice((f"What animal is in the {photo}?", "What animal is this?")), general))
        if kind and kind != name and kind != "animal":
            naming.append(_pair("What kind of animal is this?", kind))
    else:
        naming.append(_pair(rng.choice((f"What object is in the {photo}?", "What object is this?")), name))
    if kind and kind != name and kind not in ("animal", "water", "person", "hair"):
        asked = f"What kind of {kind} are these?" if these else f"What kind of {kind} is this?"
        asked = asked.replace("clothes", "clothing")
        naming += [_pair(asked, name), _pair(asked, name)]
    yield from rng.sample(naming, 2)
    wrong = [other for other in scores if other != name and KINDS.are_apart(other, name)]
    same_kind = (
        [other for other in KINDS.members(kind) if other != name and KINDS.are_apart(other, name)] if kind else []
    )
    hard = wrong[:2] + rng.sample(same_kind, min(2, len(same_kind)))
    if hard:
        other = rng.choice(hard)
        is_this = "Are these" if these else "Is this"
        yes_no = [_pair(f"{is_this} {with_article(name)}?", "yes"), _pair(f"{is_this} {with_article(other)}?", "no")]
        rng.shuffle(yes_no)
        yield from yes_no
        if rng.random() < 0.3:
            first, second = rng.sample([name, other], 2)
            yield _pair(f"{is_this} {with_article(first)} or {with_article(second)}?", name)
    if kind and kind != "animal" and rng.random() < 0.6:
        absent = KINDS.absent(kind, [KINDS.of(other) for other in scores], is_animal, rng)
        pairs = [(kind, "yes"), (absent, "no")]
        forms = rng.choice(("Is there {} in the {}?", "Can you see {} in the {}?"))
        for what, answer in rng.sample(pairs, 2):
            form = forms.replace("Is", "Are") if is_plural(what) else forms
            yield _pair(form.format(with_article(what), photo), answer)


def _pair(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


KINDS = KindNames(CLASSES)


def class_records(per_class: int, seed: int, cosines: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, values), the classes mixed."""
    places = [(target, number) for target in range(len(CLASSES)) for number in range(per_class)]
    random.Random(seed).shuffle(places)
    for target, number in tqdm(places, desc="classes", unit=" records"):
        rng = random.Random(f"{seed}/class/{target}/{number}")
        yield f"class{target:04d}_{number:02d}", class_record(target, cosines[target], rng)


def write_tar(path: Path, records: Iterable[tuple[str, dict[str, Any], bytes | None]]) -> Counter[str]:
    """`key.jpg`, where there is an image, and `key.json` of each record; how many of what it holds."""
    counts: Counter[str] = Counter()
    with whole_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, values, image in records:
            data = json.dumps(values, ensure_ascii=False).encode()
            for name, content in ((f"{key}.jpg", image), (f"{key}.json", data)):
                if content is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            counts["records"] += 1
            counts["captions"] += len(values.get("captions", ()))
            counts["questions"] += len(values["qa"])
            counts.update(pair["answer"] for pair in values["qa"] if pair["answer"] in ("yes", "no"))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-class", type=int, default=6, help="records for each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    trunk = Trunk()
    classes = class_records(args.per_class, args.seed, trunk.neighbours())
    print("classes.tar:", _told(write_tar(args.out / "classes.tar", ((key, values, None) for key, values in classes))))
    photos = photo_records(args.data, args.out / ".scores", trunk, args.seed)
    print("photos.tar:", _told(write_tar(args.out / "photos.tar", photos)))


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


if __name__ == "__main__":
    main()
