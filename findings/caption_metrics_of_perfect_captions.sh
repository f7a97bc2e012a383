#!/usr/bin/env bash
# Captions equal to their references do not reach the full score in CIDEr and BLEU-4 of pycocoevalcap.
#
# Guess: an identical caption scores BLEU-4 1 and CIDEr 10 (the implementation's scale).
# Seen: a caption of three words has no 4-gram: its CIDEr is at most 7.5, since an empty order counts as zero in a
# mean over four, and its BLEU-4 is 0.03. And a set of one image has CIDEr 0, however good, because the inverse
# document frequencies come from the references at hand: log(1/1) = 0.
# With: pycocoevalcap 1.2, numpy 2.4.6.
#
# Output:
#   pycocoevalcap 1.2
#   three images: 'a red car' CIDEr 7.5 BLEU-4 0.03
#   three images: 'two dogs run on grass' CIDEr 10.0 BLEU-4 1.0
#   three images: 'one man rides the tall horse' CIDEr 10.0 BLEU-4 1.0
#   one image: 'one man rides the tall horse' CIDEr 0.0 BLEU-4 1.0
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check pycocoevalcap==1.2 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
from importlib.metadata import version

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

print("pycocoevalcap", version("pycocoevalcap"))


def scores(captions):
    rows = {i: [caption] for i, caption in enumerate(captions)}
    cider = Cider().compute_score(rows, rows)[1]
    bleu = Bleu(4).compute_score(rows, rows, verbose=0)[1][3]
    return [(caption, round(float(c), 2), round(float(b), 2)) for caption, c, b in zip(captions, cider, bleu)]


three = scores(["a red car", "two dogs run on grass", "one man rides the tall horse"])
one = scores(["one man rides the tall horse"])
for name, result in (("three images", three), ("one image", one)):
    for caption, cider, bleu in result:
        print(f"{name}: {caption!r} CIDEr {cider} BLEU-4 {bleu}")
assert [c for _, c, _ in three] == [7.5, 10, 10] and three[0][2] == 0.03 and three[1][2] == 1
assert one[0][1:] == (0, 1)
EOF
