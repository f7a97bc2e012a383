#!/usr/bin/env bash
# py3langid calls a text in which it recognizes nothing Afrikaans, and Serbian when asked for probabilities.
#
# Guess: the model has `zxx` ("no linguistic content"), so an empty string, "OK!", "STOP" or a file name gets that, or
# None, and both ways of asking agree.
# Seen: where no feature of the text is known, all languages are level, and classify() names the first of its table,
# `af`. With norm_probs=True it is `sr`: Serbian has two columns, one a script, whose equal shares are added up.
# Captions and alt texts of a word or two pass or fail a language filter by that accident; the score tells.
# With: py3langid 0.4.0, numpy 2.4.6.
#
# Output:
#   py3langid 0.4.0
#   '': classify af (-3.4e+38), norm_probs sr (0.014)
#   'OK!': classify af (-3.4e+38), norm_probs sr (0.014)
#   'Menu': classify af (-3.4e+38), norm_probs sr (0.014)
#   '12 + 7 = 19': classify af (-3.4e+38), norm_probs sr (0.014)
#   'IMG_0001.jpg': classify af (-3.4e+38), norm_probs sr (0.014)
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check py3langid==0.4.0 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import py3langid
from py3langid.langid import MODEL_FILE, LanguageIdentifier

print("py3langid", version("py3langid"))
normalized = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
seen = {}
for text in ("", "OK!", "Menu", "12 + 7 = 19", "IMG_0001.jpg"):
    (raw, score), (language, probability) = py3langid.classify(text), normalized.classify(text)
    seen[text] = raw, language
    print(f"{text!r}: classify {raw} ({score:.2g}), norm_probs {language} ({probability:.3f})")
assert "zxx" in [language for language, _ in normalized.rank("x")]
assert set(seen.values()) == {("af", "sr")}
EOF
