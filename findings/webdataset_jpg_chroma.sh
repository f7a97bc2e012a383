#!/usr/bin/env bash
# WebDataset writes JPEG at quality 100 with a quarter of the colour.
#
# Guess: TarWriter's `jpg` field, quality 100, is nearly lossless: off by a few levels.
# Seen: quality 100 sets the quantization only; the chroma planes are still stored at half width and height (4:2:0,
# Pillow's default at every quality). Red stripes one pixel wide, as in coloured text and charts, come out
# 91 levels off, where 4:4:4 at the same quality is off by one.
# With: webdataset 1.0.2, pillow 12.3.0, numpy 2.4.6.
#
# Output:
#   webdataset 1.0.2 pillow 12.3.0
#   TarWriter: sampling 2, quantization step 1, largest error 91
#   4:4:4: sampling 0, quantization step 1, largest error 1
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check webdataset==1.0.2 pillow==12.3.0 numpy==2.4.6
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import io
from importlib.metadata import version

import numpy as np
import PIL
import webdataset
from PIL import Image, JpegImagePlugin

print("webdataset", version("webdataset"), "pillow", PIL.__version__)
stripes = np.zeros((16, 16, 3), np.uint8)
stripes[:, ::2, 0] = 255
with webdataset.TarWriter("a.tar") as tar:
    tar.write({"__key__": "a", "jpg": Image.fromarray(stripes)})
written = Image.open(io.BytesIO(next(iter(webdataset.WebDataset("a.tar", shardshuffle=False)))["jpg"]))
full = io.BytesIO()
Image.fromarray(stripes).save(full, "JPEG", quality=100, subsampling="4:4:4")
errors = {}
for name, image in (("TarWriter", written), ("4:4:4", Image.open(full))):
    sampling = JpegImagePlugin.get_sampling(image)  # 0 is 4:4:4, 2 is 4:2:0
    first_step = image.quantization[0][0]
    errors[name] = int(abs(np.asarray(image).astype(int) - stripes).max())
    print(f"{name}: sampling {sampling}, quantization step {first_step}, largest error {errors[name]}")
assert errors["TarWriter"] > 60 and errors["4:4:4"] < 8
EOF
