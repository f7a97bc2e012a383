"""How public models write an image into the prompt: text around its tokens, placeholders, and their positions."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm_gpt.errors import ConfigError
from mm_gpt.vision.tiling import TilingConfig, num_image_tokens


@dataclass(frozen=True, kw_only=True)
class ImageTextConfig:
    token: str
    """The special token that stands for one image token."""
    kind: Literal["plain", "idefics3", "nanovlm", "rows"] = "plain"
    """plain: `before`, the tokens of all tiles, `after`. idefics3: each tile with a mark of its row and column, then
    the whole image. nanovlm: the whole image, then each tile behind its mark; several images are numbered. rows: the
    tokens of all tiles laid out row by row (LLaVA-NeXT, OneVision)."""
    before: str = ""
    after: str = ""
    written: str = ""
    """What the chat template writes where an image belongs; empty: `token`."""
    mark: str = "<fake_token_around_image>"
    whole: str = "<global-img>"
    """idefics3: what stands before and after each tile, and before the whole image. nanovlm has the latter only; where
    it is empty there are the tiles alone."""

    def __post_init__(self) -> None:
        if not self.token:
            raise ConfigError("token must name the special token of an image")


def image_text(
    config: ImageTextConfig,
    tokens_per_tile: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    tiling: TilingConfig | None,
    *,
    number: int = 0,
    count: int = 1,
) -> str:
    """The text of one image, of `size` (height, width), cut into `grid` (rows, columns) of tiles; (0, 0): into none.

    It is image `number`, from 0, of the `count` in its prompt.
    """
    tile = config.token * tokens_per_tile
    rows, columns = grid
    if config.kind == "plain":
        return config.before + tile * (rows * columns + 1) + config.after
    if config.kind == "rows":
        return config.token * num_image_tokens(tiling, size=size, grid=grid, side=math.isqrt(tokens_per_tile))
    if not config.whole:
        rows, columns = max(1, rows), max(1, columns)
    marked = [[f"<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)] for row in range(rows)]
    if config.kind == "nanovlm":
        name = f"<image: {number}>" if count > 1 else ""
        return name + (config.whole + tile if config.whole else "") + "".join(itertools.chain(*marked))
    lines = ["".join(config.mark + part for part in row) + "\n" for row in marked]
    gap = "\n" if rows else ""
    return "".join(lines) + gap + config.mark + config.whole + tile + config.mark


def mrope_positions(length: int, images: Sequence[tuple[int, tuple[int, int]]]) -> Tensor:
    """(T, 3), the time, row and column of each of T tokens (Qwen2-VL, 2409.12191).

    images: the first token of each, and the rows and columns of its tokens. In text the three are equal and count on,
    behind an image from the largest of its own; an image is one moment.
    """
    parts: list[Tensor] = []
    at = place = 0
    for first, (rows, cols) in images:
        parts.append((place + torch.arange(first - at))[:, None].expand(-1, 3))
        place += first - at
        inside = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(cols))
        parts.append(place + inside)
        place += max(rows, cols)
        at = first + rows * cols
    return torch.cat([*parts, (place + torch.arange(length - at))[:, None].expand(-1, 3)])
