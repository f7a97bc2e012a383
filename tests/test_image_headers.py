"""What is refused before it is decoded, what is read, and what reading costs."""

import io
import random
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_images import encode, photo, png, png_chunk

from mm_gpt import image_headers
from mm_gpt.errors import ImageError
from mm_gpt.image_headers import FORMATS, OTHER_SUFFIXES
from mm_gpt.images import (
    BYTES_PER_PIXEL,
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    ByteBudget,
    image_format,
    image_size,
    load_image,
    load_pixels,
)


def refused(data: bytes, message: str) -> None:
    for read in (load_image, image_size, lambda file: load_pixels(file, at_least=(1, 1))):
        with pytest.raises(ImageError, match=message):
            read(data)


# ---- Kinds ----


def test_one_list_of_suffixes_holds_what_is_read() -> None:
    from mm_gpt.datasets import samples

    assert samples.IMAGE_SUFFIXES is IMAGE_SUFFIXES
    assert {"jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"} <= set(IMAGE_SUFFIXES)
    assert not set(IMAGE_SUFFIXES) & set(OTHER_SUFFIXES)
    for format, name in zip(FORMATS, IMAGE_FORMATS, strict=True):
        assert image_format(encode(photo(), format.name)) == name


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA"])
def test_tiff(mode: str, compression: str | None) -> None:
    if (mode, compression) == ("RGBA", "jpeg"):
        return
    data = encode(photo().convert(mode), "TIFF", compression=compression)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(load_pixels(data, at_least=(1, 1)), expected)


def test_deep_tiff() -> None:
    grey = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert [load_image(encode(grey, "TIFF")).getpixel((x, 0))[0] for x in range(3)] == [0, 1, 255]


