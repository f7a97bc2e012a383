"""How public models write an image into the prompt: the text around its tokens, and one placeholder for each of them."""

import math
from dataclasses import dataclass
from typing import Literal

from mm_gpt.errors import ConfigError
from mm_gpt.vision.tiling import TilingConfig, num_image_tokens


@dataclass(frozen=True, kw_only=True)
class ImageTextConfig:
    token: str
    """The special token that stands for one image token."""
    kind: Literal["plain", "idefics3", "rows"] = "plain"
    """plain: `before`, the tokens, `after`. idefics3: each tile with a mark of its row and column, then the whole image.
    rows: the tokens of all tiles laid out row by row (LLaVA-NeXT, OneVision)."""
    before: str = ""
    after: str = ""
    mark: str = "<fake_token_around_image>"
    whole: str = "<global-img>"
    """idefics3: what stands before and after each tile, and before the whole image."""

    def __post_init__(self) -> None:
        if not self.token:
            raise ConfigError("token must name the special token of an image")


def image_text(
    config: ImageTextConfig,
    tokens_per_tile: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    tiling: TilingConfig | None,
) -> str:
    """The text of one image, of `size` (height, width), cut into `grid` (rows, columns) of tiles; (0, 0): into none."""
    tile = config.token * tokens_per_tile
    if config.kind == "plain":
        return config.before + tile + config.after
    if config.kind == "rows":
        return config.token * num_image_tokens(tiling, size=size, grid=grid, side=math.isqrt(tokens_per_tile))
    rows, columns = grid
    lines = [
        "".join(f"{config.mark}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)) + "\n"
        for row in range(rows)
    ]
    gap = "\n" if rows else ""
    return "".join(lines) + gap + config.mark + config.whole + tile + config.mark
