#!/usr/bin/env bash
# pyarrow.Table.from_pylist and datasets.Dataset.from_list drop every key that the first row lacks.
#
# Guess: a list of dictionaries becomes a table with the union of their keys, missing values null, as in pandas and
# in pa.array(rows), or an odd row is an error.
# Seen: the first row alone says which columns there are; an optional field that first comes in row two is lost
# in every row, without a warning. pa.array of the same rows has both fields.
# With: pyarrow 26.0.1, datasets 5.2.0.
#
# Output:
#   pyarrow 26.0.1 datasets 5.2.0
#   Table.from_pylist: ['caption']
#   Dataset.from_list: ['caption']
#   pa.array:          ['caption', 'licence']
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1 datasets==5.2.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import datasets
import pyarrow as pa

print("pyarrow", pa.__version__, "datasets", datasets.__version__)
rows = [{"caption": "a boat"}, {"caption": "a dog", "licence": "CC0"}, {"caption": "a cat", "licence": "CC-BY"}]
table = pa.Table.from_pylist(rows)
dataset = datasets.Dataset.from_list(rows)
array = pa.array(rows)
print("Table.from_pylist:", table.column_names)
print("Dataset.from_list:", dataset.column_names)
print("pa.array:         ", [field.name for field in array.type])
assert table.column_names == dataset.column_names == ["caption"]
assert {field.name for field in array.type} == {"caption", "licence"}
EOF
