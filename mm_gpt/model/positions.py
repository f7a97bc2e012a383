"""Positions of tokens: rotary (RoPE, 2104.09864), with time, row and column (M-RoPE, 2409.12191) or xPos (2212.10554),
sinusoidal (1706.03762), and their scalings.

Shapes: B batch, T tokens, C head size, D width. Rotary pairs are (i, i + C/2), as in Llama's public checkpoints.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mm_gpt.errors import ConfigError

XPOS_BASE = 512
"""Tokens over which xPos lets the slowest pair fade by its ζ."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining."""

    kind: Literal["linear", "llama3"]
    """linear: every frequency / factor (2306.15595). llama3: only the slow ones, with a ramp between (Llama 3.1)."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    """llama3: the context of pretraining, in tokens."""

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ConfigError(f"the factor of rope scaling must be positive, not {self.factor}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError("high_freq_factor must be above low_freq_factor")


class Rotation(NamedTuple):
    """Angles of one pass; `scale` is xPos's, by which queries grow and keys shrink with their position."""

    cos: Tensor  # (B, 1, T, C)
    sin: Tensor  # (B, 1, T, C)
    scale: Tensor | None = None  # (B, 1, T, C)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (B, heads, T, C). cos, sin (B, 1, T, C)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@lru_cache(maxsize=64)
def rotary_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Radians per position of each pair, (C/2,)."""
    steps = torch.arange(0, head_size, 2, dtype=dtype, device=device)
    frequencies = 1.0 / (theta ** (steps / head_size))
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)  # full turns within the pretraining context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = ramp.clamp(0, 1)  # 0: slow, stretched in full; 1: fast, as it was
    return (1 - ramp) * frequencies / scaling.factor + ramp * frequencies


@lru_cache(maxsize=64)
def mrope_components(section: tuple[int, ...], interleaved: bool, device: torch.device) -> Tensor:
    """(C/2,) which of a position's components turns each pair: 0 its time, 1 its row, 2 its column.

    One section after the other (Qwen2-VL, 2409.12191), or in turn as far as rows and columns reach (Qwen3-VL).
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section)).to(device)
    components = torch.zeros(sum(section), dtype=torch.long)
    for component in (1, 2):
        components[component : 3 * section[component] : 3] = component
    return components.to(device)


def rotation(
    positions: Tensor,
    head_size: int,
    theta: float,
    scaling: RopeScaling | None,
    x: Tensor,
    *,
    components: Tensor | None = None,
) -> Rotation:
    """The angles of `positions` (B, T), computed in float32 or better, in the type and on the device of `x`.

    Positions (B, T, 3) need `components` (C/2,): the one of the three that turns each pair (M-RoPE).
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    frequencies = rotary_frequencies(head_size, theta, scaling, precise, x.device)
    places = positions.unsqueeze(-1) if positions.dim() == 2 else positions[..., components]
    angles = places.to(precise) * frequencies  # (B, T, C/2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return Rotation(angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def xpos_rotation(positions: Tensor, head_size: int, theta: float, centre: int, x: Tensor) -> Rotation:
    """Rotary angles, and the scale ζ_i^((n - centre) / 512) with ζ_i = (2i + 0.4 C) / (1.4 C).

    Scores depend on differences of positions only, so any centre gives the same ones; the middle of the context keeps
    the powers in range.
    """
    cos, sin, _ = rotation(positions, head_size, theta, None, x)
    precise = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.arange(0, head_size, 2, dtype=precise, device=x.device)
    zeta = (pairs + 0.4 * head_size) / (1.4 * head_size)  # (C/2,)
    power = (positions.to(precise).unsqueeze(-1) - centre) / XPOS_BASE
    scale = zeta**power  # (B, T, C/2)
    return Rotation(cos, sin, torch.cat([scale, scale], dim=-1).unsqueeze(1).to(x.dtype))


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines in the first half, cosines in the second: (…,) positions -> (…, width). tensor2tensor's and fairseq's
    wavelengths, from 2π to 20,000π."""
    half = width // 2
    precise = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(half, dtype=precise, device=positions.device)
    frequencies = torch.exp(steps * -(math.log(10_000) / max(1, half - 1)))
    angles = positions.to(precise).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
