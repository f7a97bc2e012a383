"""Image -> normalised float tensor: exact (`ImageTransform`), fast (`FastTransform`) and augmented (`TrainTransform`).

Two backends resize, both always antialiased. "pil" is PIL's own: the numbers of torchvision's `Resize` on PIL images,
and so of open_clip. "torchvision" resizes uint8 tensors: the numbers, bit for bit, of the image processors that
`transformers` loads by default, and so of the public vision-language models. They round differently, by up to two grey
levels in one percent of the values. H and W are a height and a width in pixels.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image as PILImage
from torch.nn import functional as F

from mm_gpt.errors import ConfigError, ImageError, unknown_name
from mm_gpt.images import pixel_array

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MODES = ("squash", "pad", "crop")
_BACKENDS = ("pil", "torchvision")
_FILTERS = {
    "bicubic": PILImage.Resampling.BICUBIC,
    "bilinear": PILImage.Resampling.BILINEAR,
    "lanczos": PILImage.Resampling.LANCZOS,
}
_GREY = torch.tensor([[0.299, 0.587, 0.114]] * 3, dtype=torch.float64)
"""Every channel becomes the pixel's grey (Rec. 601)."""
_MAX_INTERMEDIATE = 2**27
"""Pixels of what is resized or padded before the crop (400 MB): a 1 x 100,000 sliver would take 15 GB."""


@dataclass(frozen=True)
class ImageTransformConfig:
    """How an image of any size becomes a square tensor. Checked when built: ConfigError."""

    size: int
    """Width and height of the output, in pixels."""
    mode: Literal["squash", "pad", "crop"] = "squash"
    """squash: resize both sides. pad: keep the aspect ratio, centre, fill with the mean colour (torchvision pads before
    it resizes). crop: resize the short side, cut out the centre (loses what is left and right of it)."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Per channel R, G, B, of values in [0, 1]."""
    std: tuple[float, ...] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    backend: Literal["pil", "torchvision"] = "pil"
    short_side: int | None = None
    """Mode "crop": what the short side is resized to before the cut; None for `size`."""

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"size must be a whole number of pixels above 0, not {self.size!r}")
        if self.mode not in _MODES:
            raise ConfigError(unknown_name("mode", str(self.mode), _MODES))
        if self.interpolation not in _FILTERS:
            raise ConfigError(unknown_name("interpolation", str(self.interpolation), _FILTERS))
        if self.backend not in _BACKENDS:
            raise ConfigError(unknown_name("backend", str(self.backend), _BACKENDS))
        if self.short_side is not None and (self.mode != "crop" or self.short_side < self.size):
            raise ConfigError(f"short_side is for mode 'crop' and at least size ({self.size}), not {self.short_side!r}")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ConfigError(f"{key} must be three numbers (R, G, B), not {values!r}")
        if min(self.std) <= 0:
            raise ConfigError(f"std must be above 0, not {self.std!r}")


class ImageTransform:
    """RGB PIL image -> float32 (3, size, size), normalised. Deterministic. Raises ImageError if it is not RGB."""

    def __init__(self, config: ImageTransformConfig) -> None:
        self.config = config

    def __call__(self, image: PILImage.Image) -> torch.Tensor:
        return self.to_tensor(self.resize(image))

    def resize(self, image: PILImage.Image) -> PILImage.Image:
        """The image at its final scale: size x size, or smaller on one side in mode "pad" of the PIL backend."""
        require_rgb(image)
        if self.config.backend == "torchvision":
            return from_pixels(self._resize_pixels(to_pixels(image)))
        size, resample = self.config.size, _FILTERS[self.config.interpolation]
        width, height = image.size
        if self.config.mode == "squash":
            return image.resize((size, size), resample)
        if self.config.mode == "pad":
            scale = size / max(width, height)
            return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resample)
        # crop: the part that survives is resized alone. Resizing everything first gives the same pixels, but would
        # blow a 1 x 1000 sliver up to size x 1000*size.
        target, short = self.config.short_side or size, min(width, height)
        left, right = _kept_span(width, size, target, short)
        top, bottom = _kept_span(height, size, target, short)
        return image.resize((size, size), resample, box=(left, top, right, bottom))

    def _resize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (3, H, W) -> (3, size, size), by the steps and the roundings of the transformers processors."""
        size, (height, width) = self.config.size, pixels.shape[-2:]
        if self.config.mode == "pad" and height != width:
            long = max(height, width)
            _refuse_blow_up(height, width, long * long)
            canvas = torch.tensor([int(mean * 255) for mean in self.config.mean], dtype=torch.uint8)[:, None, None]
            canvas = canvas.repeat(1, long, long)
            top, left = (long - height) // 2, (long - width) // 2
            canvas[:, top : top + height, left : left + width] = pixels
            pixels = canvas
        if self.config.mode != "crop":
            return resize_pixels(pixels, size, size, self.config)
        # The whole image is resized: resizing the surviving part alone would be one grey level off here and there.
        target, short = self.config.short_side or size, min(height, width)
        resized_height, resized_width = int(target * height / short), int(target * width / short)
        _refuse_blow_up(height, width, resized_height * resized_width)
        pixels = resize_pixels(pixels, resized_height, resized_width, self.config)
        top, left = (resized_height - size) // 2, (resized_width - size) // 2
        return pixels[:, top : top + size, left : left + size]

    def to_tensor(self, resized: PILImage.Image) -> torch.Tensor:
        """Normalise, and in mode "pad" centre on the mean colour, which is 0 after normalising."""
        size = self.config.size
        pixels = normalise(to_pixels(resized).contiguous(), self.config)
        _, height, width = pixels.shape
        if (height, width) == (size, size):
            return pixels
        canvas = torch.zeros(3, size, size)
        top, left = (size - height) // 2, (size - width) // 2
        canvas[:, top : top + height, left : left + width] = pixels
        return canvas


@runtime_checkable
class Decodable(Protocol):
    """An image that is not decoded yet: a `document.Image`."""

    def pixels(self, *, at_least: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W, 3), not smaller than `at_least` (height, width) where the image is not."""


