#!/usr/bin/env bash
# A chat with an image, stored as a Hugging Face dataset, comes back with the text turned into a second image.
#
# Guess: content parts that go into a dataset come out equal, so apply_chat_template gives the same prompt before
# and after.
# Seen: Arrow gives all parts of a list the same keys, so each part comes back with the keys of the other kinds,
# set to None. Templates of the Qwen2-VL kind ask `'image' in part`, which is now true of the text part too: the
# question is gone from the prompt, and one image placeholder too many stands in its place.
# With: datasets 5.2.0, transformers 5.24.0, jinja2 3.1.6.
#
# Output:
#   datasets 5.2.0 transformers 5.24.0
#   second part as stored: {'type': 'text', 'image': None, 'text': 'What is this?'}
#   prompt before: user: <image>What is this?
#   prompt after:  user: <image><image>
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 transformers==5.24.0 jinja2==3.1.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import datasets
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

print("datasets", datasets.__version__, "transformers", transformers.__version__)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' or 'image' in part %}<image>{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
parts = [{"type": "image", "image": "boat.png"}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": parts}]
stored = datasets.Dataset.from_list([{"messages": messages}])[0]["messages"]
prompts = [tokenizer.apply_chat_template(m, tokenize=False) for m in (messages, stored)]
print("second part as stored:", stored[0]["content"][1])
print("prompt before:", prompts[0])
print("prompt after: ", prompts[1])
assert prompts == ["user: <image>What is this?", "user: <image><image>"]
EOF
