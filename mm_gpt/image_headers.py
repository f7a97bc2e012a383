"""What an image file is, and whether it is decoded at all: told from its bytes, before a decoder sees them.

Decoders trust what a file says about itself. A few kilobytes can ask for gigabytes, or for hours: scans, chunks,
directories and run lengths that cost much more than the bytes they are written in. Their numbers are bounded here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from mm_gpt.errors import ImageError


class _AvifFile(AvifImagePlugin.AvifImageFile):
    """Pillow's, but turned as the container says. Pillow parses the EXIF data for that, whatever that may take."""

    def _open(self) -> None:
        if not AvifImagePlugin.SUPPORTED:
            raise ImageError("this build of Pillow reads no AVIF")
        assert self.fp is not None
        self._decoder = AvifImagePlugin._avif.AvifDecoder(self.fp.read(), "auto", 1)
        self._size, self.n_frames, self._mode, _, _, orientation, _ = self._decoder.get_info()
        self.info["exif"] = b"MM\0*\0\0\0\x08" + b"\0\x01\x01\x12\0\x03\0\0\0\x01\0%c\0\0" % orientation + b"\0\0\0\0"
        self.seek(0)


@dataclass(frozen=True)
class ImageFormat:
    """A format that is read."""

    name: str
    suffixes: tuple[str, ...]
    """Of its files. The first is what `image_format` calls it."""
    decoder: type[ImageFile.ImageFile]
    """Called by class, not through Image.open: no other decoder can run, and Image.open's own bomb check would warn or
    raise by a global that belongs to the application."""
    magic: bytes = b""
    """A pattern of its first bytes. AVIF is told by its brands instead."""


_AVIF = ImageFormat("AVIF", ("avif",), _AvifFile)
FORMATS = (
    ImageFormat("JPEG", ("jpg", "jpeg", "jpe", "jfif"), JpegImagePlugin.JpegImageFile, rb"\xff\xd8\xff"),
    ImageFormat("PNG", ("png", "apng"), PngImagePlugin.PngImageFile, rb"\x89PNG\r\n\x1a\n"),
    ImageFormat("WEBP", ("webp",), WebPImagePlugin.WebPImageFile, rb"RIFF....WEBP"),
    ImageFormat("GIF", ("gif",), GifImagePlugin.GifImageFile, rb"GIF8[79]a"),
    ImageFormat("BMP", ("bmp",), BmpImagePlugin.BmpImageFile, rb"BM"),
    ImageFormat("TIFF", ("tif", "tiff"), TiffImagePlugin.TiffImageFile, rb"II\*\0(?!....CR)|MM\0\*"),
    _AVIF,
)
IMAGE_SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.suffixes)
"""What files of images are called, everywhere. Lower case, without the dot."""
IMAGE_FORMATS = tuple(format.suffixes[0] for format in FORMATS)
"""What `image_format` calls them."""
FORMAT_NAMES = ", ".join(format.name for format in FORMATS[:-1]) + f" or {FORMATS[-1].name}"


@dataclass(frozen=True)
class OtherKind:
    """A kind of picture that is not read, and what reads it."""

    name: str
    suffixes: tuple[str, ...]
    reader: str
    magic: bytes
    """A pattern of its first bytes."""


