#!/usr/bin/env bash
# Adding a token to a trimmed vocabulary gives it the id of another token.
#
# Guess: a new token gets the largest id plus one, or a free one.
# Seen: it gets the vocabulary's length. Where ids have a gap (a vocabulary that was cut down but kept its ids, so
# that the embedding's rows still fit), that is the id of an existing token: both share one row, and decoding
# gives the new token for the old one.
# With: tokenizers 0.23.3.
#
# Output:
#   tokenizers 0.23.3
#   ids: {'<image>': 4, '[UNK]': 0, 'boat': 1, 'dog': 3, 'tree': 4}
#   'boat dog tree <image>' -> [1, 3, 4, 4] -> 'boat dog <image> <image>'
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import tokenizers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

print("tokenizers", tokenizers.__version__)
tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "boat": 1, "dog": 3, "tree": 4}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = WhitespaceSplit()
tokenizer.add_special_tokens(["<image>"])
print("ids:", dict(sorted(tokenizer.get_vocab().items())))
ids = tokenizer.encode("boat dog tree <image>").ids
decoded = tokenizer.decode(ids, skip_special_tokens=False)
print("'boat dog tree <image>' ->", ids, "->", repr(decoded))
assert tokenizer.token_to_id("<image>") == tokenizer.token_to_id("tree") == 4
assert decoded == "boat dog <image> <image>"
EOF
