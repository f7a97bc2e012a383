"""Images from files, bytes, arrays and URLs, for input that nobody has checked.

A picture from the web may be broken, mislabelled or made to do harm. So: only a few decoders ever run, sizes are read
from the header and refused before a pixel is decoded, and a URL is fetched only from a public address (see `network`).
What comes out is always an upright RGB image; everything else is an `ImageError` of one line.
"""

import base64
import binascii
import io
import os
import re
import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from PIL import BmpImagePlugin, GifImagePlugin, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL import Image as PILImage

from mm_gpt.errors import ImageError, URLError
from mm_gpt.network.client import fetch_bytes
from mm_gpt.network.urls import one_line as _one_line
from mm_gpt.network.urls import short_name

if TYPE_CHECKING:
    import numpy as np

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | PILImage.Image | np.ndarray"
"""A path, an http(s) or data URL, the bytes of an image file, a PIL image, or an array (see `load_image`)."""


@dataclass(frozen=True)
class ImageLimits:
    """What is refused. The pixel limit holds for every source, the byte limit for files, bytes and downloads."""

    max_pixels: int = 64_000_000
    """Width x height. 64 megapixels hold any ordinary camera's photo and decode into 256 MB."""
    max_bytes: int = 64 * 2**20
    timeout_s: float = 15.0
    """For a whole download: connecting, TLS, headers, redirects and body together (a slow DNS server comes on top)."""
    max_redirects: int = 5
    allow_private_addresses: bool = False
    """True: also fetch from localhost and the local network. Never for URLs that strangers write."""


DEFAULT_LIMITS = ImageLimits()

# The decoders are called by class, not through Image.open: no other decoder can run, and Image.open's own bomb check
# would warn or raise by a global that belongs to the application. TIFF, AVIF, PSD, EPS... are left out on purpose:
# rare on the web and behind most of the decoder bugs. Whoever needs them opens them with PIL and passes the PIL image.
_DECODERS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
)

_SUFFIXES = ("jpg", "png", "webp", "gif", "bmp")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # those that exchange width and height

# Small files that keep a decoder busy for hours although they have few pixels.
_MAX_JPEG_SCANS = 100  # encoders write about 10; each one costs a pass over the whole image
_MAX_JPEG_SEGMENTS = 600  # Pillow joins EXIF segments one by one: time grows with their square
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # with a length: no stuffed zero, fill byte or restart
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15: sizes and components
_MAX_GIF_PREAMBLE = 2**19  # bytes before the first frame; likewise for blocks of a comment


def is_url(source: object) -> bool:
    """Whether `source` is a string that `load_image` takes for a URL (http, https or an image data URL)."""
    return isinstance(source, str) and source[:11].lower().startswith(("http://", "https://", "data:image/"))


def source_name(source: ImageSource) -> str:
    """What messages call this image: path, URL (without password) or `<bytes, 123 long>`, on one line."""
    if isinstance(source, PILImage.Image):
        return "<PIL image>"
    if isinstance(source, bytes | bytearray):
        return f"<bytes, {len(source)} long>"
    if isinstance(source, str) and is_url(source):
        if source[:5].lower() == "data:":
            return f"<data URL, {len(source)} long>"
        return short_name(source)
    if isinstance(source, str | os.PathLike):
        return short_name(os.fsdecode(source) or "<empty path>")
    return f"<{type(source).__name__}>"


def load_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> PILImage.Image:
    """Any image source as a new RGB image: upright (EXIF), transparency on white, the first frame of an animation.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or float in [0, 1]. 16-bit greyscale is scaled, not
    clipped, to 8 bits. The format is told by content, never by file name: JPEG, PNG, WEBP, GIF or BMP.

    A string that is no URL is read as a path. A server must not pass a stranger's string here without `is_url`.
    Raises ImageError (URLError for URLs), one line that names the source.
    """
    name = source_name(source)
    numpy = sys.modules.get("numpy")  # whoever holds an array has imported it
    if isinstance(source, PILImage.Image):
        return _to_rgb(source, name, limits)
    if isinstance(source, bytes | bytearray):
        return _decode(bytes(source), name, limits)
    if isinstance(source, str | os.PathLike):
        return _decode(image_bytes(source, limits=limits), name, limits)
    if numpy is not None and isinstance(source, numpy.ndarray):
        return _from_array(source, name, limits)
    raise ImageError(f"{name}: not an image; give a path, URL, bytes, PIL image or numpy array")


def image_format(data: bytes) -> str:
    """`jpg`, `png`, `webp`, `gif` or `bmp` by an image file's first bytes; empty for anything else."""
    return next((name for (magic, _), name in zip(_DECODERS, _SUFFIXES, strict=True) if magic.match(data)), "")


