#!/usr/bin/env bash
# An image edited in place is stored unedited by Hugging Face datasets.
#
# Guess: Dataset.from_list and map store the pixels that the image object holds when it is handed over, so
# shrinking images with thumbnail() in a map makes the dataset smaller.
# Seen: an image that was opened from a path keeps its `filename` through in-place edits (thumbnail, paste,
# ImageDraw). The Image feature stores that path and no pixels, so the edit is lost without a word: the row
# gives the full-size original. Only operations that return a new image (resize, crop, convert) are kept.
# With: datasets 5.2.0, pillow 12.3.0.
#
# Output:
#   datasets 5.2.0 pillow 12.3.0
#   handed over: (16, 16) (0, 0, 0) stored: (64, 64) (255, 255, 255)
#   after map with thumbnail: (64, 64) after map with resize: (16, 16)
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import datasets
import PIL
from PIL import Image

print("datasets", datasets.__version__, "pillow", PIL.__version__)
datasets.disable_progress_bars()
Image.new("RGB", (64, 64), "white").save("a.png")


def shrink(row):
    row["image"].thumbnail((16, 16))
    return {"image": row["image"]}


def resize(row):
    return {"image": row["image"].resize((16, 16))}


image = Image.open("a.png")
image.thumbnail((16, 16))
image.paste("black", (0, 0, 16, 16))
stored = datasets.Dataset.from_list([{"image": image}])[0]["image"]
print("handed over:", image.size, image.getpixel((0, 0)), "stored:", stored.size, stored.getpixel((0, 0)))
rows = datasets.Dataset.from_dict({"image": ["a.png"]}).cast_column("image", datasets.Image())
sizes = [rows.map(f)[0]["image"].size for f in (shrink, resize)]
print("after map with thumbnail:", sizes[0], "after map with resize:", sizes[1])
assert stored.size == (64, 64) and stored.getpixel((0, 0)) == (255, 255, 255)
assert sizes == [(64, 64), (16, 16)]
EOF
