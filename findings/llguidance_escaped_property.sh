#!/usr/bin/env bash
# A grammar that llguidance makes of a JSON schema takes a property's name in another spelling for another property.
#
# Guess: every text that the grammar of a schema accepts is valid by that schema once a JSON parser has read it.
# Seen: of {"a": integer, all others: string}, the text {"a":1,"\u0061":"x"} is accepted: the escaped letter makes a name that
# is none of `properties` to the grammar, and is "a" again to the parser, for which the last one counts: {"a": "x"} is not
# valid. With the option json_allowed_escapes without u, it is refused; plain texts are judged alike in both.
# With: llguidance 1.9.1, jsonschema 4.26.0.
#
# Output:
#   llguidance 1.9.1
#   {"a":1}: accepted, valid True; without escaped letters accepted
#   {"a":"x"}: refused, valid False; without escaped letters refused
#   {"a":1,"\u0061":"x"}: accepted, valid False; without escaped letters refused
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check llguidance==1.9.1 jsonschema==4.26.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import json
from importlib.metadata import version

import jsonschema
from llguidance import LLMatcher, LLTokenizer

print("llguidance", version("llguidance"))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": {"type": "string"},
}
tokenizer = LLTokenizer("byte")


def judged(text, defaults=None):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(SCHEMA, defaults=defaults))
    ids = tokenizer.tokenize_str(text)
    whole = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
    return "accepted" if whole else "refused"


seen = []
for text in ('{"a":1}', '{"a":"x"}', '{"a":1,"\\u0061":"x"}'):
    valid = jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    plain, strict = judged(text), judged(text, {"json_allowed_escapes": 'nrbtf\\"'})
    print(f"{text}: {plain}, valid {valid}; without escaped letters {strict}")
    seen.append((plain, valid, strict))
expected = [("accepted", True, "accepted"), ("refused", False, "refused"), ("accepted", False, "refused")]
assert seen == expected, "this has changed"
EOF
