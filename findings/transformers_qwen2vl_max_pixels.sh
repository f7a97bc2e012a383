#!/usr/bin/env bash
# max_pixels of the Qwen2-VL image processor is not a maximum for long, thin images.
#
# Guess: smart_resize keeps the number of pixels between min_pixels and max_pixels, as its docstring says, so
# max_pixels bounds an image's tokens (with 28 x 28 pixels a token, 64 tokens here).
# Seen: the short side is never less than one factor (28), while the long side is shrunk only by the factor that
# would have fitted both, so a 20 x 3980 strip (within the allowed ratio of 200) takes 112 tokens, and
# so does a 100 x 19900 one.
# With: transformers 5.24.0, pillow 12.3.0.
#
# Output:
#   transformers 5.24.0 pillow 12.3.0
#   1000 x 1000: 64 tokens of at most 64
#   300 x 4000: 58 tokens of at most 64
#   20 x 3980: 112 tokens of at most 64
#   100 x 19900: 112 tokens of at most 64
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 pillow==12.3.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import PIL
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

print("transformers", transformers.__version__, "pillow", PIL.__version__)
limit = 64 * 28 * 28
processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=limit)
tokens = {}
for height, width in ((1000, 1000), (300, 4000), (20, 3980), (100, 19900)):
    frames, rows, columns = processor(Image.new("RGB", (width, height)))["image_grid_thw"][0]
    tokens[height, width] = int(frames * rows * columns) // 4
    print(f"{height} x {width}: {tokens[height, width]} tokens of at most 64")
assert max(tokens[1000, 1000], tokens[300, 4000]) <= 64
assert min(tokens[20, 3980], tokens[100, 19900]) > 100
EOF
