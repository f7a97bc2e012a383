#!/usr/bin/env bash
# pycocoevalcap's ROUGE-L gives 1.0 to a caption that equals none of its references.
#
# Guess: with several references the score is the best one's F-measure (0.71 here), and 1.0 means a perfect match.
# Seen: the best precision and the best recall are taken over all references apart, then combined. A long
# reference that contains the caption gives precision 1, a short one that it contains gives recall 1: together
# 1.0. So more references can lift the score above that of each of them.
# With: pycocoevalcap 1.2, numpy 2.4.6.
#
# Output:
#   pycocoevalcap 1.2
#   each reference alone: [0.629, 0.709] both: 1.0
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check pycocoevalcap==1.2 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
from importlib.metadata import version

from pycocoevalcap.rouge.rouge import Rouge

print("pycocoevalcap", version("pycocoevalcap"))
caption = "a dog on grass"
references = ["a dog on grass beside two parked cars", "a dog"]
alone = [float(Rouge().calc_score([caption], [reference])) for reference in references]
together = float(Rouge().calc_score([caption], references))
print("each reference alone:", [round(score, 3) for score in alone], "both:", together)
assert max(alone) < 0.75 and together == 1.0
EOF
