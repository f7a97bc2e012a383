"""Images from files, bytes, arrays and URLs, for input that nobody has checked.

A picture from the web may be broken, mislabelled or made to do harm. So: only a few decoders ever run, sizes are read
from the header and refused before a pixel is decoded (`image_headers`), and a URL is fetched only from a public
address (`network`). What comes out is always an upright RGB image; everything else is an `ImageError` of one line.

Memory: while an image is decoded it takes at most `BYTES_PER_PIXEL` for each of its pixels, then 4. Work that may meet
many large images at once asks a `ByteBudget` first.
"""

import io
import os
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from PIL import BmpImagePlugin, GifImagePlugin, ImageFile, PngImagePlugin, TiffImagePlugin
from PIL import Image as PILImage

from mm_gpt.errors import ImageError, URLError
from mm_gpt.image_headers import IMAGE_FORMATS as IMAGE_FORMATS
from mm_gpt.image_headers import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from mm_gpt.image_headers import check_file, exif_orientation, find_format, not_read, png_transparency
from mm_gpt.network.client import fetch_bytes
from mm_gpt.network.urls import data_url_bytes, short_name
from mm_gpt.network.urls import one_line as _one_line

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Concepts:
    """An image of which nothing is known but what it shows, for models with concepts (`mm_gpt.vision.concepts`)."""

    scores: Mapping[str, float]
    """Probabilities by the names of the model's concepts."""


ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | PILImage.Image | np.ndarray | Concepts"
"""A path, an http(s) or data URL, the bytes of an image file, a PIL image, or an array (see `load_image`)."""


@dataclass(frozen=True)
class ImageLimits:
    """What is refused. The pixel limit holds for every source, the byte limit for files, bytes and downloads."""

    max_pixels: int = 64_000_000
    """Width x height. 64 megapixels hold any ordinary camera's photo and decode into 256 MB."""
    max_bytes: int = 64 * 2**20
    timeout_s: float = 15.0
    """For a whole download: connecting, TLS, headers, redirects and body together."""
    max_redirects: int = 5
    allow_private_addresses: bool = False
    """True: also fetch from localhost and the local network. Never for URLs that strangers write."""


DEFAULT_LIMITS = ImageLimits()

BYTES_PER_PIXEL = 20
"""At most, while a file is decoded: the decoder's own buffers and the picture. WEBP takes 16, a plain JPEG 4."""

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

_STRIP = 2**18  # pixels that are converted at a time: whole copies would take as much memory again and again
_MAX_GIF_PREAMBLE = 2**19  # bytes before the first frame; Pillow joins the blocks of a comment one at a time


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
    clipped, to 8 bits. The format is told by content, never by file name: JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF.
    A file takes at most 20 bytes for each of its pixels (BYTES_PER_PIXEL) while it is decoded, the image 4.

    A string that is no URL is read as a path. A server must not pass a stranger's string here without `is_url`.
    Raises ImageError (URLError for URLs), one line that names the source.
    """
    name = source_name(source)
    numpy = sys.modules.get("numpy")  # whoever holds an array has imported it
    if isinstance(source, PILImage.Image):
        _check_size(source.size, name, limits)  # opened, not yet decoded
        with _broken_is_an_error(name):
            orientation = _orientation(source)
            source.load()
            image = source.copy() if source.mode in ("RGB", "RGBA") else source  # which is not ours to change
            return _to_rgb(image, orientation, name, limits, is_bmp=isinstance(source, BmpImagePlugin.BmpImageFile))
    if isinstance(source, str | os.PathLike | bytes | bytearray):
        return _decode(image_bytes(source, limits=limits), name, limits)
    if numpy is not None and isinstance(source, numpy.ndarray):
        return _from_array(source, name, limits)
    if isinstance(source, Concepts):
        raise ImageError("only the concepts of this image are known, not its pixels")
    raise ImageError(f"{name}: not an image; give a path, URL, bytes, PIL image or numpy array")


def image_format(data: bytes) -> str:
    """One of IMAGE_FORMATS (`jpg`, `png`, ...) by an image file's first bytes; empty for anything else."""
    format = find_format(data)
    return "" if format is None else format.suffixes[0]


def load_pixels(
    source: ImageSource, *, at_least: tuple[int, int], limits: ImageLimits = DEFAULT_LIMITS
) -> "np.ndarray":
    """What `load_image` gives, as uint8 (H, W, 3), where a smaller picture will do: fast, for training.

    A JPEG file comes at 1/2, 1/4 or 1/8 of its size, the smallest that leaves both sides as long as `at_least` (height,
    width), in a half to a quarter of the time. Everything else comes whole. The limits hold for the file's own size.
    Raises ImageError (URLError for URLs), one line that names the source.
    """
    if not isinstance(source, str | os.PathLike | bytes | bytearray):
        return pixel_array(load_image(source, limits=limits))
    name = source_name(source)
    data = image_bytes(source, limits=limits)
    pixels = _decode_jpeg(data, name, at_least, limits) if image_format(data) == "jpg" else None
    return pixel_array(_decode(data, name, limits)) if pixels is None else pixels


def pixel_array(image: PILImage.Image) -> "np.ndarray":
    """An RGB image as uint8 (H, W, 3). It takes 3 bytes a pixel besides the image, a third of what `np.array` does."""
    import numpy as np

    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for left, top, right, bottom in _strips(image):
        pixels[top:bottom, left:right] = np.asarray(image.crop((left, top, right, bottom)))
    return pixels


