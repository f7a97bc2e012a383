"""Connectors: patch tokens of a vision encoder to tokens of the language model.

Shapes: N images, P patch tokens of width D_v in, k tokens of width D out. Every connector maps (N, P, D_v) to
(N, k, D) and has `num_tokens` (k). None of them adds positions: the encoder's tokens carry what they need.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from mm_gpt.errors import ConfigError

MAX_DEPTH = 1000
"""Each layer takes memory and time, even without its weights."""
POOL_NORM_EPS = 1e-6
"""Gemma 3 takes that of its vision tower, which is this one in all that were published."""


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    kind: Literal[
        "linear", "mlp", "pixel_shuffle", "pixel_shuffle_mlp", "pool", "merger", "resampler", "xconnector"
    ] = "mlp"
    """linear: one projection per patch (k = P). mlp: Linear, GELU, Linear per patch (k = P; LLaVA-1.5, arXiv
    2310.03744). pixel_shuffle: `scale` x `scale` neighbours side by side, then a Linear (k = P / scale**2; Idefics3,
    arXiv 2408.12637). pixel_shuffle_mlp: LayerNorm, Linear, GELU, Linear instead of that Linear (InternVL 1.5, arXiv
    2404.16821). pool: the mean of `scale` x `scale` neighbours, RMSNorm, a Linear without bias (k = P / scale**2; Gemma
    3, arXiv 2503.19786). merger: a norm of each patch, then all patches of a cell side by side, Linear, GELU, Linear
    (k = 1; Qwen2-VL, arXiv 2409.12191). resampler: Flamingo's perceiver (k = num_latents; arXiv 2204.14198).
    xconnector: KOSMOS-2's one cross-attention (k = num_latents; arXiv 2306.14824)."""
    scale: int = 2
    """pixel_shuffle, pixel_shuffle_mlp, pool: how many patches a side go into one token."""
    bias: bool = True
    """mlp, pixel_shuffle: the projections have a bias; those of Idefics3, SmolVLM and nanoVLM have none."""
    norm: Literal["layer", "rms"] = "layer"
    """merger: the kind of its norm."""
    deepstack: int = 0
    """merger: layers whose features stand behind those of the last, along the width; each has a merger of its own, with
    its norm behind the patches (Qwen3-VL, arXiv 2511.21631)."""
    num_latents: int = 64
    """resampler, xconnector: learned queries, and so tokens per image."""
    depth: int = 6
    """resampler: number of layers."""
    num_heads: int = 8
    """resampler, xconnector: attention heads."""

    def __post_init__(self) -> None:
        for name in ("scale", "num_latents", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("depth", "deepstack"):
            if getattr(self, name) > MAX_DEPTH:
                raise ConfigError(f"{name} must be at most {MAX_DEPTH}, got {getattr(self, name)}")
        if self.deepstack < 0 or (self.deepstack and self.kind != "merger"):
            raise ConfigError(f"deepstack {self.deepstack} does not go with kind {self.kind!r}")


def build_connector(config: ConnectorConfig, in_width: int, out_width: int, num_patches: int) -> nn.Module:
    """The connector from (N, `num_patches`, `in_width`) to (N, `num_tokens`, `out_width`).

    Raises ConfigError where the sizes do not fit: patches that are no square grid or do not divide by `scale`, widths
    that do not divide by `num_heads`.
    """
    match config.kind:
        case "linear":
            return LinearConnector(in_width, out_width, num_patches)
        case "mlp":
            return MLPConnector(in_width, out_width, num_patches, bias=config.bias)
        case "pixel_shuffle":
            return PixelShuffleConnector(in_width, out_width, num_patches, scale=config.scale, bias=config.bias)
        case "pixel_shuffle_mlp":
            return PixelShuffleMLPConnector(in_width, out_width, num_patches, scale=config.scale)
        case "merger":
            return MergerConnector(in_width, out_width, num_patches, config)
        case "pool":
            return PoolConnector(in_width, out_width, num_patches, scale=config.scale)
        case "resampler":
            return Resampler(in_width, out_width, config)
        case "xconnector":
            return XConnector(in_width, out_width, config)


def square_grid(num_patches: int, scale: int, kind: str) -> int:
    """The patches of a side. Raises ConfigError where they are no square, or `scale` does not divide them."""
    grid = math.isqrt(num_patches)
    if grid**2 != num_patches:
        raise ConfigError(f"{kind} needs a square grid of patches, got {num_patches}")
    if grid % scale:
        raise ConfigError(f"{kind}: a {grid} x {grid} grid does not divide by scale {scale}")
    return grid


class LinearConnector(nn.Module):
    def __init__(self, in_width: int, out_width: int, num_patches: int) -> None:
        super().__init__()
        self.num_tokens = num_patches
        self.projection = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


class MLPConnector(nn.Module):
    """Linear (D_v to D), GELU, Linear (D to D), no norm."""

    def __init__(self, in_width: int, out_width: int, num_patches: int, *, bias: bool = True) -> None:
        super().__init__()
        self.num_tokens = num_patches
        self.fc1 = nn.Linear(in_width, out_width, bias=bias)
        self.fc2 = nn.Linear(out_width, out_width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PixelShuffleConnector(nn.Module):
    """Space to depth: each token is the projection of a `scale` x `scale` square of patches, read row by row."""

    def __init__(self, in_width: int, out_width: int, num_patches: int, *, scale: int, bias: bool = True) -> None:
        super().__init__()
        self.scale, self.grid = scale, square_grid(num_patches, scale, "pixel_shuffle")
        self.num_tokens = num_patches // scale**2
        self.projection = nn.Linear(in_width * scale**2, out_width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.shuffle(x))

    def shuffle(self, x: Tensor) -> Tensor:
        """(N, P, D_v) to (N, P / scale**2, scale**2 * D_v)."""
        rows, s = self.grid // self.scale, self.scale
        return rearrange(x, "n (h a w b) d -> n (h w) (a b d)", h=rows, w=rows, a=s, b=s)


class PixelShuffleMLPConnector(PixelShuffleConnector):
    def __init__(self, in_width: int, out_width: int, num_patches: int, *, scale: int) -> None:
        super().__init__(in_width, out_width, num_patches, scale=scale)
        self.norm = nn.LayerNorm(in_width * scale**2)
        self.fc2 = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.projection(self.norm(self.shuffle(x)))))


