"""Rules for images: size, shape, file, colour, URL, and whether an image comes again in its document. Those that come
again over the whole corpus are found by `image_duplicates`.

`URLFilter` needs no file: run it before images are fetched. `ImageFilter` reads each file once and decodes it only
where a rule asks for pixels. An image that is still a URL is never fetched here and passes; so fetch first.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image as PILImage

from mm_gpt.datasets.duplicates.image_hash import content_hash, hamming, perceptual_hash
from mm_gpt.document import Document, Image, Segment
from mm_gpt.errors import ConfigError, ImageError
from mm_gpt.images import IMAGE_FORMATS, Concepts, image_bytes, image_format, image_size, is_url, load_image

logger = logging.getLogger(__name__)

OBELICS_URL_PARTS = ("logo", "button", "icon", "plugin", "widget")
"""Of addresses that show no content. As published, "icon" is found in "silicon-valley.jpg" as well."""


class ImageFile:
    """An image with what the rules ask of it, each read once and only when it is needed. Raises ImageError."""

    def __init__(self, image: Image) -> None:
        self.image = image

    @cached_property
    def data(self) -> bytes | None:
        """The file's bytes; None for an image that is decoded already."""
        source = self.image.source
        if isinstance(source, PILImage.Image | Concepts) or hasattr(source, "__array__"):
            return None
        return image_bytes(source)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width), from the header."""
        return image_size(self.image.source if self.data is None else self.data)

    @cached_property
    def pixels(self) -> PILImage.Image:
        return load_image(self.image.source if self.data is None else self.data)

    @cached_property
    def key(self) -> str:
        """`content_hash` of the file, or of the pixels where there is no file."""
        return content_hash(self.pixels.tobytes() if self.data is None else self.data)

    @cached_property
    def look(self) -> int:
        return perceptual_hash(self.pixels)


def is_single_coloured(image: PILImage.Image, tolerance: int = 8) -> bool:
    """Whether the values of each colour channel lie within `tolerance` of 255: blank, but for a compressor's noise."""
    extrema = image.convert("RGB").getextrema()
    return all(high - low <= tolerance for low, high in extrema)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class URLFilter:
    """Removes images whose URL contains one of `parts`, in whatever case. Images without a URL pass."""

    parts: tuple[str, ...] = OBELICS_URL_PARTS
    name: str = "image URLs"

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not all(self.parts):
            raise ConfigError(f"parts: give a tuple of words, not {self.parts!r}")

    def __call__(self, document: Document, removed: Counter[str]) -> Document:
        return _without(document, self._broken_rule, removed)

    def _broken_rule(self, image: Image) -> str | None:
        if not _is_web_url(image):
            return None
        url = str(image.source).lower()
        return next((f"{part!r} in its URL" for part in self.parts if part.lower() in url), None)


@dataclass(frozen=True, kw_only=True)
class ImageFilter:
    """Removes images that break a rule, and those that cannot be read. A bound that is None is not checked.

    The rules on bytes and format hold for files only, not for images that are decoded already.
    """

    min_side: int | None = None
    """Pixels of the shorter side."""
    max_side: int | None = None
    """Pixels of the longer side."""
    max_aspect_ratio: float | None = None
    """Longer side by shorter side."""
    formats: tuple[str, ...] | None = None
    """Of `mm_gpt.images.IMAGE_FORMATS` (`jpg`, `png`, ...), told by content."""
    min_bytes: int | None = None
    max_bytes: int | None = None
    min_bytes_per_pixel: float | None = None
    """A file's bytes by its pixels. Photos take 0.1 to 1; plain areas and gradients less than 0.02."""
    single_colour_tolerance: int | None = None
    """Removes images whose colour values differ by no more than this, of 255. See `is_single_coloured`."""
    unique: bool = False
    """Removes an image whose file the document already has."""
    min_distance: int | None = None
    """Removes an image whose look differs in fewer bits than this from one that the document already has. Of 64;
    6 to 10 find copies (see `datasets.image_hash`)."""
    name: str = "images"

    def __post_init__(self) -> None:
        for bound in ("min_side", "max_side", "min_bytes", "max_bytes", "min_bytes_per_pixel", "min_distance"):
            value = getattr(self, bound)
            if value is not None and not value >= 0:
                raise ConfigError(f"{bound}: must be at least 0, is {value}")
        if self.max_aspect_ratio is not None and not self.max_aspect_ratio >= 1:
            raise ConfigError(f"max_aspect_ratio: must be at least 1, is {self.max_aspect_ratio}")
        unknown = set(self.formats or ()) - set(IMAGE_FORMATS)
        if unknown:
            raise ConfigError(f"formats: {', '.join(sorted(unknown))}: known are {', '.join(IMAGE_FORMATS)}")

    def __call__(self, document: Document, removed: Counter[str]) -> Document:
        kept: list[ImageFile] = []

        def broken_rule(image: Image) -> str | None:
            if _is_web_url(image):
                return None
            file = ImageFile(image)
            try:
                rule = self._broken_rule(file, kept)
            except ImageError as error:
                logger.debug("%s: %s", document.id, error)
                return "unreadable"
            if rule is None and (self.unique or self.min_distance is not None):
                kept.append(_features_of(file))
            return rule

        return _without(document, broken_rule, removed)

    def _broken_rule(self, file: ImageFile, kept: list[ImageFile]) -> str | None:
        """The first rule that the image breaks: those on the file, on its header, on its pixels."""
        num_bytes = None if file.data is None else len(file.data)
        if file.data is not None and self.formats is not None and image_format(file.data) not in self.formats:
            return "format"
        if num_bytes is not None and self.min_bytes is not None and num_bytes < self.min_bytes:
            return "file too small"
        if num_bytes is not None and self.max_bytes is not None and num_bytes > self.max_bytes:
            return "file too large"
        short, long = sorted(file.size)
        if self.min_side is not None and short < self.min_side:
            return "too small"
        if self.max_side is not None and long > self.max_side:
            return "too large"
        if self.max_aspect_ratio is not None and long > self.max_aspect_ratio * short:
            return "aspect ratio"
        min_bytes = (self.min_bytes_per_pixel or 0) * short * long
        if num_bytes is not None and num_bytes < min_bytes:
            return "too few bytes per pixel"
        if self.unique and any(file.key == other.key for other in kept):
            return "repeated in the document"
        if self.single_colour_tolerance is not None and is_single_coloured(file.pixels, self.single_colour_tolerance):
            return "single colour"
        if self.min_distance is not None and any(hamming(file.look, x.look) < self.min_distance for x in kept):
            return "looks repeated in the document"
        return None


def _without(document: Document, broken_rule: Callable[[Image], str | None], removed: Counter[str]) -> Document:
    """The document without the images for which `broken_rule` names a rule; each is counted under it."""
    kept: list[Segment] = []
    for segment in document.segments:
        rule = broken_rule(segment) if isinstance(segment, Image) else None
        if rule:
            removed[f"image: {rule}"] += 1
        else:
            kept.append(segment)
    return replace(document, segments=tuple(kept)) if len(kept) < len(document.segments) else document


def _is_web_url(image: Image) -> bool:
    return is_url(image.source) and str(image.source)[:5].lower() != "data:"


def _features_of(file: ImageFile) -> ImageFile:
    """The file without its bytes and pixels: those of a whole page would be a lot to keep."""
    features = ImageFile(file.image)
    features.__dict__.update({name: file.__dict__[name] for name in ("key", "look") if name in file.__dict__})
    return features