def image_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) that `load_image` gives, without decoding pixels where a file's header tells. A URL is fetched.

    Raises ImageError (URLError for URLs), one line that names the source.
    """
    if isinstance(source, PILImage.Image):
        image, orientation = source, _orientation(source)
    elif isinstance(source, str | os.PathLike | bytes | bytearray):
        data = image_bytes(source, limits=limits)
        image = _open(data, source_name(source), limits)
        orientation = exif_orientation(image.info, data)
    else:
        return load_image(source, limits=limits).size[::-1]
    _check_size(image.size, source_name(source), limits)
    width, height = image.size
    return (width, height) if orientation in _SIDEWAYS else (height, width)


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


STORED_FORMATS = ("jpg", "png", "webp")
"""What `to_file` writes, and shards hold: every program that reads them knows these."""


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


class ByteBudget:
    """Bytes that several threads share: who wants more than is left waits."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, num_bytes: int) -> Iterator[None]:
        """Waits until so many are free. More than there are at all are given while nobody else has any."""
        wanted = min(num_bytes, self.num_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + wanted <= self.num_bytes)
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


def _decode(data: bytes, name: str, limits: ImageLimits) -> PILImage.Image:
    image = _open(data, name, limits)
    _check_size(image.size, name, limits)
    orientation = exif_orientation(image.info, data)
    with _broken_is_an_error(name):
        is_bmp = isinstance(image, BmpImagePlugin.BmpImageFile)
        image.load()
        # Its pixels alone: the file and its decoder hold up to three times as much
        alone = image._new(image.im)
        del image
        return _to_rgb(alone, orientation, name, limits, is_bmp=is_bmp)


def _decode_jpeg(data: bytes, name: str, at_least: tuple[int, int], limits: ImageLimits) -> "np.ndarray | None":
    """uint8 (H, W, 3), upright; None where Pillow must decide: CMYK, and whatever else is not in perfect order."""
    import numpy as np
    import simplejpeg

    image = _open(data, name, limits)
    _check_size(image.size, name, limits)
    width, height = image.size
    orientation = exif_orientation(image.info)
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
        pixels = pixel_array(PILImage.fromarray(pixels).transpose(upright))
    return pixels


def _open(data: bytes, name: str, limits: ImageLimits) -> ImageFile.ImageFile:
    """The image with its header read, not yet decoded."""
    if not data:
        raise ImageError(f"{name}: empty")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{name}: larger than the limit of {limits.max_bytes:,} bytes")
    format = find_format(data)
    if format is None:
        raise ImageError(f"{name}: {not_read(data)}")
    try:
        check_file(format, data)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    with _broken_is_an_error(name):
        if format.decoder is GifImagePlugin.GifImageFile:
            format.decoder(io.BytesIO(data[:_MAX_GIF_PREAMBLE]))  # raises unless the first frame starts in there
        image = format.decoder(io.BytesIO(data))
        if format.decoder is PngImagePlugin.PngImageFile and "transparency" in image.info:
            image.info["transparency"] = png_transparency(data, image.info["transparency"])
        return image


@contextmanager
def _broken_is_an_error(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything at all on hostile bytes: broken palettes, chunks, streams
        raise ImageError(f"{name}: broken image ({_one_line(error) or type(error).__name__})") from error


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    if width * height > limits.max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels, over the limit of {limits.max_pixels:,} pixels")


def _to_rgb(
    image: PILImage.Image, orientation: int, name: str, limits: ImageLimits, *, is_bmp: bool = False
) -> PILImage.Image:
    """RGB and upright. Takes an image over that is RGB or RGBA; others stay as they were."""
    if is_bmp and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image.putalpha(255)  # many programs leave these bytes empty, and mean an opaque picture
    is_deep = image.mode.startswith("I") or image.mode == "F"
    if image.mode == "RGB" and not image.has_transparency_data:
        rgb = image
    else:
        rgb = PILImage.new("RGB", image.size)
        for box in _strips(image):
            strip = image.crop(box)
            rgb.paste(_from_deep_grey(strip, name, limits) if is_deep else _on_white(strip), box)
    if (upright := _UPRIGHT.get(orientation)) is not None:
        rgb = rgb.transpose(upright)
    rgb.info = {}  # an orientation left behind would turn the image again the next time it is loaded
    return rgb


def _strips(image: PILImage.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of at most `_STRIP` pixels that cover the image: left, top, right, bottom."""
    width = min(image.width, _STRIP)
    height = _STRIP // width
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            yield left, top, min(left + width, image.width), min(top + height, image.height)


def _on_white(image: PILImage.Image) -> PILImage.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _orientation(image: PILImage.Image) -> int:
    """Of an image that somebody else opened. TIFF's size and pixels are turned by Pillow itself."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
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
        rows = max(1, _STRIP // array[0].size)
        parts = [np.rint(array[at : at + rows] * 255).astype(np.uint8) for at in range(0, len(array), rows)]
        array = np.concatenate(parts)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: dtype {array.dtype} is neither uint8 nor float")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _to_rgb(PILImage.fromarray(np.ascontiguousarray(array)), 1, name, limits)


def _data_url_bytes(url: str, limits: ImageLimits) -> bytes:
    try:
        return data_url_bytes(url, limits.max_bytes)
    except ValueError as error:
        raise URLError(f"{source_name(url)}: {error}") from None