@dataclass(frozen=True)
class Crop:
    """A part of an image, in shares of its sides: it can be chosen before the image is decoded."""

    width: float = 1.0
    height: float = 1.0
    left: float = 0.0
    """How much of what is cut off lies left of it."""
    top: float = 0.0

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """left, top, right, bottom in an image of that size. At least a pixel."""
        crop_width = min(width, max(1, round(width * self.width)))
        crop_height = min(height, max(1, round(height * self.height)))
        left, top = round((width - crop_width) * self.left), round((height - crop_height) * self.top)
        return left, top, left + crop_width, top + crop_height


class FastTransform:
    """Image -> float32 (3, size, size), normalised: an ImageTransform in a fraction of its time, for large amounts.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves as many pixels as the output needs (its inverse
    cosine transform does the scaling), what is kept is resized by torch as uint8, and all that happens to colours is
    one matrix product. The result is about 40 dB from ImageTransform's: for training and for features of a corpus,
    not where pixel values must be those of a public checkpoint. "lanczos" is bicubic here, which torch has.

    Raises ImageError for an image that cannot be decoded, or a PIL image that is not RGB.
    """

    def __init__(self, config: ImageTransformConfig) -> None:
        self.config = config
        std = 255 * torch.tensor(config.std, dtype=torch.float64)
        black = -torch.tensor(config.mean, dtype=torch.float64) * 255 / std
        self._scale, self._black, self._white = std.reciprocal(), black, black + 255 / std

    def __call__(self, image: Decodable | PILImage.Image) -> torch.Tensor:
        crop = self._crop()
        if isinstance(image, Decodable):
            decoded = image.pixels(at_least=self._needed(crop))
        else:
            require_rgb(image)
            decoded = pixel_array(image)
        pixels = self._resize(decoded, crop)
        height, width = pixels.shape[-2:]
        values = self._colour(pixels.flatten(1).float()).view(3, height, width)
        size = self.config.size
        if (height, width) == (size, size):
            return values
        canvas = torch.zeros(3, size, size)  # the mean colour
        top, left = (size - height) // 2, (size - width) // 2
        canvas[:, top : top + height, left : left + width] = values
        return canvas

    def _crop(self) -> Crop:
        return Crop()

    def _needed(self, crop: Crop) -> tuple[int, int]:
        """Height and width of an image whose crop has at least as many pixels as the output."""
        size = self.config.short_side or self.config.size
        return math.ceil(size / crop.height), math.ceil(size / crop.width)

    def _resize(self, pixels: np.ndarray, crop: Crop) -> torch.Tensor:
        """uint8 (H, W, 3) -> (3, H, W) at its final scale: size x size, or smaller on one side in mode "pad"."""
        box, size = crop.box(pixels.shape[1], pixels.shape[0]), self.config.size
        width, height = box[2] - box[0], box[3] - box[1]
        out = size, size
        if self.config.mode == "pad":
            scale = size / max(width, height)
            out = max(1, round(height * scale)), max(1, round(width * scale))
        elif self.config.mode == "crop":
            target, short = self.config.short_side or size, min(width, height)
            left, right = _whole(_kept_span(width, size, target, short))
            top, bottom = _whole(_kept_span(height, size, target, short))
            box = box[0] + left, box[1] + top, box[0] + right, box[1] + bottom
        kept = np.ascontiguousarray(pixels[box[1] : box[3], box[0] : box[2]])
        filter = "bilinear" if self.config.interpolation == "bilinear" else "bicubic"
        return F.interpolate(torch.from_numpy(kept).permute(2, 0, 1)[None], out, mode=filter, antialias=True)[0]

    def _colour(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise (3, N) of 0 to 255."""
        return pixels.mul_(self._scale[:, None].float()).add_(self._black[:, None].float())


class TrainTransform(FastTransform):
    """A FastTransform with a random crop and a little colour jitter.

    70 to 100 % of the area is kept, its aspect ratio changed by at most 4:3, then the config's own mode applies, so
    that training sees what evaluation sees. Brightness, contrast and saturation change by up to 10 %; the hue stays,
    since captions name colours.

    No horizontal flip: it mirrors written words and swaps left and right, so that text and image might disagree. Where
    the texts are known, `Image(source, mirrored=True)` does it.

    All randomness comes from `generator`. Seed it per sample (`transform.generator.manual_seed(...)`) where order or
    worker processes must not matter: copies of one generator in several workers repeat each other.
    """

    min_area = 0.7
    max_aspect_change = 4 / 3
    jitter = 0.1

    def __init__(self, config: ImageTransformConfig, generator: torch.Generator) -> None:
        super().__init__(config)
        self.generator = generator

    def _crop(self) -> Crop:
        area = self._uniform(self.min_area, 1.0)
        aspect = math.exp(self._uniform(-1.0, 1.0) * math.log(self.max_aspect_change))
        width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
        return Crop(width, height, left=self._uniform(0, 1), top=self._uniform(0, 1))

    def _colour(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise (3, N) of 0 to 255 after brightness, contrast and saturation, as PIL's ImageEnhance does them.

        Each is linear in the pixels: a blend with black, with the mean grey of the picture, with each pixel's own grey.
        """
        low, high = 1 - self.jitter, 1 + self.jitter
        brightness, contrast, saturation = (self._uniform(low, high) for _ in range(3))
        matrix = brightness * contrast * (saturation * torch.eye(3, dtype=torch.float64) + (1 - saturation) * _GREY)
        shift = brightness * (1 - contrast) * (_GREY @ pixels.mean(dim=1).double())
        matrix, shift = matrix * self._scale[:, None], shift * self._scale + self._black
        values = torch.addmm(shift[:, None].float(), matrix.float(), pixels)
        for channel, black, white in zip(values, self._black.tolist(), self._white.tolist(), strict=True):
            channel.clamp_(black, white)
        return values

    def _uniform(self, low: float, high: float) -> float:
        # float64, so that the draw is not rounded to float32 steps on very large images
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()


def to_pixels(image: PILImage.Image) -> torch.Tensor:
    """uint8 (3, H, W) of an RGB image."""
    return torch.from_numpy(pixel_array(image)).permute(2, 0, 1)


def from_pixels(pixels: torch.Tensor) -> PILImage.Image:
    return PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def resize_pixels(pixels: torch.Tensor, height: int, width: int, config: ImageTransformConfig) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, height, width) with the backend and the filter of `config`."""
    if config.backend == "pil":
        return to_pixels(from_pixels(pixels).resize((width, height), _FILTERS[config.interpolation]))
    # Imported where it is needed: it takes as long as torch, and only public checkpoints use this backend. The older
    # transforms.functional goes through float32 and rounds differently.
    import torchvision
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    if config.interpolation == "lanczos" and tuple(map(int, torchvision.__version__.split(".")[:2])) < (0, 27):
        raise ConfigError(
            f"lanczos on tensors needs torchvision 0.27, not {torchvision.__version__}; backend 'pil' has it as well"
        )
    return tv.resize(pixels, [height, width], InterpolationMode(config.interpolation), antialias=True)


def normalise(pixels: torch.Tensor, config: ImageTransformConfig) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32: values in [0, 1], minus the mean, divided by the standard deviation."""
    mean, std = torch.tensor(config.mean)[:, None, None], torch.tensor(config.std)[:, None, None]
    if config.backend == "torchvision":  # the same in one step less, which differs in the last bit
        return pixels.float().sub_(mean * 255).div_(std * 255)
    return pixels.float().div_(255).sub_(mean).div_(std)


