"""Pages of generated pictures with what is said about them: interleaved documents that never run out.

    python examples/scaling/picture_pages.py PAGES --pages 20000

writes `PAGES/train` and `PAGES/held_out`, corpora for `mm-gpt train`, and `PAGES/questions.jsonl`, held-out pictures
each with a question of one word's answer. A picture is 36 × 36 pixels of three by three cells, with one to four things
in it. Colours and shapes are as rare as words are (Zipf 1949): the common ones are learned early, the rare ones late,
so that the loss falls little by little instead of all at once (2303.13506).
"""

import argparse
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw

from mm_gpt.datasets.building.shards import ShardWriter, write_corpus_file
from mm_gpt.document import Document, Image, Segment, Text

CELL, CELLS = 12, 3
SIZE = CELL * CELLS
"""Pixels; a patch of the vision tower is a cell."""
COLOURS = {
    "red": (220, 30, 30),
    "blue": (40, 70, 220),
    "green": (30, 160, 60),
    "yellow": (240, 210, 40),
    "black": (20, 20, 20),
    "orange": (245, 140, 20),
    "purple": (130, 40, 160),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
    "grey": (140, 140, 140),
    "turquoise": (50, 200, 190),
    "olive": (110, 115, 20),
}
"""The commonest first."""
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring", "bar", "frame")
SIZES = {"small": 3, "large": 5}
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the middle",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
NUMBERS = ("no", "one", "two", "three", "four")
OPENINGS = (
    "Here are some pictures.",
    "The next page of the book shows a few things.",
    "Look at these pictures and answer the questions.",
    "A page of shapes in many colours.",
)
BEGINNINGS = ("There is", "You can see", "This picture shows", "Here we find")


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    place: int
    """Of `PLACES`."""

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


def rare_last(rng: random.Random, words: Sequence[str]) -> str:
    """One of `words`, the n-th in proportion to 1/n."""
    return rng.choices(words, [1 / (n + 1) for n in range(len(words))])[0]


def draw_things(rng: random.Random) -> tuple[Thing, ...]:
    """One to four things in different cells, in reading order."""
    places = sorted(rng.sample(range(len(PLACES)), rng.choice((1, 2, 2, 3, 3, 4))))
    return tuple(
        Thing(rng.choice(list(SIZES)), rare_last(rng, list(COLOURS)), rare_last(rng, SHAPES), place) for place in places
    )


def draw(things: Sequence[Thing], rng: random.Random) -> bytes:
    """The picture as a PNG, on white; `rng` moves the things by a pixel."""
    picture = PILImage.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(picture)
    for thing in things:
        row, column = divmod(thing.place, CELLS)
        r = SIZES[thing.size]
        x, y = column * CELL + CELL // 2 + rng.randint(-1, 0), row * CELL + CELL // 2 + rng.randint(-1, 0)
        box, fill = (x - r, y - r, x + r, y + r), COLOURS[thing.colour]
        match thing.shape:
            case "circle":
                pen.ellipse(box, fill=fill)
            case "ring":
                pen.ellipse(box, outline=fill, width=2)
            case "square":
                pen.rectangle(box, fill=fill)
            case "frame":
                pen.rectangle(box, outline=fill, width=2)
            case "bar":
                pen.rectangle((x - r, y - 1, x + r, y + 1), fill=fill)
            case "cross":
                pen.rectangle((x - r, y - 1, x + r, y + 1), fill=fill)
                pen.rectangle((x - 1, y - r, x + 1, y + r), fill=fill)
            case "diamond":
                pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
            case _:
                pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


# ---- What is said about a picture ----


def caption(things: Sequence[Thing], rng: random.Random) -> str:
    """Each thing with its place, in reading order: `There is a small red circle at the top and a large blue bar ...`"""
    named = [f"a {thing} {PLACES[thing.place]}" for thing in things]
    said = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"{rare_last(rng, BEGINNINGS)} {said}."


def question(things: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    """A question whose answer is one word: a number, a colour or a shape."""
    kind, thing = rng.randrange(3), rng.choice(things)
    if kind == 0:
        if rng.random() < 0.5:
            return "How many things are there?", NUMBERS[len(things)]
        shape = thing.shape if rng.random() < 0.7 else rare_last(rng, SHAPES)
        return f"How many {shape}s are there?", NUMBERS[sum(other.shape == shape for other in things)]
    if kind == 1:
        return f"What colour is the thing {PLACES[thing.place]}?", thing.colour
    return f"What shape is the thing {PLACES[thing.place]}?", thing.shape


def page(rng: random.Random, number: int) -> Document:
    """One or two pictures, each with a caption, or a question and its answer, or both."""
    segments: list[Segment] = [Text(rare_last(rng, OPENINGS))]
    for _ in range(rng.randint(1, 2)):
        things = draw_things(rng)
        segments.append(Image(draw(things, rng)))
        said = rng.choice(("caption", "caption", "question", "both"))
        parts = [] if said == "question" else [caption(things, rng)]
        if said != "caption":
            asked, answer = question(things, rng)
            parts.append(f"{asked} {answer.capitalize()}.")
        segments.append(Text(" ".join(parts)))
    return Document(tuple(segments), id=f"page-{number}")


def write_pages(out: Path, pages: int, seed: int) -> None:
    """A corpus of pages. The same seed gives the same bytes."""
    rng = random.Random(seed)
    writer = ShardWriter(out)
    for number in range(pages):
        writer.add(page(rng, number))
    write_corpus_file(out, writer.close(), {"source": "picture pages", "seed": seed})


def questions(count: int, seed: int) -> Iterator[tuple[bytes, str, str]]:
    """Picture, question and answer."""
    rng = random.Random(seed)
    for _ in range(count):
        things = draw_things(rng)
        picture = draw(things, rng)
        asked, answer = question(things, rng)
        yield picture, asked, f"{answer.capitalize()}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--held-out", type=int, default=800, help="pages")
    parser.add_argument("--questions", type=int, default=300)
    args = parser.parse_args()
    write_pages(args.out / "train", args.pages, seed=1)
    write_pages(args.out / "held_out", args.held_out, seed=2)
    rows = []
    (args.out / "questions").mkdir(parents=True, exist_ok=True)
    for number, (picture, asked, answer) in enumerate(questions(args.questions, seed=3)):
        name = f"questions/{number:04d}.png"
        (args.out / name).write_bytes(picture)
        rows.append(json.dumps({"image": name, "question": asked, "answer": answer}) + "\n")
    (args.out / "questions.jsonl").write_text("".join(rows))


if __name__ == "__main__":
    main()
