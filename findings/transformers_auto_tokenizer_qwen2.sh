#!/usr/bin/env bash
# AutoTokenizer splits differently from the tokenizer.json it loads, when config.json says "qwen2".
#
# Guess: a folder with a tokenizer.json and tokenizer_class "PreTrainedTokenizerFast" loads that file as it is,
# pre-tokenizer included; config.json's model_type describes the weights.
# Seen: model_type "qwen2" wins over tokenizer_class. The tokenizer is built anew from vocabulary and merges with
# Qwen2's own splitting, so each digit stands alone although this file's tokenizer joins up to three. The same
# folder with model_type "llama" or without config.json follows the file. No warning.
# With: transformers 5.24.0, tokenizers 0.23.3.
#
# Output:
#   transformers 5.24.0 tokenizers 0.23.3
#   tokenizer.json: ['year', 'Ġ', '202', '4']
#   None: ['year', 'Ġ', '202', '4']
#   llama: ['year', 'Ġ', '202', '4']
#   qwen2: ['year', 'Ġ', '2', '0', '2', '4']
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
tokenizer = Tokenizer(models.BPE())
digits = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(["year 2024"] * 9, trainer)
seen = {"tokenizer.json": tokenizer.encode("year 2024").tokens}
for model_type in (None, "llama", "qwen2"):
    folder = f"model_{model_type}"
    os.mkdir(folder)
    tokenizer.save(f"{folder}/tokenizer.json")
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, file)
    if model_type:
        with open(f"{folder}/config.json", "w") as file:
            json.dump({"model_type": model_type}, file)
    seen[model_type] = transformers.AutoTokenizer.from_pretrained(folder).tokenize("year 2024")
for source, tokens in seen.items():
    print(f"{source}: {tokens}")
assert seen["tokenizer.json"] == seen[None] == seen["llama"] == ["year", "Ġ", "202", "4"]
assert seen["qwen2"] == ["year", "Ġ", "2", "0", "2", "4"]
EOF
