#!/usr/bin/env bash
# load_dataset("webdataset") takes its columns from the first five samples and drops or truncates the rest.
#
# Guess: a member or a JSON key that first comes later than the schema was taken either makes a column, or is an
# error. A 7.5 where the first samples had whole numbers becomes a float column, or is an error.
# Seen: neither. The later `.tag` members and the key `source` are dropped, and 7.5 is stored as 7. No warning.
# With: datasets 5.2.0.
#
# Output:
#   datasets 5.2.0
#   written:  {"members": ["txt", "json", "tag"], "json": {"score": 7.5, "source": "web"}}
#   read back: {"members": ["txt", "json"], "json": {"score": 7}}
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import io
import json
import tarfile

import datasets

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
with tarfile.open("shard.tar", "w") as tar:
    for i in range(8):
        meta = {"score": i + 0.5 if i == 7 else i}
        if i >= 5:
            meta["source"] = "web"
        members = {"txt": b"a caption", "json": json.dumps(meta).encode()}
        if i >= 5:
            members["tag"] = b"boat"
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{i:03}.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    print("written: ", json.dumps({"members": list(members), "json": meta}))
row = datasets.load_dataset("webdataset", data_files="shard.tar", split="train", cache_dir="cache")[7]
print("read back:", json.dumps({"members": [k for k in row if k[0] != "_"], "json": row["json"]}))
assert row["json"] == {"score": 7} and "tag" not in row
EOF
