#!/usr/bin/env bash
# One file named crash_test_dummy.png makes load_dataset("imagefolder") forget all other images of the folder.
#
# Guess: a folder without train/ and test/ subfolders is one split, `train`, with all its images. Split names in
# file names matter at most to the files that have them.
# Seen: a keyword (train, test, dev, eval, valid, ...) set off by a separator anywhere in a file's name makes it a
# file of that split, and as soon as one file matches, the files that match none are left out without a word.
# The dataset is one image of split `test`.
# With: datasets 5.2.0, pillow 12.3.0.
#
# Output:
#   datasets 5.2.0
#   cat.png, dog.png, tree.png and crash_dummy.png: {'train': 4}
#   cat.png, dog.png, tree.png and crash_test_dummy.png: {'test': 1}
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
from pathlib import Path

import datasets
from PIL import Image

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
counts = {}
for name in ("crash_dummy", "crash_test_dummy"):
    folder = Path(f"folder_with_{len(counts)}")
    folder.mkdir()
    for stem in ("cat", "dog", "tree", name):
        Image.new("RGB", (4, 4)).save(folder / f"{stem}.png")
    splits = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir="cache")
    counts[name] = {split: len(rows) for split, rows in splits.items()}
    print(f"cat.png, dog.png, tree.png and {name}.png:", counts[name])
assert counts == {"crash_dummy": {"train": 4}, "crash_test_dummy": {"test": 1}}
EOF
