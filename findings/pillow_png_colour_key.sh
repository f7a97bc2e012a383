#!/usr/bin/env bash
# Pillow compares a PNG's transparent colour with the pixels on two different scales.
#
# Guess: a greyscale PNG whose tRNS chunk names a grey level as transparent is transparent there after
# convert("RGBA"), as in every browser, whatever its bit depth.
# Seen: the pixels of 2- and 4-bit images are scaled to 0..255 and those of 16-bit RGB are cut to eight bits, but the
# colour in info["transparency"] stays as in the file. Nothing becomes transparent at 4 and 2 bits for most
# levels, nor at 16. With 8 bits, and for palettes, it works.
# With: pillow 12.3.0.
#
# Output:
#   pillow 12.3.0
#   8-bit grey: transparency 136, pixel 136, alpha 0
#   4-bit grey: transparency 8, pixel 136, alpha 255
#   2-bit grey: transparency 2, pixel 170, alpha 255
#   16-bit RGB: transparency (65280, 34816, 13312), pixel (255, 136, 52), alpha 255
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


def png(depth, colour_type, row, transparent):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))


ORANGE = struct.pack(">3H", 0xFF00, 0x8800, 0x3400)
# Two pixels each; the second one has the transparent colour.
images = {
    "8-bit grey": png(8, 0, bytes([0, 0x88]), struct.pack(">H", 0x88)),
    "4-bit grey": png(4, 0, bytes([0x08]), struct.pack(">H", 8)),
    "2-bit grey": png(2, 0, bytes([0b00100000]), struct.pack(">H", 2)),
    "16-bit RGB": png(16, 2, bytes(6) + ORANGE, ORANGE),
}
alphas = {}
for name, file in images.items():
    image = Image.open(file)
    alphas[name] = image.convert("RGBA").getpixel((1, 0))[3]
    print(f"{name}: transparency {image.info['transparency']}, pixel {image.getpixel((1, 0))}, alpha {alphas[name]}")
assert alphas == {"8-bit grey": 0, "4-bit grey": 255, "2-bit grey": 255, "16-bit RGB": 255}
EOF
