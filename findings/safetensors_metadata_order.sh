#!/usr/bin/env bash
# Saving the same tensors and metadata twice gives two different safetensors files.
#
# Guess: the format is plain and its header is sorted, so the same content gives the same bytes, and a checksum
# can tell whether a checkpoint changed.
# Seen: the entries of `__metadata__` are written in an order that changes from call to call. Without metadata, or
# with one entry, the bytes do repeat.
# With: safetensors 0.8.0, numpy 2.4.6.
#
# Output:
#   safetensors 0.8.0 numpy 2.4.6
#   entries of metadata -> are all 50 files equal: {0: True, 1: True, 6: False}
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import hashlib

import numpy as np
import safetensors
from safetensors.numpy import load, save

print("safetensors", safetensors.__version__, "numpy", np.__version__)
tensors = {"weight": np.arange(4, dtype=np.float32)}
distinct = {}
for entries in (0, 1, 6):
    metadata = {f"key{i}": str(i) for i in range(entries)}
    files = [save(tensors, metadata=metadata or None) for _ in range(50)]
    assert all((load(f)["weight"] == tensors["weight"]).all() for f in files)
    distinct[entries] = len({hashlib.sha256(f).hexdigest() for f in files})
print("entries of metadata -> are all 50 files equal:", {n: d == 1 for n, d in distinct.items()})
assert distinct[0] == distinct[1] == 1 and distinct[6] > 1
EOF
