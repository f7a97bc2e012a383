#!/usr/bin/env bash
# The threshold of rensa's RMinHashLSH does not change what query() returns.
#
# Guess: RMinHashLSH(threshold=0.9) returns what is about 0.9 alike or more, as in datasketch, where the threshold
# sets the bands.
# Seen: query() returns every item that shares a band, and the bands are num_bands alone. With 32 bands of four
# hashes, sets with a Jaccard similarity of 0.5 nearly always come back, equally for thresholds of 0.1 and 0.9. The
# threshold is only used by is_similar(), which the caller has to ask about each of them.
# With: rensa 0.5.0.
#
# Output:
#   rensa 0.5.0
#   threshold 0.1: of 200 pairs with similarity 0.5 query returns 179, is_similar 200
#   threshold 0.9: of 200 pairs with similarity 0.5 query returns 179, is_similar 0
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check rensa==0.5.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
from importlib.metadata import version

from rensa import RMinHash, RMinHashLSH

print("rensa", version("rensa"))


def minhash(words):
    result = RMinHash(num_perm=128, seed=1)
    result.update(words)
    return result


found = {}
for threshold in (0.1, 0.9):
    returned = similar = 0
    for trial in range(200):
        words = [f"{trial}-{i}" for i in range(400)]
        first, second = minhash(words[:300]), minhash(words[100:])  # 200 of 400 in common
        index = RMinHashLSH(threshold=threshold, num_perm=128, num_bands=32)
        index.insert(0, first)
        returned += len(index.query(second))
        similar += index.is_similar(first, second)
    found[threshold] = returned
    print(f"threshold {threshold}: of 200 pairs with similarity 0.5 query returns {returned}, is_similar {similar}")
assert found[0.1] == found[0.9] > 150 and similar == 0
EOF
