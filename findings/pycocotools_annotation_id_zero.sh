#!/usr/bin/env bash
# A perfect detection has average precision 0 in pycocotools if its ground truth has the id 0.
#
# Guess: ids are names; counting annotations from 0 is as good as from 1.
# Seen: the matcher keeps, for each detection, the id of the ground truth it matched, with 0 for "none". The
# annotation with id 0 is therefore never found: a false positive and a miss. Only one object of a data set is
# lost, so that on many images the score is off just a little.
# With: pycocotools 2.0.11, numpy 2.4.6.
#
# Output:
#   pycocotools 2.0.11
#   the same box, annotation id 0: AP 0.0
#   the same box, annotation id 1: AP 1.0
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check pycocotools==2.0.11 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import contextlib
import io
from importlib.metadata import version

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

print("pycocotools", version("pycocotools"))
precision = {}
for first_id in (0, 1):
    box = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": 1, "width": 100, "height": 100}],
            "categories": [{"id": 1, "name": "boat"}],
            "annotations": [{**box, "id": first_id, "area": 2500, "iscrowd": 0}],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([{**box, "score": 0.9}]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision[first_id] = round(float(evaluation.stats[0]), 6)
    print(f"the same box, annotation id {first_id}: AP {precision[first_id]}")
assert precision == {0: 0.0, 1: 1.0}
EOF
