#!/usr/bin/env bash
# gradio's Chatbot and Markdown change the whitespace of a model's answer.
#
# Guess: the text that a function returns is what the component holds, and what comes back as history in the next
# turn; only its rendering as Markdown is up to the browser.
# Seen: on the server, before anything is rendered, leading spaces and blank lines are cut, and tabs become spaces. An
# answer that begins with an indented line loses that indentation alone, so code is no longer valid, and a
# table with tabs is no longer one. Textbox keeps the text as it is.
# With: gradio 6.31.0.
#
# Output:
#@OUTPUT
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet --disable-pip-version-check gradio==6.31.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio

print("gradio", gradio.__version__)
answer = "    total = 0\n    for x in y:\n\ttotal += x\n"
message = gradio.Chatbot().postprocess([{"role": "assistant", "content": answer}]).root[0]
seen = {
    "Chatbot": message.content[0].text,
    "Markdown": gradio.Markdown().postprocess(answer),
    "Textbox": gradio.Textbox().postprocess(answer),
}
print("returned:", repr(answer))
for name, text in seen.items():
    print(f"{name}: {text!r}")
assert seen["Textbox"] == answer
assert seen["Chatbot"].startswith("total = 0\n") and "\t" not in seen["Chatbot"]
assert seen["Markdown"].startswith("total = 0\n") and "\t" not in seen["Markdown"]
EOF
