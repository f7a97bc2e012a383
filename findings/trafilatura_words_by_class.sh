#!/usr/bin/env bash
# trafilatura takes words out of the middle of a sentence because of their class name or tag.
#
# Guess: class names such as "menu" or "footer" and tags such as <button> throw out page parts (blocks); an inline
# element within a paragraph that is kept, keeps its words, or the sentence falls as a whole.
# Seen: the rules hold for inline elements too, and match parts of names: the words inside are cut and the sentence
# is joined over the hole. DocBook's <span class="guimenu"> (the usual mark-up of software manuals), "sharedword",
# "caption" and <time>, <label>, <math>, <output>, <button> all lose theirs.
# With: trafilatura 2.3.1, lxml 6.1.3, lxml_html_clean 0.4.6.
#
# Output:
#   trafilatura 2.3.1
#   class guimenu: Today we found boats on the river
#   class guilabel: Today we found ninety boats on the river
#   class sharedword: Today we found boats on the river
#   class caption: Today we found boats on the river
#   class footer: Today we found boats on the river
#   <em>: Today we found ninety boats on the river
#   <time>: Today we found boats on the river
#   <label>: Today we found boats on the river
#   <math>: Today we found boats on the river
#   <output>: Today we found boats on the river
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check trafilatura==2.3.1 lxml==6.1.3 lxml_html_clean==0.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import trafilatura

print("trafilatura", version("trafilatura"))
filler = "".join(
    f"<p>Paragraph {i} tells of the river and of the people who live beside it, in words enough to be kept.</p>"
    for i in range(4)
)


def kept(opening, closing):
    sentence = f"<p>Today we found {opening}ninety{closing} boats on the river, and none of them had sails.</p>"
    text = trafilatura.extract(f"<html><body><article><h1>River</h1>{filler}{sentence}</article></body></html>")
    return text.splitlines()[-1].removesuffix(", and none of them had sails.")


seen = {}
for name in ("guimenu", "guilabel", "sharedword", "caption", "footer"):
    seen[f"class {name}"] = kept(f'<span class="{name}">', "</span>")
for tag in ("em", "time", "label", "math", "output"):
    seen[f"<{tag}>"] = kept(f"<{tag}>", f"</{tag}>")
for name, text in seen.items():
    print(f"{name}: {text}")
whole = {name for name, text in seen.items() if text == "Today we found ninety boats on the river"}
assert whole == {"class guilabel", "<em>"}
assert {text for name, text in seen.items() if name not in whole} == {"Today we found boats on the river"}
EOF
