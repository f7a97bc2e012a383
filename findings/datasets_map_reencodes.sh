#!/usr/bin/env bash
# Passing a row's image through map() compresses the JPEG once more, at quality 75.
#
# Guess: map(lambda row: {**row, "n": 1}) adds a column and leaves the stored bytes of the image alone, as
# map(lambda row: {"n": 1}) does.
# Seen: the decoded image has lost its bytes and, when it came from bytes and not from a path, its name, so the
# writer saves it anew in its own format with Pillow's default quality. A quality-95 JPEG shrinks to a fraction,
# its pixels change, and they change again with every further such map. (The column can be kept as it is with
# Image(decode=False).)
# With: datasets 5.2.0, pillow 12.3.0, numpy 2.4.6.
#
# Output:
#   datasets 5.2.0 pillow 12.3.0
#   written: 5446 bytes, in the dataset: 5446
#   map returns the new column alone: 5446 bytes, largest change 0
#   map returns the whole row: 2838 bytes, largest change 84
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import io

import datasets
import numpy as np
import PIL
from PIL import Image

print("datasets", datasets.__version__, "pillow", PIL.__version__)
datasets.disable_progress_bars()
pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
buffer = io.BytesIO()
Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
rows = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
rows = rows.cast_column("image", datasets.Image())


def stored(rows):
    return rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]


def difference(rows):
    before = np.asarray(Image.open(buffer)).astype(int)
    return int(abs(np.asarray(rows[0]["image"]) - before).max())


new_column = rows.map(lambda row: {"n": 1})
whole_row = rows.map(lambda row: {**row, "n": 1})
print("written:", len(buffer.getvalue()), "bytes, in the dataset:", len(stored(rows)))
print("map returns the new column alone:", len(stored(new_column)), "bytes, largest change", difference(new_column))
print("map returns the whole row:", len(stored(whole_row)), "bytes, largest change", difference(whole_row))
assert stored(new_column) == buffer.getvalue()
assert len(stored(whole_row)) < len(buffer.getvalue()) / 1.5 and difference(whole_row) > 20
EOF
