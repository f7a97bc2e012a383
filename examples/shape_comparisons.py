"""Comparisons about the pictures of make_shapes.py, to try alignment on: a right description of each, and wrong ones.

python examples/make_shapes.py shapes
python examples/shape_comparisons.py shapes comparisons
mm-gpt train reward --data comparisons --out runs/reward start=runs/tiny/best
"""

import argparse
import json
import random
from pathlib import Path

from make_shapes import COLOURS, SHAPES

PROMPT = "Describe the image in one sentence."


def comparison(picture: Path, rng: random.Random) -> dict[str, object]:
    """A row in TRL's layout for preferences; the worse answer has another colour, another shape, or both."""
    right = picture.with_suffix(".txt").read_text().strip()
    _, colour, shape = right.rstrip(".").split()
    wrong_colour = rng.choice([c for c in COLOURS if c != colour])
    wrong_shape = rng.choice([s for s in SHAPES if s != shape])
    wrong = rng.choice([(wrong_colour, shape), (colour, wrong_shape), (wrong_colour, wrong_shape)])
    return {
        "images": [picture.name],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}],
        "chosen": [{"role": "assistant", "content": right}],
        "rejected": [{"role": "assistant", "content": "A {} {}.".format(*wrong)}],
        "truth": f"{colour} {shape}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", type=Path, help="the folder that make_shapes.py made")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    pictures = sorted(args.shapes.glob("*.png"))
    for picture in pictures:
        (args.out / picture.name).write_bytes(picture.read_bytes())
    rows = [json.dumps(comparison(picture, rng)) for picture in pictures]
    (args.out / "comparisons.jsonl").write_text("".join(row + "\n" for row in rows))
    print(f"{len(rows)} comparisons in {args.out}")


if __name__ == "__main__":
    main()