def load_pixels(
    source: ImageSource, *, at_least: tuple[int, int], limits: ImageLimits = DEFAULT_LIMITS
) -> "np.ndarray":
    """What `load_image` gives, as uint8 (H, W, 3), where a smaller picture will do: fast, for training.

    A JPEG file comes at 1/2, 1/4 or 1/8 of its size, the smallest that leaves both sides as long as `at_least` (height,
    width), in a half to a quarter of the time. Everything else comes whole. The limits hold for the file's own size.
    Raises ImageError (URLError for URLs), one line that names the source.
    """
    import numpy as np

    if not isinstance(source, str | os.PathLike | bytes | bytearray):
        return np.array(load_image(source, limits=limits))
    name = source_name(source)
    data = image_bytes(source, limits=limits)
    image = _open(data, name, limits)
    _check_size(image.size, name, limits)
    pixels = _decode_jpeg(data, image, at_least) if isinstance(image, JpegImagePlugin.JpegImageFile) else None
    return np.array(_to_rgb(image, name, limits)) if pixels is None else pixels


def image_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) that `load_image` gives, without decoding pixels where a file's header tells. A URL is fetched.

    Raises ImageError (URLError for URLs), one line that names the source.
    """
    name = source_name(source)
    if isinstance(source, str) and is_url(source) and source[:5].lower() != "data:":
        return load_image(source, limits=limits).size[::-1]
    if isinstance(source, PILImage.Image):
        image = source
    elif isinstance(source, bytes | bytearray):
        image = _open(bytes(source), name, limits)
    elif isinstance(source, str) and is_url(source):
        image = _open(_data_url_bytes(source, limits), name, limits)
    elif isinstance(source, str | os.PathLike):
        image = _open(_read_file(source, name, limits), name, limits)
    else:
        return load_image(source, limits=limits).size[::-1]
    _check_size(image.size, name, limits)
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def image_bytes(source: "str | os.PathLike[str] | bytes", *, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The undecoded file behind a path, an http(s) or data URL, or bytes. Raises ImageError (URLError for URLs)."""
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, str) and is_url(source):
        if source[:5].lower() == "data:":
            return _data_url_bytes(source, limits)
        return fetch_bytes(
            source,
            max_bytes=limits.max_bytes,
            timeout_s=limits.timeout_s,
            max_redirects=limits.max_redirects,
            allow_private_addresses=limits.allow_private_addresses,
            headers={"Accept": "image/*,*/*;q=0.5"},
        )
    return _read_file(source, source_name(source), limits)


def to_file(image: PILImage.Image, suffix: str = "png") -> bytes:
    """An RGB image as a file: `png` (lossless), `jpg` or `webp` (at quality 90)."""
    buffer = io.BytesIO()
    if suffix == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[suffix], quality=90)
    return buffer.getvalue()


def _read_file(path: str | os.PathLike[str], name: str, limits: ImageLimits) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name}: is a folder, not an image")
        if not stat.S_ISREG(mode):  # opening a pipe or a device could block, or never end
            raise ImageError(f"{name}: not a regular file")
        with open(path, "rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or _one_line(error)}") from error
    except ImageError:
        raise
    except ValueError as error:  # a zero byte inside the path
        raise ImageError(f"{name}: {_one_line(error)}") from error
    return data


def _decode(data: bytes, name: str, limits: ImageLimits) -> PILImage.Image:
    return _to_rgb(_open(data, name, limits), name, limits)


def _decode_jpeg(data: bytes, image: PILImage.Image, at_least: tuple[int, int]) -> "np.ndarray | None":
    """uint8 (H, W, 3), upright; None where Pillow must decide: CMYK, and whatever else is not in perfect order."""
    import numpy as np
    import simplejpeg

    width, height = image.size
    orientation = _orientation(image)
    least_height, least_width = at_least[::-1] if orientation in _SIDEWAYS else at_least
    # Not 3/8 to 7/8, which the decoder has as well: they take longer than the whole picture
    scale = next((s for s in (8, 4, 2) if height >= s * least_height and width >= s * least_width), 1)
    try:
        if image.mode == "CMYK" or simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    except (ValueError, RuntimeError):
        return None
    if (upright := _UPRIGHT.get(orientation)) is not None:
        pixels = np.array(PILImage.fromarray(pixels).transpose(upright))
    return pixels


