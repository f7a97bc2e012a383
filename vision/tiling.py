"""One image -> the tiles that a high-resolution vision-language model sees, and its tile features -> image tokens.

A vision tower has one input size, so that a page of text is unreadable to it. The public models cut the enlarged image
into tiles of that size and add the whole image, squashed, as one more tile:

- `idefics3` (Idefics3, SmolVLM; arXiv:2408.12637): the long side becomes `longest_edge`, both sides are rounded up to
  whole tiles; the global tile comes last. The text says the row and column of each tile.
- `anyres` (LLaVA-NeXT; arXiv:2310.03744) fits the image into the best of a list of resolutions, padded with black; the
  global tile comes first. The features of the padding are cut off, and each row of features ends in a newline token.
- `anyres_max` (LLaVA-OneVision; arXiv:2408.03326): the same, and feature grids of more than `max_tiles` tiles are
  scaled down. Of several images in one conversation each is a single tile, padded to a square.
- `internvl` (InternVL 1.5; arXiv:2404.16821): squashed into the grid of `min_tiles` to `max_tiles` tiles whose shape is
  closest to the image's; the global tile comes last, and has the text of any other.
- `nanovlm` (huggingface/nanoVLM): sides rounded up to whole tiles; the global tile, made of float pixels, comes first,
  or, in the first models, not at all.
- `native` (Qwen2-VL; arXiv:2409.12191): a tile is a cell that becomes one token. The image is resized to the nearest
  whole cells, with `min_pixels` to `max_pixels` in all; there is no global tile.

With the transform's backend "torchvision" (nanovlm: "pil") pixels equal those of the models' own processors. Token
counts are a function of the image's size alone, and the functions here are the only place that rounds: the prompt and
the model cannot disagree.

Shapes: n tiles of an image, P = side * side features per tile, D their width, k image tokens.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from mm_gpt.errors import ConfigError, ImageError, unknown_name
from mm_gpt.vision.transforms import (
    ImageTransform,
    ImageTransformConfig,
    normalise,
    require_rgb,
    resize_pixels,
    to_pixels,
)

Size = tuple[int, int]
"""Height and width, or rows and columns."""

_KINDS = ("idefics3", "anyres", "anyres_max", "internvl", "nanovlm", "native")
MAX_LONGEST_EDGE = 4096
"""Idefics3's processor goes no higher."""
MAX_TILES = 1000
"""Of one image. The released models have 36 at most."""
MAX_PIXELS, MAX_CELLS = 2**26, 2**17
"""Of one image of a native resolution. The released models have 2**24 and 2**14 at most."""
MAX_ASPECT = 200
"""How much longer than the other a side of such an image may be."""


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """How an image is cut. The size of a tile is the ImageTransformConfig's. Checked when built: ConfigError."""

    kind: Literal["idefics3", "anyres", "anyres_max", "internvl", "nanovlm", "native"]
    longest_edge: int = 0
    """idefics3, nanovlm: pixels of the long side before it is cut."""
    split: bool = True
    """idefics3: False gives the global tile alone."""
    enlarge: bool = True
    """nanovlm: False leaves the long side of a small image at the next whole number of tiles."""
    whole: bool = True
    """There is a global tile besides the others; False, for native and some of nanovlm: the tiles are all there is."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """anyres, anyres_max: the resolutions (height, width) to choose from."""
    max_tiles: int = 0
    """anyres_max: as many tiles' features survive at most. internvl: an image is cut into as many at most."""
    min_tiles: int = 0
    """internvl: an image is cut into as many at least."""
    min_pixels: int = 0
    max_pixels: int = 0
    """native: pixels that the resized image has at least and at most, as far as whole cells allow."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(unknown_name("kind of tiling", str(self.kind), _KINDS))
        anyres, edge = self.kind.startswith("anyres"), self.kind in ("idefics3", "nanovlm")
        if not (1 if edge else 0) <= self.longest_edge <= (MAX_LONGEST_EDGE if edge else 0):
            allowed = f"must be 1 to {MAX_LONGEST_EDGE}" if edge else "is not"
            raise ConfigError(f"longest_edge {allowed} for tiling {self.kind!r}, got {self.longest_edge!r}")
        if anyres != bool(self.pinpoints):
            raise ConfigError(f"tiling {self.kind!r} {'needs' if anyres else 'has no'} pinpoints")
        if not self.whole and self.kind not in ("nanovlm", "native"):
            raise ConfigError(f"tiling {self.kind!r} has a global tile: whole must be true")
        if self.whole and self.kind == "native":
            raise ConfigError("tiling 'native' has no global tile: whole must be false")
        if any(len(pair) != 2 or min(pair) < 1 for pair in self.pinpoints):
            raise ConfigError(f"pinpoints must be pairs (height, width), not {self.pinpoints!r}")
        if self.max_tiles < 0 or (self.kind in ("anyres_max", "internvl")) != bool(self.max_tiles):
            raise ConfigError(f"max_tiles {self.max_tiles!r} does not go with tiling {self.kind!r}")
        if not 0 <= self.min_tiles <= (self.max_tiles if self.kind == "internvl" else 0):
            raise ConfigError(f"min_tiles {self.min_tiles!r} does not go with tiling {self.kind!r}")
        least, most = (1, MAX_PIXELS) if self.kind == "native" else (0, 0)
        if not least <= self.min_pixels <= self.max_pixels <= most:
            raise ConfigError(
                f"tiling {self.kind!r}: min_pixels and max_pixels must be {least} to {most:,} in this order, not "
                f"{self.min_pixels!r} and {self.max_pixels!r}"
            )


@dataclass(frozen=True)
class Tiled:
    """The tiles of one image."""

    pixel_values: Tensor  # (n, 3, H, W) in the order in which the model's own processor gives them
    rows: int
    cols: int
    """The grid of the tiles besides the global one; 0 x 0 when the image is one tile."""
    size: Size
    """Height and width of the original image."""


class Tiler:
    """RGB image -> Tiled. With `tiling` None every image is one tile, made by an ImageTransform."""

    def __init__(self, image: ImageTransformConfig, tiling: TilingConfig | None) -> None:
        self.image, self.tiling = image, tiling
        self._transform = ImageTransform(image)
        if tiling is None:
            return
        if image.mode != "squash":
            raise ConfigError(f"tiles come from mode 'squash', not {image.mode!r}")
        if (most := _most_tiles(tiling, image.size)) > (MAX_CELLS if tiling.kind == "native" else MAX_TILES):
            raise ConfigError(f"tiling {tiling.kind!r} makes up to {most} tiles of {image.size} pixels: too many")
        # Of several images each is padded to a square: LLaVA-OneVision's way
        self._square = ImageTransform(dataclasses.replace(image, mode="pad"))
        lengths = [length for pair in tiling.pinpoints for length in pair]
        if tiling.kind == "nanovlm":
            lengths.append(tiling.longest_edge)
        wrong = [length for length in lengths if length % image.size]
        if wrong:
            raise ConfigError(f"tiling {tiling.kind!r}: {wrong[0]} pixels are not whole tiles of {image.size}")

    def grid(self, height: int, width: int, *, alone: bool = True) -> Size:
        """Rows and columns of tiles besides the global one, from the size of the image; 0 x 0 for a single tile.

        `alone` says that the prompt has no other image: anyres_max does not split one of several.
        """
        if self.tiling is None or (self.tiling.kind == "anyres_max" and not alone):
            return 0, 0
        full = self._canvas(height, width)
        rows, cols = full[0] // self.image.size, full[1] // self.image.size
        # LLaVA keeps a 1 x 1 grid beside the global tile, the others take it for the global tile, if they have one
        is_global = rows * cols == 1 and not self.tiling.pinpoints and self.tiling.kind != "native"
        return (0, 0) if is_global else (rows, cols)

    def __call__(self, image: PILImage.Image, *, alone: bool = True) -> Tiled:
        """Raises ImageError if the image is not RGB."""
        require_rgb(image)
        height, width = image.height, image.width
        rows, cols = self.grid(height, width, alone=alone)
        if self.tiling is None:
            tiles = self._transform(image)[None]
        elif self.tiling.kind == "idefics3":
            tiles = self._idefics3(to_pixels(image), rows * cols > 0)
        elif self.tiling.kind == "native":
            tiles = _cut(resize_pixels(to_pixels(image), *self._canvas(height, width), self.image), self.image.size)
            tiles = normalise(tiles, self.image)
        elif self.tiling.kind == "internvl":
            tiles = self._internvl(to_pixels(image), rows * cols > 0)
        elif self.tiling.kind == "nanovlm":
            tiles = self._nanovlm(to_pixels(image), rows * cols > 0)
        elif rows * cols > 0:
            tiles = self._anyres(to_pixels(image))
        else:
            tiles = self._square(image)[None]
        return Tiled(tiles, rows, cols, (height, width))

    def _canvas(self, height: int, width: int) -> Size:
        """Height and width of what is cut into tiles."""
        tiling, tile = self.tiling, self.image.size
        assert tiling is not None
        if tiling.kind == "idefics3":
            if not tiling.split:
                return tile, tile
            return _whole_tiles(*fit_longest_edge(height, width, tiling.longest_edge), tile)
        if tiling.kind == "nanovlm":
            longest = tiling.longest_edge
            long = longest if tiling.enlarge else min(longest, _round_up(max(height, width), tile))
            short = max(tile, _round_up(min(height, width) * (long / max(height, width)), tile))
            return (short, long) if width >= height else (long, short)
        if tiling.kind == "native":
            return nearest_cells((height, width), tile, tiling.min_pixels, tiling.max_pixels)
        if tiling.kind == "internvl":
            rows, cols = closest_grid((height, width), tile, tiling.min_tiles, tiling.max_tiles)
            return rows * tile, cols * tile
        return best_resolution((height, width), tiling.pinpoints)

    def _idefics3(self, pixels: Tensor, split: bool) -> Tensor:
        assert self.tiling is not None
        tile, (height, width) = self.image.size, pixels.shape[-2:]
        # Two resizes, as the original does: one alone would give other pixels
        pixels = resize_pixels(pixels, *fit_longest_edge(height, width, self.tiling.longest_edge), self.image)
        pixels = resize_pixels(pixels, *self._canvas(height, width), self.image)
        whole = resize_pixels(pixels, tile, tile, self.image)[None]
        return normalise(torch.cat([_cut(pixels, tile), whole]) if split else whole, self.image)

    def _internvl(self, pixels: Tensor, split: bool) -> Tensor:
        tile, (height, width) = self.image.size, pixels.shape[-2:]
        tiles = _cut(resize_pixels(pixels, *self._canvas(height, width), self.image), tile)
        if split:
            tiles = torch.cat([tiles, resize_pixels(pixels, tile, tile, self.image)[None]])
        return normalise(tiles, self.image)

    def _nanovlm(self, pixels: Tensor, split: bool) -> Tensor:
        tile, (height, width) = self.image.size, pixels.shape[-2:]
        values = normalise(resize_pixels(pixels, *self._canvas(height, width), self.image), self.image)
        if not split:
            return values[None]
        assert self.tiling is not None
        if not self.tiling.whole:
            return _cut(values, tile)
        whole = F.interpolate(values[None], (tile, tile), mode="bilinear", align_corners=False, antialias=True)
        return torch.cat([whole, _cut(values, tile)])

    def _anyres(self, pixels: Tensor) -> Tensor:
        tile, (height, width) = self.image.size, pixels.shape[-2:]
        full = self._canvas(height, width)
        inner = _fit_inside((height, width), full)
        canvas = torch.zeros(3, *full, dtype=torch.uint8)
        top, left = (full[0] - inner[0]) // 2, (full[1] - inner[1]) // 2
        canvas[:, top : top + inner[0], left : left + inner[1]] = resize_pixels(pixels, *inner, self.image)
        whole = resize_pixels(pixels, tile, tile, self.image)[None]
        return normalise(torch.cat([whole, _cut(canvas, tile)]), self.image)


def _most_tiles(tiling: TilingConfig, tile: int) -> int:
    """How many tiles an image may become, besides the global one."""
    if tiling.kind == "native":
        return tiling.max_pixels // tile**2
    pairs = tiling.pinpoints or ((tiling.longest_edge, tiling.longest_edge),)
    return max(tiling.max_tiles, *(-(-height // tile) * -(-width // tile) for height, width in pairs))


# ---- From tile features to image tokens ----


def num_image_tokens(tiling: TilingConfig | None, *, size: Size, grid: Size, side: int) -> int:
    """k, how many vectors `assemble` returns for an image of `size` (height, width), cut into `grid` tiles.

    `side` is the side of one tile's square of features: a tile gives side * side.
    """
    rows, cols = grid
    per_tile = side * side
    if tiling is None or not tiling.pinpoints:
        whole = tiling is None or tiling.whole or not rows * cols
        return (rows * cols + whole) * per_tile
    if not rows * cols:
        return per_tile + 1
    kept_rows, kept_cols = _kept_features(tiling, size, grid, side)
    return per_tile + kept_rows * (kept_cols + 1)


def assemble(
    features: Tensor, tiling: TilingConfig | None, *, size: Size, grid: Size, newline: Tensor | None = None
) -> Tensor:
    """The tile features (n, P, D) of one image, in the tiler's order, as its tokens (k, D).

    `newline` (D,) is the learned vector that ends each row of features in anyres and anyres_max.
    """
    if tiling is None or not tiling.pinpoints:
        return features.flatten(0, 1)
    assert newline is not None, f"tiling {tiling.kind!r} needs a newline vector"
    newline = newline.to(features)
    rows, cols = grid
    if not rows * cols:
        return torch.cat([features[0], newline[None]])
    side, width = math.isqrt(features.shape[1]), features.shape[2]
    tiles = features[1:].view(rows, cols, side, side, width)
    picture = tiles.permute(4, 0, 2, 1, 3).reshape(width, rows * side, cols * side)  # (D, feature rows, feature cols)
    picture = unpad(picture, size)
    kept = _kept_features(tiling, size, grid, side)
    if kept != tuple(picture.shape[1:]):
        picture = F.interpolate(picture[None], kept, mode="bilinear")[0]
    ends = newline[:, None, None].expand(width, kept[0], 1)
    return torch.cat([features[0], torch.cat([picture, ends], dim=2).flatten(1).T])


def unpad(features: Tensor, size: Size) -> Tensor:
    """Features (D, H, W) of a padded image without the rows or columns that are padding alone."""
    height, width = features.shape[-2:]
    kept_height, kept_width = unpadded((height, width), size)
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return features[..., top : top + kept_height, left : left + kept_width]


def unpadded(grid: Size, size: Size) -> Size:
    """Rows and columns of a feature grid that remain when an image of `size` was centred in it.

    The padding is cut alike on both sides, so that an odd row of it stays. The content is rounded down after rounding
    to seven digits: without those 1 / 3 of 3 rows would be 0 rows. A sliver can lose every row.
    """
    (rows, cols), (height, width) = grid, size
    if width / height > cols / rows:
        content = int(round(height * (cols / width), 7))
        return rows - (rows - content) // 2 * 2, cols
    content = int(round(width * (rows / height), 7))
    return rows, cols - (cols - content) // 2 * 2


def _kept_features(tiling: TilingConfig, size: Size, grid: Size, side: int) -> Size:
    """Rows and columns of features that remain of the tiles: without padding, and scaled down where too many."""
    rows, cols = unpadded((grid[0] * side, grid[1] * side), size)
    if not tiling.max_tiles:
        return rows, cols
    excess = math.sqrt(rows * cols / (tiling.max_tiles * side * side))
    return (int(rows // excess), int(cols // excess)) if excess > 1.1 else (rows, cols)


# ---- Sizes ----


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint that keeps most of the image's pixels, and of those that keep as many the smallest."""

    def score(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=score)  # the first of equals