_CAMERA = OtherKind(
    "a camera's raw file",
    ("cr2", "cr3", "nef", "arw", "dng", "orf", "raf", "rw2"),
    "rawpy develops it",
    rb"II\*\0....CR|....ftypcrx |FUJIFILMCCD-RAW|IIR[OS]|IIU\0",
)
OTHER_KINDS = (
    _CAMERA,
    OtherKind("HEIC", ("heic", "heif", "hif"), "pillow-heif opens it", rb"....ftyp(?:hei|hev|mif1|msf1)"),
    OtherKind("JPEG 2000", ("jp2", "j2k", "jpx"), "Pillow's Image.open opens it", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    OtherKind("JPEG XL", ("jxl",), "pillow-jxl-plugin opens it", rb"\0\0\0\x0cJXL |\xff\x0a"),
    OtherKind("SVG", ("svg", "svgz"), "CairoSVG draws it", rb"(?:\xef\xbb\xbf)?\s*<(?:svg\b|[?!][^\0]{0,2000}<svg\b)"),
    OtherKind("Photoshop's PSD", ("psd", "psb"), "psd-tools opens it", rb"8BPS"),
    OtherKind("PDF", ("pdf",), "pypdfium2 draws its pages", rb"%PDF-"),
    OtherKind("a video", ("mp4", "mov", "m4v", "webm", "mkv", "avi"), "ffmpeg takes pictures out of it",
              rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI "),
    OtherKind("an icon", ("ico", "cur"), "Pillow's Image.open opens it", rb"\0\0[\x01\x02]\0"),
    OtherKind("PNM", ("ppm", "pgm", "pbm", "pnm"), "Pillow's Image.open opens it", rb"P[1-7]\s"),
)  # fmt: skip

OTHER_SUFFIXES = tuple(suffix for kind in OTHER_KINDS for suffix in kind.suffixes)

# What a file may ask for. Ordinary files stay far below.
_MAX_JPEG_SCANS = 100  # encoders write about 10; each one costs a pass over the whole image
_MAX_JPEG_SCANNED = 2**30  # scans times pixels: 16 of the largest picture
_MAX_JPEG_SEGMENTS = 600  # Pillow joins EXIF segments one by one: time grows with their square
_MAX_JPEG_FILL = 2**16  # bytes between the segments of its head, which Pillow skips one by one
_MAX_PNG_CHUNKS = 2**16  # Pillow takes them one by one; an encoder that writes 64 MB in pieces of 8 KB needs 8192
_MAX_RLE = 2**22  # bytes and pixels of a run-length encoded BMP: Pillow unpacks it in Python
_MAX_TIFF_ENTRIES = 1000  # in one directory
_MAX_TIFF_PIECES = 2**16  # strips or tiles; each takes a turn in Python
_MAX_TIFF_TILE = 2**24  # pixels; tiles are unpacked whole, however small the image
_MAX_EXIF_VALUES = 2**24  # bytes, of values that lie over each other

_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # with a length: no stuffed zero, fill byte or restart
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15: sizes and components
_PACKED = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}  # TIFF's ways: none, CCITT, LZW, JPEG, Deflate, PackBits
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


def find_format(data: bytes) -> ImageFormat | None:
    """The format of a file by its first bytes; None for what is not read."""
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4], "big"), len(data), 512)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        return _AVIF if brands & {b"avif", b"avis"} else None
    return next((f for f in FORMATS if f.magic and re.match(f.magic, data, re.DOTALL)), None)


def not_read(data: bytes) -> str:
    """Why a file without a format is not read, and what would read it."""
    other = next((kind for kind in OTHER_KINDS if re.match(kind.magic, data, re.DOTALL)), None)
    return f"not a {FORMAT_NAMES} image" if other is None else _other(other)


def _other(kind: OtherKind) -> str:
    return f"{kind.name} is not read, only {FORMAT_NAMES}; {kind.reader}, then give the PIL image or save it as PNG"


def check_file(format: ImageFormat, data: bytes) -> None:
    """Raises ImageError, without the file's name, where decoding would take too much time or memory."""
    check = {"JPEG": _check_jpeg, "PNG": _check_png, "BMP": _check_bmp, "TIFF": _check_tiff}.get(format.name)
    if check is not None:
        check(data)


