"""A page of photos drawn by chance, with what a model says of each: nothing is chosen.

    python examples/photo_set.py photos.tar
    mm-gpt eval --task naming --data photos.tar --control all -o naming.json
    python examples/photo_page.py photos.tar docs --samples naming.samples.jsonl

writes `docs/photos.md`, a list with sources, authors and licences, and `docs/photos.jpg`, one sheet of small pictures.
The captions and answers are those that `mm-gpt eval` wrote; without `--samples` the model is asked again, in the same
way. The marks are those of the task `naming` (`eval/naming.py`).
"""

import argparse
import io
import json
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mm_gpt.datasets.formats.captioned import read_records
from mm_gpt.datasets.samples import ErrorCounter, Record
from mm_gpt.errors import MMGPTError
from mm_gpt.eval.naming import QUESTION
from mm_gpt.images import load_image
from mm_gpt.system.writing import whole_file, write_text
from mm_gpt.vision.imagenet import is_kind, is_named

COUNT = 40
SEED = 0
"""Fixed before any answer was seen."""
MAX_BYTES = 220_000
COLUMNS = 5
CELL, PICTURE, TEXT = 220, (208, 156), 76
"""Pixels: a cell's width, the picture's box in it, and the height for the words under it."""
LINES, LETTERS = 2, 38
MARKS = {"named": "#18794e", "kind": "#b26a00", "no": "#c0392b"}
"""Does the caption or the answer name the photo's class, its broader kind alone, or neither? Colours on the sheet."""
LICENCES = {
    **{f"CC-BY-{v}": f"https://creativecommons.org/licenses/by/{v}/" for v in ("1.0", "2.0", "3.0", "4.0")},
    **{f"CC-BY-SA-{v}": f"https://creativecommons.org/licenses/by-sa/{v}/" for v in ("2.0", "3.0", "4.0")},
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    **dict.fromkeys(("GPL-2", "GPL-2+"), "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html"),
    **dict.fromkeys(("GPL-3", "GPL-3+"), "https://www.gnu.org/licenses/gpl-3.0.html"),
    "public-domain": "",
}
"""Where each licence of the table of photos can be read."""


@dataclass(frozen=True)
class Said:
    """A photo, and what the model says of it."""

    record: Record
    caption: str
    answer: str

    @property
    def mark(self) -> str:
        texts, index = (self.caption, self.answer), self.record.metadata["class"]
        if any(is_named(text, index) for text in texts):
            return "named"
        return "kind" if any(is_kind(text, index) for text in texts) else "no"


def drawn(total: int, count: int = COUNT) -> list[int]:
    """The places of the photos that are drawn, in order; all where there are no more than `count`."""
    return sorted(random.Random(SEED).sample(range(total), min(count, total)))


def read_photos(tar: Path) -> list[Record]:
    """The set that examples/photo_set.py writes. Raises MMGPTError naming a record without a class or a licence."""
    errors = ErrorCounter()
    records = list(read_records(tar, errors))
    if errors.total:
        raise MMGPTError(f"{tar}: {errors.summary()}")
    for record in records:
        index, licence = record.metadata.get("class"), record.metadata.get("licence")
        if type(index) is not int or licence not in LICENCES:
            raise MMGPTError(f"{tar}: {record.key}: no class, or a licence that is not known: {licence!r}")
    return records


def read_samples(path: Path) -> dict[str, tuple[str, str]]:
    """Caption and answer by the photo's key, from the samples of `mm-gpt eval --task naming`. Raises MMGPTError."""
    said: dict[str, tuple[str, str]] = {}
    number = 0
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            number += 1
            row = json.loads(line)
            if row["control"] == "none":
                said[str(row["id"])] = str(row["caption"]), str(row["answer"])
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise MMGPTError(f"{path}:{number}: not a sample of the task naming") from None
    return said


def ask(records: Sequence[Record], model: str) -> dict[str, tuple[str, str]]:
    """The same from a model, in the task's words."""
    from mm_gpt.inference.assistant import load

    assistant = load(model)
    said = {}
    for record in records:
        image: Any = record.image
        caption = assistant.caption(image, num_beams=3, max_new_tokens=40)
        said[record.key] = str(caption), str(assistant.ask(image, QUESTION, num_beams=1, max_new_tokens=32))
    return said


# ---- The sheet ----