def closest_grid(size: Size, tile: int, min_tiles: int, max_tiles: int) -> Size:
    """Rows and columns, `min_tiles` to `max_tiles` in all, with the aspect ratio that is closest to the image's.

    Of grids that are as close, more tiles are taken only where the image has more than half of their pixels.
    """
    height, width = size
    best, least = (1, 1), math.inf
    grids = [(rows, cols) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    for rows, cols in sorted(grids, key=math.prod):  # of as many tiles, the taller grid first
        difference = abs(width / height - cols / rows)
        is_filled = height * width > 0.5 * tile * tile * rows * cols
        if rows * cols >= min_tiles and (difference < least or (difference == least and is_filled)):
            best, least = (rows, cols), difference
    return best


def nearest_cells(size: Size, cell: int, min_pixels: int, max_pixels: int) -> Size:
    """Height and width in whole cells that are nearest to the image's, or to those that have the pixels allowed.

    Raises ImageError for an image that is too long and thin.
    """
    height, width = size
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"an image of {width} x {height} pixels is too long and thin: a side may be {MAX_ASPECT} times the other"
        )
    rows, cols = (round(length / cell) for length in size)
    if rows * cols * cell**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, cols = (max(1, math.floor(length / shrink / cell)) for length in size)
    elif rows * cols * cell**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, cols = (math.ceil(length * grow / cell) for length in size)
    return rows * cell, cols * cell


