"""Make a small folder of web pages with pictures, as a browser would save them, to try building a corpus on.

python examples/make_pages.py pages
mm-gpt corpus build pages --out corpus
"""

import argparse
import random
from pathlib import Path

from make_shapes import COLOURS, SHAPES, draw

OPENINGS = (
    "This page of our picture book is about a {colour} {shape}, and it tells where such things are found.",
    "Children who learn to draw often begin with a {colour} {shape}, because it is easy to recognise from afar.",
    "Among all the pictures in this collection, the {colour} {shape} is the one that visitors ask for most often.",
)
MIDDLES = (
    "The picture below shows it on a white ground. Nothing else is in it, so that the {shape} is easy to see.",
    "Look at the next picture with care: the {shape} is painted in one plain colour, and that colour is {colour}.",
    "In the following picture you can see how the {colour} paint fills the whole of the {shape}, up to its edge.",
)
ENDINGS = (
    "If you want to draw a {shape} of your own, take a {colour} pencil and some paper, and begin at the top.",
    "A {shape} in another colour would look quite different, but people would still call it a {shape}.",
    "That is all there is to say about this {colour} {shape}; the next page of the book shows another one.",
)
NAVIGATION = "".join(f'<li><a href="{n}.html">Page {n}</a></li>' for n in range(1, 9))


def page(colour: str, shape: str, picture: str, rng: random.Random) -> str:
    words = {"colour": colour, "shape": shape}
    opening, middle, ending = (rng.choice(texts).format(**words) for texts in (OPENINGS, MIDDLES, ENDINGS))
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>A {colour} {shape}</title></head>
<body>
<nav><ul>{NAVIGATION}</ul></nav>
<main><article>
<h1>A {colour} {shape}</h1>
<p>{opening}</p>
<p>{middle}</p>
<figure><img src="{picture}" alt="{colour} {shape}"><figcaption>A {colour} {shape}.</figcaption></figure>
<p>{ending}</p>
</article></main>
<footer><p>Imprint - Privacy - Cookies</p></footer>
</body>
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=120)
    args = parser.parse_args()
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(1, args.count + 1):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        picture = f"pictures/{number}.png"
        draw(colour, shape, rng).save(args.out / picture)
        (args.out / f"{number}.html").write_text(page(colour, shape, picture, rng), encoding="utf-8")
    print(f"{args.count} pages in {args.out}")


if __name__ == "__main__":
    main()