def sheet(photos: Sequence[Said]) -> bytes:
    """One JPEG of all, at most MAX_BYTES."""
    rows = -(-len(photos) // COLUMNS)
    height = PICTURE[1] + TEXT + 12
    canvas = Image.new("RGB", (COLUMNS * CELL, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    plain, small = ImageFont.load_default(size=11), ImageFont.load_default(size=10)
    for n, photo in enumerate(photos):
        left, top = n % COLUMNS * CELL + 6, n // COLUMNS * height + 6
        picture = load_image(photo.record.image)
        picture.thumbnail(PICTURE, Image.Resampling.LANCZOS)
        canvas.paste(picture, (left + (PICTURE[0] - picture.width) // 2, top + PICTURE[1] - picture.height))
        colour, y = MARKS[photo.mark], top + PICTURE[1] + 4
        draw.ellipse((left, y + 2, left + 9, y + 11), fill=colour)
        draw.text((left + 14, y), f"{n + 1}  {photo.mark}", fill=colour, font=small)
        for text, ink in ((photo.caption, "black"), (photo.answer, "#1f4e8c")):
            for line in textwrap.wrap(text, LETTERS, max_lines=LINES, placeholder=" ..."):
                y += 13
                draw.text((left, y), line, fill=ink, font=plain)
    for quality in range(85, 20, -5):
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
        if buffer.tell() <= MAX_BYTES:
            return buffer.getvalue()
    raise MMGPTError(f"{len(photos)} photos do not fit into {MAX_BYTES:,} bytes")


# ---- The list ----

HEAD = """# {count} photos, drawn by chance

What `{model}` says of {count} of the {total} photos of things that ImageNet has a class for, drawn by
`examples/photo_page.py` with a fixed seed: nothing was chosen. The packaged model was not trained on any of them;
[evaluation.md](evaluation.md) tells how the set was made. The answers are to "{question}"

| | photos | |
|---|---|---|
| named | {named} | the caption or the answer names the class |
| kind | {kind} | only its broader kind: "dog" for a beagle |
| no | {no} | neither |

![The photos with their captions, in black, and answers, in blue](photos.jpg)

```
python examples/photo_set.py photos.tar
mm-gpt eval --task naming --data photos.tar --control all -o naming.json
python examples/photo_page.py photos.tar docs --samples naming.samples.jsonl
```

The photos on the sheet are scaled down and stay under their own licences; `examples/photos.tsv` has their full paths.

| | photo | caption | answer | named | source | author | licence |
|---|---|---|---|---|---|---|---|
"""


def page(photos: Sequence[Said], *, total: int, model: str) -> str:
    """The list as Markdown."""
    counts = Counter(photo.mark for photo in photos)
    head = HEAD.format(
        count=len(photos), total=total, model=model, question=QUESTION, **{mark: counts[mark] for mark in MARKS}
    )
    lines = []
    for n, photo in enumerate(photos, start=1):
        about = photo.record.metadata
        package, version, path = photo.record.source.split(" ", 2)
        cells = [str(n), about["name"], photo.caption, photo.answer, photo.mark]
        cells += [f"{package} {version}, {path.rpartition('/')[2]}", about.get("author") or "the package's authors"]
        link = LICENCES[about["licence"]]
        licence = f"[{about['licence']}]({link})" if link else about["licence"]
        lines.append(f"| {' | '.join(map(cell, cells))} | {licence} |\n")
    return head + "".join(lines)


def cell(text: str) -> str:
    """Plain text in a table of Markdown: a model's words make no markup."""
    text = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\|*_`[]<>#~" else letter for letter in text)


def write_page(
    records: Sequence[Record], said: dict[str, tuple[str, str]], out: Path, *, total: int, model: str
) -> None:
    """`out/photos.md` and `out/photos.jpg`. Raises MMGPTError naming a photo of which nothing is said."""
    if missing := [record.key for record in records if record.key not in said]:
        raise MMGPTError(f"nothing is said of photo {missing[0]}, and {len(missing) - 1} others")
    photos = [Said(record, *said[record.key]) for record in records]
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "photos.jpg") as temporary:
        temporary.write_bytes(sheet(photos))
    write_text(out / "photos.md", page(photos, total=total, model=model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="the tar of examples/photo_set.py")
    parser.add_argument("out", type=Path, help="folder for photos.md and photos.jpg")
    parser.add_argument("--samples", type=Path, help="what `mm-gpt eval --task naming` wrote beside its results")
    parser.add_argument("--model", default="default")
    args = parser.parse_args()
    try:
        everything = read_photos(args.photos)
        records = [everything[n] for n in drawn(len(everything))]
        said = ask(records, args.model) if args.samples is None else read_samples(args.samples)
        write_page(records, said, args.out, total=len(everything), model=args.model)
    except MMGPTError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out / 'photos.md'}: {len(records)} of {len(everything)} photos")


if __name__ == "__main__":
    main()