def _kept_span(length: int, size: int, target: int, short: int) -> tuple[float, float]:
    """Start and end, in source pixels, of what a centre crop of `size` keeps of a side of `length`.

    The crop comes after a resize of the side `short` to `target`. Rounds the resized length down and the offset to
    even, as torchvision's Resize and CenterCrop do.
    """
    resized = int(target * length / short)
    offset = round((resized - size) / 2)
    scale = length / resized
    return offset * scale, min(float(length), (offset + size) * scale)


def _whole(span: tuple[float, float]) -> tuple[int, int]:
    """A span in whole pixels, at least one."""
    start = math.floor(min(round(span[0]), span[1] - 0.5))
    return start, max(start + 1, round(span[1]))


def _refuse_blow_up(height: int, width: int, pixels: int) -> None:
    if pixels > _MAX_INTERMEDIATE:
        raise ImageError(f"an image of {width} x {height} pixels is too long and thin: it would be resized to {pixels}")


def require_rgb(image: PILImage.Image) -> None:
    if not isinstance(image, PILImage.Image) or image.mode != "RGB":
        what = f"mode {image.mode!r}" if isinstance(image, PILImage.Image) else type(image).__name__
        raise ImageError(f"the image transform takes an RGB PIL image, not {what}; see mm_gpt.images.load_image")
