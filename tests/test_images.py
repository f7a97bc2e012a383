import base64
import io
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mm_gpt import document
from mm_gpt.errors import ImageError
from mm_gpt.images import ImageLimits, image_size, is_url, load_image, source_name


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x + 90], axis=2).astype(np.uint8))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


# --- formats and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_format_from_every_source(format, tmp_path):
    data = encode(photo(), format)
    path = tmp_path / "photo.bin"
    path.write_bytes(data)
    url = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    expected = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    for source in (data, path, str(path), url, Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        assert image.size == (40, 24)
        assert image.tobytes() == expected


def test_gif_named_jpg(tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_bytes(encode(photo(), "GIF"))
    assert load_image(path).size == (40, 24)


def test_cmyk_jpeg():
    # Stops: inverted colours. Adobe's CMYK JPEGs store 255 - ink.
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encode(red, "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    r, g, b = load_image(data).getpixel((8, 8))
    assert r > 240
    assert g < 15
    assert b < 15


def test_16_bit_png_is_scaled_not_clipped():
    # Stops: PIL's convert("L") turns every 16-bit value above 255 to white.
    values = np.array([[200, 257, 128 * 257, 65535]], dtype=">u2")
    image = load_image(png(4, 1, 16, 0, b"\0" + values.tobytes()))
    assert [image.getpixel((x, 0)) for x in range(4)] == [
        (v, v, v) for v in (1, 1, 128, 255)
    ]  # 200 / 257 is nearest to 1
    seen_through = png_chunk(b"tRNS", struct.pack(">H", 257))
    image = load_image(png(4, 1, 16, 0, b"\0" + values.tobytes(), seen_through))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [1, 255, 128, 255]


def test_16_bit_colour_png():
    values = np.array([[[65535, 128 * 257, 0]]], dtype=">u2")
    assert load_image(png(1, 1, 16, 2, b"\0" + values.tobytes())).getpixel((0, 0)) == (255, 128, 0)


def test_deep_pil_modes():
    assert load_image(Image.new("I", (2, 2), 65535)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("I;16", (2, 2), 128 * 257)).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(Image.new("F", (2, 2), 1.0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="0 to 65535"):
        load_image(Image.new("I", (2, 2), 70_000))
    with pytest.raises(ImageError, match=r"\[0, 1\]"):
        load_image(Image.new("F", (2, 2), 255.0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    # Stops: sideways phone photos, and a second rotation when the result is loaded again.
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = load_image(data)
    assert image.size == expected.size == ((40, 24) if orientation < 5 else (24, 40))
    assert image.tobytes() == expected.tobytes()
    assert load_image(image).tobytes() == image.tobytes()
    assert load_image(Image.open(io.BytesIO(data))).tobytes() == image.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture():
    data = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_image(data).size == (40, 24)


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    return image


TRANSPARENT = {
    "RGBA": encode(Image.new("RGBA", (2, 1), (0, 0, 255, 0)), "PNG"),
    "LA": encode(Image.new("LA", (2, 1), (0, 0)), "PNG"),
    "P, one index": encode(palette_image(), "PNG", transparency=0),
    "P, alpha table": encode(palette_image(), "PNG", transparency=b"\0\xff"),
    "L, tRNS": encode(Image.new("L", (2, 1), 7), "PNG", transparency=7),
    "RGB, tRNS": encode(Image.new("RGB", (2, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    "GIF": encode(palette_image(), "GIF", transparency=0),
    "WEBP": encode(Image.new("RGBA", (2, 1), (0, 0, 255, 0)), "WEBP", lossless=True),
}


@pytest.mark.parametrize("data", TRANSPARENT.values(), ids=TRANSPARENT.keys())
def test_transparency_becomes_white(data):
    # Stops: convert("RGB") shows the colour hidden behind alpha 0, mostly black.
    assert load_image(data).getpixel((0, 0)) == (255, 255, 255)


def test_half_transparent_and_premultiplied():
    half = Image.new("RGBA", (2, 2), (200, 0, 0, 128))
    r, g, b = load_image(half).getpixel((0, 0))
    assert abs(r - 227) <= 1
    assert abs(g - 127) <= 1
    assert g == b
    assert load_image(half.convert("RGBa")).getpixel((0, 0))[1] == g
    assert load_image(Image.new("La", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "PA"])
def test_other_pil_modes(mode):
    assert load_image(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(format, {})
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    red, green, blue = load_image(data).getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


def test_the_given_pil_image_stays_as_it_was():
    image = photo()
    image.info["note"] = "mine"
    load_image(image).putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)
    assert image.info == {"note": "mine"}


def test_arrays():
    rgb = np.asarray(photo())
    assert load_image(rgb).tobytes() == photo().tobytes()
    assert load_image(rgb / 255.0).tobytes() == photo().tobytes()
    assert load_image((rgb / 255).astype(np.float16)).size == (40, 24)
    assert load_image(rgb[:, ::-1]).getpixel((0, 0)) == photo().getpixel((39, 0))
    for grey in (np.full((3, 5), 7, np.uint8), np.full((3, 5, 1), 7, np.uint8)):
        assert load_image(grey).getpixel((4, 2)) == (7, 7, 7)
    assert load_image(np.zeros((3, 5, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.zeros((3, 5, 4), np.float32)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 224, 224), np.uint8), "shape"),  # channels first
        (np.zeros((2, 3, 4, 3), np.uint8), "shape"),
        (np.zeros(5, np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4), np.int64), "dtype int64"),
        (np.zeros((4, 4), bool), "dtype bool"),
        (np.full((4, 4), 255.0), r"\[0, 1\]"),  # floats that are really 0 to 255
        (np.full((4, 4), -0.1), r"\[0, 1\]"),
        (np.full((4, 4), np.nan), r"\[0, 1\]"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(source, **limits) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, limits=ImageLimits(**limits))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(source_name(source))
    return message


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(format, share):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), format)
    assert "broken image" in refusal(data[: int(len(data) * share)])


def test_broken_files(tmp_path):
    for name, content, message in (
        ("empty.jpg", b"", "empty"),
        ("text.png", b"<html>404 not found</html>", "not a JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF image"),
        ("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not read"),
        ("page.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a JPEG"),  # EPS would start Ghostscript
        ("only magic.png", b"\x89PNG\r\n\x1a\n", "broken image"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert message in refusal(path)
        assert name in refusal(str(path))
    assert "No such file" in refusal(tmp_path / "missing.png")
    assert "folder" in refusal(tmp_path)
    assert "<empty path>" in refusal("")
    refusal("zero\0byte.png")
    refusal("two\nlines.png")
    refusal("x" * 5000)


def test_formats_that_pil_knows_but_we_refuse():
    for format in ("PPM", "ICO", "TGA", "PCX", "EPS", "PDF"):
        assert re.search("not a JPEG|is not read, only JPEG", refusal(encode(photo(), format)))


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_pipes_and_devices_are_not_opened(tmp_path):
    # Stops: a read that blocks for ever (pipe) or never ends (/dev/zero).
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refusal(tmp_path / "pipe.png")
    assert "not a regular file" in refusal("/dev/zero")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encode(photo(), "PNG"))
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_other_types_are_refused():
    for source in (None, 3, ["a.jpg"], object()):
        with pytest.raises(ImageError, match="not an image"):
            load_image(source)


@pytest.mark.filterwarnings("error")
def test_huge_png_header_is_refused_before_decoding(monkeypatch):
    # Stops: 20,000 x 20,000 pixels from a few bytes; also Pillow's own warning or error in place of ours.
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    message = refusal(png(20_000, 20_000, 8, 2, b""))
    assert "20000 x 20000" in message
    assert "64,000,000" in message
    assert "10000 x 10000" in refusal(png(10_000, 10_000, 8, 2, b""))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_decompression_bombs_of_every_format(format):
    # Stops: a decoder that allocates or decodes when the file is merely opened.
    bomb = encode(Image.new("L" if format in ("PNG", "GIF") else "RGB", (3000, 2000)), format)
    assert "3000 x 2000" in refusal(bomb, max_pixels=5_000_000)
    assert load_image(bomb, limits=ImageLimits(max_pixels=6_000_000)).size == (3000, 2000)


def test_pixel_limit_holds_for_pil_images_and_arrays():
    limits = ImageLimits(max_pixels=99)
    for source in (Image.new("RGB", (10, 10)), np.zeros((10, 10), np.uint8)):
        with pytest.raises(ImageError, match="10 x 10 pixels, over the limit of 99"):
            load_image(source, limits=limits)


def test_pil_globals_are_neither_set_nor_needed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # what OBELICS and others do
    assert "20000 x 20000" in refusal(png(20_000, 20_000, 8, 2, b""))
    assert Image.MAX_IMAGE_PIXELS is None


def test_byte_limit(tmp_path):
    data = encode(photo(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (data, path, "data:image/png;base64," + base64.b64encode(data).decode()):
        assert "limit of 50 bytes" in refusal(source, max_bytes=50)
        assert load_image(source, limits=ImageLimits(max_bytes=len(data))).size == (40, 24)


def test_jpeg_of_thousands_of_scans_is_refused():
    # Stops: a small progressive file whose every scan costs a pass over all pixels (hours for 1 MB).
    data = encode(photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert load_image(data).size == (40, 24)
    assert "scans" in refusal(data[:-2] + data[last:-2] * 200 + b"\xff\xd9")
    # a fake segment length may not hide scans: decoders looking for a restart marker ignore such lengths
    assert "scans" in refusal(data[:-2] + b"\xff\x02\xff\xff" + data[last:-2] * 200 + b"\xff\xd9")
    assert load_image(data + data[last:-2] * 200).size == (40, 24)  # behind the end: a phone's video, say


def test_headers_that_cost_quadratic_time_are_refused():
    # Stops: Pillow joins EXIF segments and GIF comment blocks one at a time; 20 MB of them took minutes.
    jpeg, gif = encode(photo(), "JPEG"), encode(photo(), "GIF")
    segment = b"\xff\xe1\x00\x0aExif\0\0xx"
    assert "segments" in refusal(jpeg[:2] + segment * 1_000_000 + jpeg[2:])
    comment = b"!\xfe" + b"\x01x" * 5_000_000 + b"\0"
    start = 13 + (3 << ((gif[10] & 7) + 1))  # behind header and palette
    assert "broken image" in refusal(gif[:start] + comment + gif[start:])
    assert load_image(gif[:start] + b"!\xfe\x05hello\0" + gif[start:]).size == (40, 24)


SEEDS = [encode(photo(), format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")] + list(TRANSPARENT.values())


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32), st.integers(1, 12))
def test_mutated_files_load_or_raise_image_error(data, seed, num_changes):
    # Stops: struct.error, IndexError, SyntaxError... that would kill a training run at one bad image.
    rng, broken = random.Random(seed), bytearray(data)
    for _ in range(num_changes):
        broken[rng.randrange(8, len(broken))] = rng.randrange(256)
    try:
        image = load_image(bytes(broken), limits=ImageLimits(max_pixels=100_000))
    except ImageError:
        return
    assert image.mode == "RGB"


def test_names():
    assert source_name(b"abc") == "<bytes, 3 long>"
    assert source_name(photo()) == "<PIL image>"
    assert source_name(np.zeros((2, 2))) == "<ndarray>"
    assert source_name("a/b.png") == "a/b.png"
    assert source_name("https://me:secret@host/a.png") == "https://***@host/a.png"
    assert source_name("data:image/png;base64,AAAA") == "<data URL, 26 long>"
    assert len(source_name("https://host/" + "a" * 5000)) < 300
    assert is_url("HTTPS://host/a.png")
    assert not is_url("http.png")
    assert not is_url("file:///etc/passwd")


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,@@@", "data:image/png,abc", "data:image/png;base64", "data:image/"]
)
def test_bad_data_urls(url):
    with pytest.raises(ImageError, match="<data URL, "):
        load_image(url)


def test_data_urls_with_line_breaks_and_percent_signs():
    data = encode(photo(), "PNG")
    code = base64.b64encode(data).decode()
    for payload in (base64.encodebytes(data).decode(), quote(code, safe=""), code.rstrip("="), f" {code}\r\n"):
        assert load_image(f"data:image/png;base64,{payload}").tobytes() == photo().tobytes()


def test_import_is_light():
    code = "import sys, mm_gpt.images; sys.exit(bool({'torch', 'numpy', 'requests'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_size_of_a_turned_photo_is_that_of_the_upright_one(format, orientation):
    """The tiles of an image are counted from its size before it is decoded: sideways, they would be others."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), format, exif=exif)
    assert image_size(data) == load_image(data).size[::-1] == ((40, 24) if orientation in (5, 6, 7, 8) else (24, 40))
    opened = document.Image(Image.open(io.BytesIO(data)), mirrored=True)
    assert opened.size() == opened.load().size[::-1] == image_size(data)


def test_size_from_every_source(tmp_path):
    data = encode(photo(), "GIF")
    (tmp_path / "photo").write_bytes(data)
    url = f"data:image/gif;base64,{base64.b64encode(data).decode()}"
    for source in (data, tmp_path / "photo", str(tmp_path / "photo"), url, photo(), np.asarray(photo())):
        assert image_size(source) == (24, 40)


def test_size_needs_no_pixels_and_refuses_what_loading_refuses(tmp_path):
    assert image_size(encode(photo(400, 240), "JPEG")[:-400]) == (240, 400)  # the rest of the file is missing
    limits = ImageLimits(max_pixels=900)
    for source in (encode(photo(), "PNG"), photo(), np.asarray(photo())):
        with pytest.raises(ImageError, match=r"40 x 24 pixels, over the limit of 900"):
            image_size(source, limits=limits)
    for source, message in ((b"", "empty"), (b"text", "not a JPEG"), (tmp_path, "is a folder"), (3, "not an image")):
        with pytest.raises(ImageError, match=message):
            image_size(source)
