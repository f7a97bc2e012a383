#!/usr/bin/env bash
# The same 16-bit grey level is white or grey in Pillow, depending on whether the PNG has an alpha channel.
#
# Guess: opening a 16-bit PNG and converting it to "RGB" keeps the upper eight bits, for all kinds of 16-bit PNG.
# Seen: with alpha (opened as RGBA) or in colour (RGB) that is so, already when opened. A plain grey one opens as
# "I;16", and convert to L or RGB cuts at 255, not scales: everything above 0.4 % of the range is white, as depth
# maps, X-rays and scans are. Every loader that ends in convert("RGB") does so.
# With: pillow 12.3.0.
#
# Output:
#   pillow 12.3.0
#   grey: level 0x6789 of 0xffff opens as I;16, as RGB (255, 255, 255)
#   grey with alpha: level 0x6789 of 0xffff opens as RGBA, as RGB (103, 103, 103)
#   colour: level 0x6789 of 0xffff opens as RGB, as RGB (103, 103, 103)
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check pillow==12.3.0
cd "$room"
"$room/venv/bin/python" - <<'EOF'
import io
import struct
import zlib

import PIL
from PIL import Image

print("pillow", PIL.__version__)
LEVEL = 0x6789


def png(colour_type, samples):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, colour_type, 0, 0, 0)
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))


seen = {}
for name, colour_type, samples in (
    ("grey", 0, [LEVEL]),
    ("grey with alpha", 4, [LEVEL, 0xFFFF]),
    ("colour", 2, [LEVEL] * 3),
):
    image = Image.open(png(colour_type, samples))
    seen[name] = image.convert("RGB").getpixel((0, 0))
    print(f"{name}: level {LEVEL:#x} of 0xffff opens as {image.mode}, as RGB {seen[name]}")
assert seen == {"grey": (255,) * 3, "grey with alpha": (0x67,) * 3, "colour": (0x67,) * 3}
EOF