def _check_jpeg(data: bytes) -> None:
    num_scans = num_segments = fill = pixels = 0
    frames: list[tuple[int, bytes]] = []  # (code, number of components) of each
    exif = b""
    position = 2
    while found := _JPEG_MARKER.search(data, position):
        start = found.end()
        code = data[start - 1]
        fill += found.start() - position if num_scans == 0 else 0
        if code == 0xD9:  # end of image; phones append videos after it
            break
        num_segments += 1
        num_scans += code == 0xDA
        if num_scans > min(_MAX_JPEG_SCANS, _MAX_JPEG_SCANNED // max(1, pixels)) or num_segments > _MAX_JPEG_SEGMENTS:
            raise ImageError(f"a JPEG of {num_scans} scans in {num_segments} segments or more")
        end = start + int.from_bytes(data[start : start + 2], "big")
        if code in _JPEG_FRAMES:
            frames.append((code, data[start + 7 : start + 8]))
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 3, start + 5))
            pixels = max(pixels, height * width)
        elif code == 0xDA and frames in ([(0xC0, data[start + 2 : start + 3])], [(0xC1, data[start + 2 : start + 3])]):
            break  # not progressive, and all components in the first scan: libjpeg takes a second one for an error
        elif code == 0xE1 and data[start + 2 : start + 8] == b"Exif\0\0":
            exif += data[start + 8 : end]
        position = end
    else:
        fill += len(data) - position if num_scans == 0 else 0
    if fill > _MAX_JPEG_FILL:
        raise ImageError(f"a JPEG with {fill:,} bytes between its segments")
    _directory(exif, strict=False)


