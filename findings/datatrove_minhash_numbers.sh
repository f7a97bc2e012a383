#!/usr/bin/env bash
# datatrove's MinHash removes arithmetic as duplicates and keeps exact copies of short captions.
#
# Guess: near-duplicate removal with default settings removes exact copies before anything else, and keeps texts
# whose content differs.
# Seen: texts are simplified before hashing, and that replaces each number by 0, so texts that differ only in numbers
# (sums, prices, tables, chart captions) are equal: one remains. And a text of fewer than five words has no
# 5-gram, hence no signature: its copies all stay.
# With: datatrove 0.10.1, xxhash 3.5.0, spacy 3.8.18, tokenizers 0.23.3, regex 2026.11.19, numpy 2.4.6.
#
# Output:
#   datatrove 0.10.1 xxhash 3.5.0 spacy 3.8.18
#   'Two dogs run.': 3 in, 3 out
#   'A man rides a horse.': 3 in, 1 out
#   'Anna has 1 apples and 2 pears, 3 in all.': 1 in, 1 out
#   'Anna has 30 apples and 14 pears, 44 in all.': 1 in, 0 out
#   'Anna has 999 apples and 5 pears, 1004 in all.': 1 in, 0 out
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  datatrove==0.10.1 xxhash==3.5.0 spacy==3.8.18 tokenizers==0.23.3 regex==2026.11.19 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import os

os.environ["HF_HUB_OFFLINE"] = "1"
from importlib.metadata import version

from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from loguru import logger

logger.remove()
print(*(f"{name} {version(name)}" for name in ("datatrove", "xxhash", "spacy")))
texts = ["Two dogs run."] * 3 + ["A man rides a horse."] * 3
texts += [f"Anna has {a} apples and {b} pears, {a + b} in all." for a, b in ((1, 2), (30, 14), (999, 5))]
documents = [Document(text=text, id=str(i)) for i, text in enumerate(texts)]
config = MinhashConfig()
MinhashDedupSignature("signatures", config).run(iter(documents), 0, 1)
for bucket in range(config.num_buckets):
    MinhashDedupBuckets("signatures", "buckets", config=config).run(None, bucket, config.num_buckets)
MinhashDedupCluster("buckets", "removed", config).run(None, 0, 1)
kept = [document.text for document in MinhashDedupFilter("removed").run(iter(documents), 0, 1)]
for text in dict.fromkeys(texts):
    print(f"{text!r}: {texts.count(text)} in, {kept.count(text)} out")
assert [kept.count(text) for text in dict.fromkeys(texts)] == [3, 1, 1, 0, 0]
EOF