def fit_longest_edge(height: int, width: int, longest: int) -> Size:
    """The long side becomes `longest`, also when that enlarges; the short side keeps the ratio and is made even."""
    aspect = width / height
    short = int(longest / aspect) if width >= height else int(longest * aspect)
    short = max(1, short + short % 2)
    return (short, longest) if width >= height else (longest, short)


def _whole_tiles(height: int, width: int, tile: int) -> Size:
    """Both sides rounded up to whole tiles, the short one after it followed the long one."""
    aspect = width / height
    if width >= height:
        width = _round_up(width, tile)
        return max(tile, _round_up(int(width / aspect), tile)), width
    height = _round_up(height, tile)
    return height, max(tile, _round_up(int(height * aspect), tile))


def _fit_inside(size: Size, target: Size) -> Size:
    """The largest size of the same aspect ratio inside `target`, its short side rounded up."""
    scale_h, scale_w = target[0] / size[0], target[1] / size[1]
    if scale_w < scale_h:
        return min(target[0], math.ceil(size[0] * scale_w)), target[1]
    return target[0], min(target[1], math.ceil(size[1] * scale_h))


def _round_up(length: float, tile: int) -> int:
    return math.ceil(length / tile) * tile


def _cut(pixels: Tensor, tile: int) -> Tensor:
    """(3, rows * tile, cols * tile) -> (rows * cols, 3, tile, tile), row by row."""
    rows, cols = pixels.shape[-2] // tile, pixels.shape[-1] // tile
    return pixels.view(3, rows, tile, cols, tile).permute(1, 3, 0, 2, 4).reshape(rows * cols, 3, tile, tile)
