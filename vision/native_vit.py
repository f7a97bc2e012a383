"""A vision transformer for images of any size: the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

An image comes as a grid of cells of `merge` x `merge` patches, which the connector makes one token each. Patches know
their row and column by rotary positions, in Qwen3-VL also by a learned grid of positions, stretched to the image's. In
Qwen2.5-VL most layers see a window of cells, the others the whole image. Images never see each other.

Shapes: N cells of all images, m patches a side of a cell, P = N · m² patches, cell by cell, D width, h heads, c head
size.

Papers: Qwen2-VL (2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL (2511.21631), DeepStack (2406.04334).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_gpt.errors import ConfigError
from mm_gpt.vision.vit import MAX_LAYERS, MLP

Grid = tuple[int, int]
"""Rows and columns of cells."""


@dataclass(frozen=True, kw_only=True)
class NativeViTConfig:
    patch_size: int
    merge: int = 2
    """m, patches a side of a cell."""
    width: int
    """D, the size of a patch's state."""
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "quick_gelu"
    gated_mlp: bool = False
    """down(activation(gate(x)) · up(x)) instead of down(activation(up(x)))."""
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    patch_bias: bool = False
    frames: int = 2
    """Frames of a video that one patch spans; an image is repeated in all of them."""
    rope_theta: float = 10_000.0
    position_side: int = 0
    """Rows and columns of the grid of learned positions; 0: there is none."""
    window: int = 0
    """Cells a side of the windows that layers see; 0: all of them see the whole image."""
    full_layers: tuple[int, ...] = ()
    """With `window`: the layers, from 0, that see the whole image all the same."""
    deepstack: tuple[int, ...] = ()
    """Layers, from 0 and in this order, whose output is given out as well."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge", "width", "num_layers", "num_heads", "mlp_width", "frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(f"num_layers {self.num_layers} is more than {MAX_LAYERS}")
        if self.width % (4 * self.num_heads):
            raise ConfigError(f"width {self.width} is not a multiple of 4 · num_heads {self.num_heads}")
        if (self.activation == "silu") != self.gated_mlp:
            raise ConfigError("activation 'silu' and gated_mlp go together")
        if self.position_side < 0 or self.window < 0:
            raise ConfigError("position_side and window cannot be below 0")
        for name in ("full_layers", "deepstack"):
            wrong = [layer for layer in getattr(self, name) if not 0 <= layer < self.num_layers]
            if wrong:
                raise ConfigError(f"{name} names layer {wrong[0]}, but there are {self.num_layers}")
        if sorted(set(self.deepstack)) != list(self.deepstack):
            raise ConfigError(f"deepstack must name layers in their order, not {list(self.deepstack)}")

    @property
    def image_size(self) -> int:
        """Pixels a side of a cell: the size of what the encoder is given."""
        return self.patch_size * self.merge

    @property
    def num_patches(self) -> int:
        """Of a cell."""
        return self.merge**2


class Layout(NamedTuple):
    """Where the patches of a batch of images are."""

    cos: Tensor  # (P, c)
    sin: Tensor  # (P, c)
    whole: list[Tensor]
    windows: list[Tensor]
    """Groups of patches that see each other: each tensor (groups of equal size, patches of one) holds indices."""


class Attention(nn.Module):
    def __init__(self, config: NativeViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor, layout: Layout, groups: Sequence[Tensor]) -> Tensor:
        """x (P, D) -> (P, D); patches see those of their own group."""
        q, k, v = rearrange(self.qkv(x), "p (n h c) -> n h p c", n=3, h=self.num_heads)
        q, k = (_rotate(y, layout) for y in (q, k))
        y = torch.empty_like(v)
        for group in groups:
            y[:, group] = self.attend(q[:, group], k[:, group], v[:, group])
        return self.out(rearrange(y, "h p c -> p (h c)"))


class GatedMLP(nn.Module):
    def __init__(self, config: NativeViTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: NativeViTConfig):
        super().__init__()
        norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
        self.attention_norm = norm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = norm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor, layout: Layout, groups: Sequence[Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layout, groups)
        return x + self.mlp(self.mlp_norm(x))


class NativeViT(nn.Module):
    """Normalised pixels of cells (N, 3, m · patch, m · patch) and the grid of each image to features (N, m², D).

    With `deepstack` the features of those layers follow, along the width: (N, m², (1 + layers) · D).
    """

    def __init__(self, config: NativeViTConfig):
        super().__init__()
        self.config = config
        patch = (config.frames, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Conv3d(3, config.width, patch, stride=patch, bias=config.patch_bias)
        self.position_embedding = None
        if config.position_side:
            self.position_embedding = nn.Parameter(torch.empty(config.position_side**2, config.width))
            nn.init.normal_(self.position_embedding, std=config.width**-0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        config = self.config
        x = self._patches(pixel_values)
        if self.position_embedding is not None:
            x = x + torch.cat([self._stretched(self.position_embedding, grid) for grid in grids]).to(x.dtype)
        layout = self._layout(grids, x.device)
        features: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            sees_window = config.window and layer not in config.full_layers
            x = block(x, layout, layout.windows if sees_window else layout.whole)
            if layer in config.deepstack:
                features.append(x)
        return rearrange(torch.cat([x, *features], dim=-1), "(n p) d -> n p d", p=config.num_patches)

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """(P, D). All frames are the same image, so that their weights may be added up before."""
        size = self.config.patch_size
        patches = rearrange(pixel_values, "n c (a y) (b x) -> (n a b) (c y x)", y=size, x=size)
        weight = rearrange(self.patch_embedding.weight.sum(dim=2), "d c y x -> d (c y x)")
        return F.linear(patches, weight, self.patch_embedding.bias)

    def _stretched(self, table: Tensor, grid: Grid) -> Tensor:
        """The learned positions at an image's patches, (patches of it, D): corners at corners, bilinear between."""
        m, side = self.config.merge, self.config.position_side
        square = rearrange(table.float(), "(y x) d -> 1 d y x", y=side)
        own = F.interpolate(square, (grid[0] * m, grid[1] * m), mode="bilinear", align_corners=True)
        return rearrange(own[0], "d (r a) (c b) -> (r c a b) d", a=m, b=m)

    def _layout(self, grids: Sequence[Grid], device: torch.device) -> Layout:
        config = self.config
        head_size = config.width // config.num_heads
        steps = torch.arange(0, head_size // 2, 2, dtype=torch.float32, device=device)
        frequencies = config.rope_theta ** (-steps / (head_size // 2))  # (c/4,), for rows and for columns
        places = torch.cat([patch_places(grid, config.merge) for grid in grids]).to(device)  # (P, 2)
        angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)  # (P, c)
        images = torch.arange(sum(rows * cols for rows, cols in grids)).split([rows * cols for rows, cols in grids])
        windows: list[Tensor] = []
        if config.window:
            for cells, grid in zip(images, grids, strict=True):
                for band in cells.view(grid).split(config.window):
                    windows += [window.flatten() for window in band.split(config.window, dim=1)]
        whole, parts = (self._patch_groups(cells, device) for cells in (images, windows))
        return Layout(angles.cos(), angles.sin(), whole, parts)

    def _patch_groups(self, groups: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Groups of cells as groups of patches, those of one size together: (groups, patches) for each size."""
        inside = torch.arange(self.config.num_patches)
        by_size: dict[int, list[Tensor]] = {}
        for cells in groups:
            by_size.setdefault(len(cells), []).append(cells)
        return [
            (torch.stack(equal)[:, :, None] * len(inside) + inside).flatten(1).to(device) for equal in by_size.values()
        ]


def patch_places(grid: Grid, merge: int) -> Tensor:
    """Row and column of each patch of an image, (patches, 2), cell by cell."""
    rows, cols = (torch.arange(length * merge) for length in grid)
    places = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1)
    return rearrange(places, "(r a) (c b) x -> (r c a b) x", a=merge, b=merge)


def _rotate(x: Tensor, layout: Layout) -> Tensor:
    """Rotary positions on x (h, P, c), in float32 whatever the type of x."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * layout.cos + torch.cat([-second, first], dim=-1) * layout.sin).to(x.dtype)
