"""Make a folder of captioned pictures (a coloured shape each) to try training on.

python examples/make_shapes.py shapes
mm-gpt train tiny --data shapes --out runs/tiny
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle")


def draw(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """A 64-pixel picture of one shape somewhere on white."""
    picture = Image.new("RGB", (64, 64), "white")
    radius = rng.randint(12, 22)
    x, y = rng.randint(radius, 64 - radius), rng.randint(radius, 64 - radius)
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLOURS[colour])
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=600)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(args.count):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        draw(colour, shape, rng).save(args.out / f"{number:04d}.png")
        (args.out / f"{number:04d}.txt").write_text(f"A {colour} {shape}.\n")
    print(f"{args.count} pictures in {args.out}")


if __name__ == "__main__":
    main()
