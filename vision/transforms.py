"""PIL image -> normalised float tensor, for evaluation (`ImageTransform`) and with augmentation (`TrainTransform`).

Resizing is PIL's own, always antialiased: the numbers of torchvision's `Resize` on PIL images, and so of open_clip.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageEnhance

from mm_gpt.errors import ConfigError, ImageError, unknown_name

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MODES = ("squash", "pad", "crop")
_FILTERS = {"bicubic": PILImage.Resampling.BICUBIC, "bilinear": PILImage.Resampling.BILINEAR}


@dataclass(frozen=True)
class ImageTransformConfig:
    """How an image of any size becomes a square tensor. Checked when built: ConfigError."""

    size: int
    """Width and height of the output, in pixels."""
    mode: Literal["squash", "pad", "crop"] = "squash"
    """squash: resize both sides. pad: keep the aspect ratio, centre, fill with the mean colour. crop: resize the short
    side, cut out the centre (loses what is left and right of it)."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Per channel R, G, B, of values in [0, 1]."""
    std: tuple[float, ...] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"size must be a whole number of pixels above 0, not {self.size!r}")
        if self.mode not in _MODES:
            raise ConfigError(unknown_name("mode", str(self.mode), _MODES))
        if self.interpolation not in _FILTERS:
            raise ConfigError(unknown_name("interpolation", str(self.interpolation), _FILTERS))
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
        """The image at its final scale: size x size, or smaller on one side in mode "pad"."""
        _require_rgb(image)
        size, resample = self.config.size, _FILTERS[self.config.interpolation]
        width, height = image.size
        if self.config.mode == "squash":
            return image.resize((size, size), resample)
        if self.config.mode == "pad":
            scale = size / max(width, height)
            return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resample)
        # crop: the part that survives is resized alone. Resizing everything first gives the same pixels, but would
        # blow a 1 x 1000 sliver up to size x 1000*size.
        left, right = _kept_span(width, size, min(width, height))
        top, bottom = _kept_span(height, size, min(width, height))
        return image.resize((size, size), resample, box=(left, top, right, bottom))

    def to_tensor(self, resized: PILImage.Image) -> torch.Tensor:
        """Normalise, and in mode "pad" centre on the mean colour, which is 0 after normalising."""
        size = self.config.size
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(255)  # (3, h, w) in [0, 1]
        mean, std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        pixels = pixels.sub_(mean[:, None, None]).div_(std[:, None, None])
        _, height, width = pixels.shape
        if (height, width) == (size, size):
            return pixels.contiguous()
        canvas = torch.zeros(3, size, size)
        top, left = (size - height) // 2, (size - width) // 2
        canvas[:, top : top + height, left : left + width] = pixels
        return canvas


class TrainTransform:
    """RGB PIL image -> float32 (3, size, size), with a random crop and a little colour jitter.

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
        self.config = config
        self.generator = generator
        self._plain = ImageTransform(config)

    def __call__(self, image: PILImage.Image) -> torch.Tensor:
        _require_rgb(image)
        resized = self._plain.resize(image.crop(self._crop_box(*image.size)))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            resized = enhance(resized).enhance(self._uniform(1 - self.jitter, 1 + self.jitter))
        return self._plain.to_tensor(resized)

    def _crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        area = self._uniform(self.min_area, 1.0)
        aspect = math.exp(self._uniform(-1.0, 1.0) * math.log(self.max_aspect_change))
        crop_width = min(width, max(1, round(width * math.sqrt(area * aspect))))
        crop_height = min(height, max(1, round(height * math.sqrt(area / aspect))))
        left = round(self._uniform(0, width - crop_width))
        top = round(self._uniform(0, height - crop_height))
        return left, top, left + crop_width, top + crop_height

    def _uniform(self, low: float, high: float) -> float:
        # float64, so that the draw is not rounded to float32 steps on very large images
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()


def _kept_span(length: int, size: int, short: int) -> tuple[float, float]:
    """Start and end, in source pixels, of what a centre crop of `size` keeps of a side of `length`.

    Rounds the resized length down and the offset to even, as torchvision's Resize and CenterCrop do.
    """
    resized = int(size * length / short)
    offset = round((resized - size) / 2)
    scale = length / resized
    return offset * scale, min(float(length), (offset + size) * scale)


def _require_rgb(image: PILImage.Image) -> None:
    if not isinstance(image, PILImage.Image) or image.mode != "RGB":
        what = f"mode {image.mode!r}" if isinstance(image, PILImage.Image) else type(image).__name__
        raise ImageError(f"the image transform takes an RGB PIL image, not {what}; see mm_gpt.images.load_image")