def _check_png(data: bytes) -> None:
    num_profiles = 0
    for number, (kind, _, _) in enumerate(_png_chunks(data), start=1):
        num_profiles += kind == b"iCCP"
        if number > _MAX_PNG_CHUNKS or num_profiles > 1:
            raise ImageError(f"a PNG with {number:,} chunks and {num_profiles} colour profiles or more")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of what is in each, up to a second frame."""
    position, has_pixels = 8, False
    while position + 8 <= len(data):
        kind, start = data[position + 4 : position + 8], position + 8
        end = start + int.from_bytes(data[position : position + 4], "big")
        if kind == b"fcTL" and has_pixels:
            return
        yield kind, start, end
        has_pixels = has_pixels or kind == b"IDAT"
        if kind == b"IEND":
            return
        position = end + 4


def png_transparency(data: bytes, value: Any) -> Any:
    """The transparent grey or colour of a PNG as its pixels are decoded: 8 bits, which Pillow leaves as in the file."""
    depth, colour = data[24], data[25]
    if colour == 0 and depth in (2, 4):
        return (value & (2**depth - 1)) * (255 // (2**depth - 1))
    if colour == 0 and depth == 8:
        return value & 255
    if colour == 2:
        return tuple(v >> 8 if depth == 16 else v & 255 for v in value)
    return value


def _check_bmp(data: bytes) -> None:
    header = int.from_bytes(data[14:18], "little")
    if header < 40 or int.from_bytes(data[30:34], "little") not in (1, 2):
        return
    width, height = (abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22))
    if max(len(data), width * height) > _MAX_RLE:
        raise ImageError(
            f"a run-length encoded BMP of {width} x {height} pixels in {len(data):,} bytes; "
            f"at most {_MAX_RLE:,} of either are unpacked"
        )


def _check_tiff(data: bytes) -> None:
    directory = _directory(data, strict=True)
    number = lambda tag, other: next(iter(directory.numbers(tag)), other)  # noqa: E731
    # Raw files of most cameras are TIFFs whose first picture is a thumbnail
    if 50706 in directory.entries or (330 in directory.entries and number(254, 0) & 1):
        raise ImageError(_other(_CAMERA))
    if (packed := number(259, 1)) not in _PACKED:
        raise ImageError(f"a TIFF of compression {packed}, which is not read")
    num_pieces = max((directory.entries[tag].count for tag in (273, 324) if tag in directory.entries), default=0)
    if num_pieces > _MAX_TIFF_PIECES:
        raise ImageError(f"a TIFF in {num_pieces:,} strips or tiles; at most {_MAX_TIFF_PIECES:,} are read")
    if number(322, 0) * number(323, 0) > _MAX_TIFF_TILE:
        raise ImageError(f"a TIFF with tiles of {number(322, 0)} x {number(323, 0)} pixels")
    if sum(min(size, len(data)) for tag in (279, 325) for size in directory.numbers(tag)) > 2 * len(data):
        raise ImageError("a TIFF whose strips or tiles lie over each other")
    for tag in (34665, 34853, 40965):  # EXIF, GPS, interoperability: read after the pixels
        for offset in directory.numbers(tag)[:1]:
            inner = _directory(data, offset=offset, strict=False)
            for deeper in inner.numbers(40965)[:1]:
                _directory(data, offset=deeper, strict=False)


@dataclass(frozen=True)
class _Entry:
    type: int
    count: int
    start: int
    """Where its values are."""


@dataclass(frozen=True)
class _Directory:
    """The numbers of a TIFF file's directory, or of EXIF data, which are written alike."""

    data: bytes
    order: Any
    entries: Mapping[int, _Entry]

    def numbers(self, tag: int) -> list[int]:
        """The whole numbers of a tag; none where there are no such."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in (1, 3, 4, 13):
            return []
        size = _TYPE_BYTES[entry.type]
        values = self.data[entry.start : entry.start + size * entry.count]
        return [int.from_bytes(values[at : at + size], self.order) for at in range(0, len(values) - size + 1, size)]


def _directory(data: bytes, *, offset: int | None = None, strict: bool) -> _Directory:
    """The directory at `offset`, the first by default. Raises ImageError where its values are much larger than `data`.

    Values may lie over each other, and Pillow copies each: thousands that are all the same megabyte. `strict` also
    bounds the number of entries, as a file may; EXIF data is often broken around a sound picture.
    """
    order = {b"II": "little", b"MM": "big"}.get(data[:2], "")
    if not order:
        return _Directory(data, "little", {})
    number = lambda at, size: int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]  # noqa: E731
    at = number(4, 4) if offset is None else offset
    num_entries = min(number(at, 2), max(0, len(data) - at - 2) // 12)
    if strict and num_entries > _MAX_TIFF_ENTRIES:
        raise ImageError(f"a TIFF directory of {num_entries} entries")
    entries: dict[int, _Entry] = {}
    total = 0
    for entry in range(at + 2, at + 2 + 12 * num_entries, 12):
        kind, count = number(entry + 2, 2), number(entry + 4, 4)
        size = _TYPE_BYTES.get(kind, 0) * count
        start = entry + 8 if size <= 4 else number(entry + 8, 4)
        total += min(size, max(0, len(data) - start))
        entries[number(entry, 2)] = _Entry(kind, count, start)
    if total > max(2 * len(data) if strict else 0, _MAX_EXIF_VALUES):
        raise ImageError(f"{total:,} bytes of values in {len(data):,} bytes of EXIF or TIFF data")
    return _Directory(data, order, entries)


def exif_orientation(info: Mapping[Any, Any], data: bytes = b"") -> int:
    """1 to 8, as EXIF or XMP data of an opened file says; 1 where it is broken: shown as stored, as browsers do.

    `data` is a PNG file, whose EXIF data may stand behind the pixels. Pillow's `getexif` would decode those first, and
    read every entry of data that nobody has checked.
    """
    exif = info.get("exif")
    if exif is None and data[:4] == b"\x89PNG":
        exif = next((data[start:end] for kind, start, end in _png_chunks(data) if kind == b"eXIf"), None)
    if exif is None and "Raw profile type exif" in info:  # ImageMagick's way, before PNG had its own
        try:
            exif = bytes.fromhex("".join(str(info["Raw profile type exif"]).split("\n")[3:]))
        except ValueError:
            exif = None
    if isinstance(exif, bytes):
        try:
            found = _directory(exif.removeprefix(b"Exif\0\0"), strict=False).numbers(0x0112)
        except ImageError:
            return 1
        if len(found) == 1:
            return found[0]
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    xmp = xmp.encode(errors="replace") if isinstance(xmp, str) else xmp
    written = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp) if isinstance(xmp, bytes) else None
    return int(written[1]) if written else 1