def _open(data: bytes, name: str, limits: ImageLimits) -> PILImage.Image:
    """The image with its header read, not yet decoded."""
    if not data:
        raise ImageError(f"{name}: empty")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{name}: larger than the limit of {limits.max_bytes:,} bytes")
    decoder = next((decoder for magic, decoder in _DECODERS if magic.match(data)), None)
    if decoder is None:
        raise ImageError(f"{name}: not a JPEG, PNG, WEBP, GIF or BMP image")
    if decoder is JpegImagePlugin.JpegImageFile:
        _check_jpeg_segments(data, name)
    try:
        if decoder is GifImagePlugin.GifImageFile:
            decoder(io.BytesIO(data[:_MAX_GIF_PREAMBLE]))  # raises unless the first frame starts in there
        return decoder(io.BytesIO(data))
    except Exception as error:  # decoders raise anything at all on hostile bytes
        raise ImageError(f"{name}: broken image ({_one_line(error) or type(error).__name__})") from error


def _check_jpeg_segments(data: bytes, name: str) -> None:
    num_scans = num_segments = 0
    frames: list[tuple[int, bytes]] = []  # (code, number of components) of each
    position = 2
    while found := _JPEG_MARKER.search(data, position):
        start = found.end()
        code = data[start - 1]
        if code == 0xD9:  # end of image; phones append videos after it
            return
        num_segments += 1
        num_scans += code == 0xDA
        if num_scans > _MAX_JPEG_SCANS or num_segments > _MAX_JPEG_SEGMENTS:
            raise ImageError(f"{name}: a JPEG of {num_scans} scans in {num_segments} segments or more")
        if code in _JPEG_FRAMES:
            frames.append((code, data[start + 7 : start + 8]))
        elif code == 0xDA and frames in ([(0xC0, data[start + 2 : start + 3])], [(0xC1, data[start + 2 : start + 3])]):
            return  # not progressive, and all components in the first scan: libjpeg takes a second one for an error
        position = start + int.from_bytes(data[start : start + 2], "big")


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    if width * height > limits.max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels, over the limit of {limits.max_pixels:,} pixels")


def _to_rgb(image: PILImage.Image, name: str, limits: ImageLimits) -> PILImage.Image:
    _check_size(image.size, name, limits)  # opened, not yet decoded
    try:
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        if image.mode.startswith("I") or image.mode == "F":
            rgb = _from_deep_grey(image, name, limits)
        elif image.has_transparency_data:
            rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            white = PILImage.new("RGBA", rgba.size, "white")
            rgb = PILImage.alpha_composite(white, rgba).convert("RGB")
        else:
            rgb = image.convert("RGB")
        if upright is not None:
            rgb = rgb.transpose(upright)
    except ImageError:
        raise
    except Exception as error:  # as above: truncated data, broken palettes, bad chunks
        raise ImageError(f"{name}: broken image ({_one_line(error) or type(error).__name__})") from error
    rgb.info = {}  # an orientation left behind would turn the image again the next time it is loaded
    return rgb


def _orientation(image: PILImage.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF around a sound picture is common: show it as stored, as browsers do
        return 1


def _from_deep_grey(image: PILImage.Image, name: str, limits: ImageLimits) -> PILImage.Image:
    """Modes I;16*, I (Pillow's other home of 16-bit greyscale) and F (range 0 to 1). PIL's own convert() clips them."""
    import numpy as np

    grey = np.asarray(image)
    if image.mode == "F":
        return _from_array(grey, name, limits)
    if grey.min() < 0 or grey.max() > 65535:
        raise ImageError(f"{name}: 32-bit greyscale with values outside 0 to 65535")
    transparent = grey == image.info.get("transparency", -1)  # PNG's tRNS: this one grey is see-through
    eight_bit = (grey.astype(np.uint32) * 255 + 32767) // 65535
    return _from_array(np.where(transparent, 255, eight_bit).astype(np.uint8), name, limits)


def _from_array(array: "np.ndarray", name: str, limits: ImageLimits) -> PILImage.Image:
    import numpy as np

    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name}: shape {array.shape} is not (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    _check_size((array.shape[1], array.shape[0]), name, limits)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # written so that NaN is refused
            raise ImageError(f"{name}: float values must lie in [0, 1], these span [{low:g}, {high:g}]")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: dtype {array.dtype} is neither uint8 nor float")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _to_rgb(PILImage.fromarray(np.ascontiguousarray(array)), name, limits)


def _data_url_bytes(url: str, limits: ImageLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise URLError(f"{source_name(url)}: not of the form data:image/...;base64,...")
    if len(payload) // 4 * 3 > limits.max_bytes + 3:
        raise URLError(f"{source_name(url)}: larger than the limit of {limits.max_bytes:,} bytes")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise URLError(f"{source_name(url)}: {_one_line(error)}") from error