@pytest.mark.parametrize("format", ["TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_tiff_and_avif(format: str, orientation: int) -> None:
    """Stops: a TIFF's size of the sideways picture, since Pillow turns its pixels and its size by itself."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": "4:4:4"} if format == "AVIF" else {}
    data = encode(photo(), format, exif=exif, **options)
    image = load_image(data)
    assert image.size == ((40, 24) if orientation < 5 else (24, 40))
    assert image_size(data) == image.size[::-1]
    assert image_size(Image.open(io.BytesIO(data))) == image.size[::-1]
    assert load_image(Image.open(io.BytesIO(data))).tobytes() == image.tobytes()
    exif[0x0112] = orientation  # which the AVIF encoder took out
    expected = load_image(encode(photo(), "PNG", exif=exif))
    assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).max() < 12


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read.*pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not read.*CairoSVG"),
        (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg/>", "SVG"),
        (b"8BPS\0\1", "Photoshop's PSD"),
        (b"%PDF-1.7\n", "PDF is not read"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video is not read.*ffmpeg"),
        (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file.*rawpy"),
        (b"<html></html>", "not a JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF image"),
    ],
)
def test_other_kinds_are_named_with_what_reads_them(data: bytes, said: str) -> None:
    refused(data, said)


def tiff(*entries: tuple[int, int, int, int], order: str = "<", behind: bytes = b"") -> bytes:
    """A file of one directory: (tag, type, count, value or offset)."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    return head + struct.pack(f"{order}IH", 8, len(entries)) + body + bytes(4) + behind


def test_raw_files_do_not_pass_for_their_thumbnails() -> None:
    refused(tiff((254, 4, 1, 1), (256, 4, 1, 160), (330, 4, 1, 99)), "a camera's raw file")
    refused(tiff((256, 4, 1, 160), (50706, 1, 4, 1)), "a camera's raw file")


# ---- Pixels ----


def bmp(alpha: bytes, *, compression: int = 3, header: int = 108, masks: bool = True) -> bytes:
    pixels = b"".join(bytes([10, 20, 200, a]) for a in alpha)
    head = struct.pack("<IiiHHIIiiII", header, len(alpha), 1, 1, 32, compression, len(pixels), 2835, 2835, 0, 0)
    if header == 108:
        head += struct.pack("<IIII", *((0xFF0000, 0xFF00, 0xFF, 0xFF000000) if masks else (0, 0, 0, 0))) + bytes(52)
    start = 14 + len(head)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + pixels


def test_bmp_without_any_alpha_is_opaque() -> None:
    """Stops: a white picture where a program left the fourth byte of each pixel empty."""
    for data in (bmp(b"\0\0"), bmp(b"\0\0", masks=False), bmp(b"\0\0", compression=0, header=40), bmp(b"\xff\xff")):
        for source in (data, Image.open(io.BytesIO(data))):
            assert load_image(source).getpixel((1, 0)) == (200, 20, 10)
    seen_through = load_image(bmp(b"\0\xff"))  # some alpha is meant
    assert [seen_through.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 20, 10)]
    assert load_image(np.zeros((1, 1, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)  # and so it is elsewhere


@pytest.mark.parametrize(("depth", "rows"), [(1, b"\0\x40"), (2, b"\0\x1b"), (4, b"\0\x01\x23"), (8, b"\0\0\1\2\3")])
@pytest.mark.parametrize("clear", [0, 1])
def test_transparent_grey_of_every_depth(depth: int, rows: bytes, clear: int) -> None:
    """Stops: a grey of a 2- or 4-bit file that is compared with pixels of 8 bits."""
    width = 2 if depth == 1 else 4
    values = np.asarray(load_image(png(width, 1, depth, 0, rows)))[0, :, 0].tolist()
    trns = png_chunk(b"tRNS", struct.pack(">H", clear))
    found = np.asarray(load_image(png(width, 1, depth, 0, rows, trns)))[0, :, 0].tolist()
    expected = list(values)
    expected[clear] = 255
    assert found == expected


def test_transparent_colour_of_16_bits() -> None:
    values = np.array([[40_000, 20_000, 10_000], [1, 2, 3]], ">u2")
    trns = png_chunk(b"tRNS", values[0].tobytes())
    image = load_image(png(2, 1, 16, 2, b"\0" + values.tobytes(), trns))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "1"])
def test_strips_make_no_difference(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: a seam, or a last strip that is missing, where an image is converted piece by piece."""
    image = photo().convert("L").convert("I").convert("I;16") if mode == "I;16" else photo().convert(mode)
    whole = load_image(image).tobytes()
    monkeypatch.setattr("mm_gpt.images._STRIP", 33)  # less than a row
    assert load_image(image).tobytes() == whole
    assert load_pixels(encode(photo(), "PNG"), at_least=(1, 1)).tobytes() == photo().tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_behind_the_pixels_of_a_png() -> None:
    """The size is read without decoding, and agrees with the decoded picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(), "PNG")
    data = data[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    assert image_size(data) == load_image(data).size[::-1] == (40, 24)


def test_orientation_in_xmp() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="8"/>')
    assert load_image(encode(photo(), "PNG", pnginfo=info)).size == (24, 40)


# ---- Time: files of many pieces. The limits are lowered, so that the files stay small ----


def test_fill_bytes_of_a_jpeg() -> None:
    data = encode(photo(), "JPEG")
    assert load_image(data[:2] + b"\xff" * 1000 + data[2:]).size == (40, 24)
    refused(data[:2] + b"\xff" * 70_000 + data[2:], "bytes between its segments")
    scan = data.index(b"\xff\xda")
    refused(data[:scan] + bytes(70_000) + data[scan:], "bytes between its segments")


def test_scans_of_a_large_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan costs a pass over all pixels, so that fewer are too many where there are more."""
    data = encode(photo(), "JPEG", progressive=True)
    num_scans = data.count(b"\xff\xda")
    monkeypatch.setattr(image_headers, "_MAX_JPEG_SCANNED", num_scans * 40 * 24)
    assert load_image(data).size == (40, 24)
    monkeypatch.setattr(image_headers, "_MAX_JPEG_SCANNED", num_scans * 40 * 24 - 1)
    refused(data, f"a JPEG of {num_scans} scans")


def test_chunks_of_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_headers, "_MAX_PNG_CHUNKS", 50)
    data = encode(photo(), "PNG")
    for at in (33, len(data) - 12):  # behind the header and before the end
        assert load_image(data[:at] + png_chunk(b"prVt", b"") * 40 + data[at:]).size == (40, 24)
        refused(data[:at] + png_chunk(b"prVt", b"") * 51 + data[at:], "PNG with 51 chunks")
    profile = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100)))
    refused(data[:33] + profile * 2 + data[33:], "2 colour profiles")
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(60)]
    film = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert load_image(film).getpixel((0, 0)) == (0, 0, 0)  # frames that are not decoded do not count


def rle_bmp(width: int, height: int, codes: bytes) -> bytes:
    palette = b"".join(bytes([shade, 0, 0, 0]) for shade in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 2835, 2835, 256, 256)
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(codes), 0, 0, start) + head + palette + codes


def test_run_lengths_of_a_bmp(monkeypatch: pytest.MonkeyPatch) -> None:
    line = b"\x08\x05\0\0"
    assert load_image(rle_bmp(8, 8, line * 8 + b"\0\1")).getpixel((7, 7)) == (0, 0, 5)
    monkeypatch.setattr(image_headers, "_MAX_RLE", 2000)
    refused(rle_bmp(8, 8, b"\0\0" * 1000), "run-length encoded BMP of 8 x 8 pixels in 3,078 bytes")  # ends no line
    refused(rle_bmp(50, 50, b"\0\1"), "run-length encoded BMP of 50 x 50")


def test_directories_of_a_tiff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, strips and tiles that lie over each other, and are copied or unpacked again and again."""
    monkeypatch.setattr(image_headers, "_MAX_EXIF_VALUES", 10_000)
    same = [(tag, 1, 5000, 100) for tag in range(60_000, 60_010)]
    for order in "<>":
        refused(tiff(*same, order=order, behind=bytes(6000)), "50,000 bytes of values")
    refused(tiff(*[(tag, 3, 1, 0) for tag in range(1001)]), "directory of 1001 entries")
    refused(tiff((273, 4, 70_000, 100)), "in 70,000 strips")
    refused(tiff((322, 4, 1, 10_000), (323, 4, 1, 10_000)), "tiles of 10000 x 10000")
    refused(tiff((259, 3, 1, 34925)), "compression 34925")
    refused(tiff((279, 4, 3, 26), behind=struct.pack("<III", 900, 900, 900)), "lie over each other")
    inner = struct.pack("<H", len(same)) + b"".join(struct.pack("<HHII", *entry) for entry in same)
    refused(tiff((34665, 4, 1, 26), behind=inner + bytes(6000)), "bytes of values")


def test_exif_data_that_says_one_thing_a_thousand_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would copy the same bytes for each entry."""
    monkeypatch.setattr(image_headers, "_MAX_EXIF_VALUES", 10_000)
    exif = b"Exif\0\0" + tiff(*[(tag, 1, 5000, 100) for tag in range(60_000, 60_010)], behind=bytes(6000))
    data = encode(photo(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    refused(data[:2] + segment + data[2:], "50,000 bytes of values")
    for format in ("PNG", "WEBP"):  # where it is not needed to open the file: shown as stored
        assert load_image(encode(photo(), format, exif=exif)).size == (40, 24)


SEEDS = [encode(photo(12, 9), format.name) for format in FORMATS if format.name != "AVIF"]
SEEDS += [rle_bmp(8, 8, b"\x08\x05\0\0" * 8 + b"\0\1"), encode(photo(12, 9), "TIFF", compression="tiff_lzw")]


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_images_or_errors_of_one_line() -> None:
    rng = random.Random(1)
    num_loaded, messages = 0, []
    for number in range(400):
        data = bytearray(SEEDS[number % len(SEEDS)])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            height, width = image_size(bytes(data))
            if height * width > 10_000:
                continue
            assert load_image(bytes(data)).size == (width, height)
            num_loaded += 1
        except ImageError as error:
            messages.append(str(error))
    assert num_loaded > 100
    assert len(messages) > 100
    assert "\n" not in "".join(messages)


# ---- Memory ----

MEASURED = """
import sys
from PIL import Image
from mm_gpt.images import load_image, load_pixels
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
def decoded(path):
    before = peak()
    image = load_image(path) if sys.argv[1] == "image" else load_pixels(path, at_least=(10, 10))
    return peak() - before, len(image.tobytes()) // 3
decoded(sys.argv[2])  # imports
print(*decoded(sys.argv[3]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["image", "pixels"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_peak_memory_of_one_image(format: str, kind: str, tmp_path) -> None:
    """Stops: whole copies at once for alpha, colours, turning and arrays. A WEBP with alpha took 28 bytes a pixel."""
    side = 1600
    mode = "RGB" if format == "JPEG" else "RGBA"
    options = {
        "JPEG": {"progressive": True, "subsampling": 0},
        "WEBP": {"quality": 5, "method": 0},
        "AVIF": {"quality": 5, "speed": 10},
        "PNG": {"compress_level": 1},
        "TIFF": {"compression": "tiff_lzw"},
    }[format]
    for name, size in (("small", 8), ("large", side)):
        Image.linear_gradient("L").resize((size, size)).convert(mode).save(tmp_path / name, format, **options)
    argv = [sys.executable, "-c", MEASURED, kind, tmp_path / "small", tmp_path / "large"]
    peak, _ = map(int, subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    assert peak < BYTES_PER_PIXEL * side * side


def test_byte_budget() -> None:
    budget = ByteBudget(100)
    inside = most = 0
    lock = threading.Lock()

    def work(num_bytes: int) -> None:
        nonlocal inside, most
        with budget.take(num_bytes):
            with lock:
                inside += min(num_bytes, 100)
                most = max(most, inside)
            threading.Event().wait(0.001)
            with lock:
                inside -= min(num_bytes, 100)

    threads = [threading.Thread(target=work, args=(n,)) for n in (60, 40, 1000, 30, 70, 100, 0, 60, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)
    assert 60 <= most <= 100
    with pytest.raises(KeyError), budget.take(100):
        raise KeyError
    with budget.take(100):  # what failed gave back what it had
        pass
