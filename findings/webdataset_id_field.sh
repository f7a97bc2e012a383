#!/usr/bin/env bash
# WebDataset's decode() turns the field `id` into an integer.
#
# Guess: decode() leaves an extension that is no file format, such as "id", as bytes or as text, like "caption" or
# "name"; TarWriter and decode() are each other's inverse.
# Seen: `id`, `index`, `count` and `class` are read with int(): "00123" comes back as 123, "1_000" as 1000, and a
# text id is a DecodingError, while a field `caption` stays bytes.
# With: webdataset 1.0.2, numpy 2.4.6.
#
# Output:
#   webdataset 1.0.2
#   written '00123', read 123
#   written '1_000', read 1000
#   written 'img-7', read 'DecodingError'
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import webdataset

print("webdataset", version("webdataset"))
written = ["00123", "1_000", "img-7"]
read = []
for i, value in enumerate(written):
    with webdataset.TarWriter(f"{i}.tar") as tar:
        tar.write({"__key__": "a", "id": value, "caption": value.encode()})
    try:
        sample = next(iter(webdataset.WebDataset(f"{i}.tar", shardshuffle=False).decode()))
        read.append(sample["id"])
        assert sample["caption"] == value.encode()
    except webdataset.autodecode.DecodingError as error:
        read.append(type(error).__name__)
for before, after in zip(written, read):
    print(f"written {before!r}, read {after!r}")
assert read == [123, 1000, "DecodingError"]
EOF
