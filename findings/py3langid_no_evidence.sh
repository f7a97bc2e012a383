#!/usr/bin/env bash
# py3langid calls a text in which it recognizes nothing Afrikaans, and Serbian when asked for probabilities.
#
# Guess: the model has `zxx` ("no linguistic content"), so an empty string, "OK!", "STOP" or a file name gets that, or
# None, and both ways of asking agree.
# Seen: where no feature of the text is known, all languages are level and the first one of the table, or what the
# sorting leaves in front, is named: `af` by classify(), `sr` with norm_probs=True. Captions and alt texts of one
# or two words pass or fail a language filter by that accident.
# With: py3langid 0.4.0, numpy 2.4.6.
#
# Output:
#@OUTPUT
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet --disable-pip-version-check py3langid==0.4.0 numpy==2.4.6
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