class Merger(nn.Module):
    """The P patches of a cell to one vector: a norm of each, or of all side by side (`norm_last`), and two layers."""

    def __init__(self, in_width: int, out_width: int, num_patches: int, *, norm: str, norm_last: bool) -> None:
        super().__init__()
        self.norm_last, width = norm_last, in_width * num_patches
        kind = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.norm = kind(width if norm_last else in_width, 1e-6)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, D_v) -> (N, 1, D)."""
        x = self.norm(x.flatten(1)) if self.norm_last else self.norm(x).flatten(1)
        return self.fc2(F.gelu(self.fc1(x)))[:, None]


class MergerConnector(Merger):
    """Cells to tokens. With deepstack (N, P, (1 + n) · D_v) becomes (N, 1, (1 + n) · D): each layer's by its merger."""

    def __init__(self, in_width: int, out_width: int, num_patches: int, config: ConnectorConfig) -> None:
        levels = 1 + config.deepstack
        if in_width % levels:
            raise ConfigError(f"merger: a width of {in_width} does not divide into {levels} layers' features")
        width = in_width // levels
        super().__init__(width, out_width, num_patches, norm=config.norm, norm_last=False)
        self.num_tokens = 1
        self.deepstack = nn.ModuleList(
            Merger(width, out_width, num_patches, norm=config.norm, norm_last=True) for _ in range(config.deepstack)
        )

    def forward(self, x: Tensor) -> Tensor:
        last, *others = x.chunk(1 + len(self.deepstack), dim=-1)
        merged = [merger(other) for merger, other in zip(self.deepstack, others, strict=True)]
        return torch.cat([super().forward(last), *merged], dim=-1)


class PoolConnector(nn.Module):
    def __init__(self, in_width: int, out_width: int, num_patches: int, *, scale: int) -> None:
        super().__init__()
        self.scale, self.grid = scale, square_grid(num_patches, scale, "pool")
        self.num_tokens = num_patches // scale**2
        self.norm = nn.RMSNorm(in_width, POOL_NORM_EPS)
        self.projection = nn.Linear(in_width, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, s = self.grid // self.scale, self.scale
        x = reduce(x, "n (h a w b) d -> n (h w) d", "mean", h=rows, w=rows, a=s, b=s)
        return self.projection(self.norm(x))


class Resampler(nn.Module):
    """Flamingo's perceiver resampler (Alayrac et al. 2022), at the encoder's width, then a projection to D.

    Each layer: latents attend to [x; latents], both normalised first; residual; feed-forward of 4 x width; residual.
    A final LayerNorm. Heads are 64 wide whatever D_v is, projections have no bias. Without positions in `x` the result
    does not depend on the order of the patches.
    """

    def __init__(self, in_width: int, out_width: int, config: ConnectorConfig) -> None:
        super().__init__()
        self.num_tokens = config.num_latents
        self.latents = nn.Parameter(torch.randn(config.num_latents, in_width))
        self.layers = nn.ModuleList(ResamplerLayer(in_width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(in_width)
        self.projection = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        latents = repeat(self.latents, "k d -> n k d", n=len(x))
        for layer in self.layers:
            latents = layer(x, latents)
        return self.projection(self.norm(latents))


class ResamplerLayer(nn.Module):
    HEAD_WIDTH = 64

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        inner = num_heads * self.HEAD_WIDTH
        self.num_heads = num_heads
        self.input_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.kv_proj = nn.Linear(width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        normed = self.latent_norm(latents)
        keys, values = self.kv_proj(torch.cat([self.input_norm(x), normed], dim=1)).chunk(2, dim=-1)
        latents = latents + self.out_proj(_attend(self.q_proj(normed), keys, values, self.num_heads))
        return latents + self.ffn(latents)


class XConnector(nn.Module):
    """KOSMOS-2's connector: Linear, learned queries, ONE cross-attention over [x; queries]. No norm, feed-forward or
    residual, so the output is a projection of a weighted mean of projected patches and queries."""

    def __init__(self, in_width: int, out_width: int, config: ConnectorConfig) -> None:
        super().__init__()
        if out_width % config.num_heads:
            raise ConfigError(f"xconnector: width {out_width} does not divide by num_heads {config.num_heads}")
        self.num_tokens = config.num_latents
        self.num_heads = config.num_heads
        self.dense = nn.Linear(in_width, out_width)
        self.latent_query = nn.Parameter(torch.randn(config.num_latents, out_width))
        self.q_proj = nn.Linear(out_width, out_width)
        self.k_proj = nn.Linear(out_width, out_width)
        self.v_proj = nn.Linear(out_width, out_width)
        self.out_proj = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        queries = repeat(self.latent_query, "k d -> n k d", n=len(x))
        memory = torch.cat([self.dense(x), queries], dim=1)
        attended = _attend(self.q_proj(queries), self.k_proj(memory), self.v_proj(memory), self.num_heads)
        return self.out_proj(attended)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    # (N, k, H * d), (N, S, H * d), (N, S, H * d) -> (N, k, H * d)
    q, k, v = (rearrange(t, "n s (h d) -> n h s d", h=num_heads) for t in (queries, keys, values))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "n h s d -> n s (h d)")
