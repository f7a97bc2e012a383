#!/usr/bin/env bash
# gradio's Chatbot and Markdown change the whitespace of a model's answer.
#
# Guess: the text that a function returns is what the component holds, and what comes back as history in the next
# turn; only its rendering as Markdown is up to the browser.
# Seen: on the server, before anything is rendered, the text goes through a docstring's clean-up: the indentation that
# all lines but the first have in common is removed, and tabs become spaces. A function that is given without a
# fence loses the indentation of its body, a nested list becomes flat, a table with tabs has none. Textbox keeps it.
# With: gradio 6.31.0.
#
# Output:
#   gradio 6.31.0
#   'def f():\n    return 1' -> Chatbot 'def f():\nreturn 1', Markdown 'def f():\nreturn 1'
#   '- fruit\n  - apple\n  - pear' -> Chatbot '- fruit\n- apple\n- pear', Markdown '- fruit\n- apple\n- pear'
#   'name\tcount' -> Chatbot 'name    count', Markdown 'name    count'
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check gradio==6.31.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio

print("gradio", gradio.__version__)
answers = ("def f():\n    return 1", "- fruit\n  - apple\n  - pear", "name\tcount")
for answer in answers:
    message = gradio.Chatbot().postprocess([{"role": "assistant", "content": answer}]).root[0]
    seen = {
        "Chatbot": message.content[0].text,
        "Markdown": gradio.Markdown().postprocess(answer),
        "Textbox": gradio.Textbox().postprocess(answer),
    }
    print(f"{answer!r} -> Chatbot {seen['Chatbot']!r}, Markdown {seen['Markdown']!r}")
    assert seen["Textbox"] == answer
    assert seen["Chatbot"] == seen["Markdown"] != answer
    assert "\n  " not in seen["Chatbot"] and "\t" not in seen["Chatbot"]
EOF
