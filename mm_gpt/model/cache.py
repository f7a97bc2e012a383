"""What a forward pass carries from token to token, and from layer to layer.

Shapes: B batch, T new tokens, S tokens in the cache and new ones together, K key-value heads, C head size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.fused import Fused
from mm_gpt.model.positions import Rotation

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class KVCache:
    """Keys and values of the tokens seen so far, in buffers allocated once for `capacity` tokens."""

    def __init__(self, config: DecoderConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, C) of the new tokens, return (B, K, S, C) of all; `length` moves when the step is done."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def place(self, positions: Tensor) -> Tensor:
        """Store the positions (B, T) of the new tokens, return those of all, (B, S)."""
        end = self.length + positions.shape[1]
        self.positions[:, self.length : end] = positions
        return self.positions[:, :end]

    def keep_last(self, num_tokens: int) -> None:
        """Forget all but the last tokens: what a model with segment memory carries from one turn to the next."""
        drop = self.length - num_tokens
        if drop > 0:
            for buffer in (self.keys, self.values):
                buffer[:, :, :, :num_tokens] = buffer[:, :, :, drop : self.length].clone()
            self.positions[:, :num_tokens] = self.positions[:, drop : self.length].clone()
            self.length = num_tokens

    def copy_from(self, other: "KVCache") -> None:
        """Take over the tokens of a smaller cache."""
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, :, :, : other.length] = its[:, :, :, : other.length]
        self.positions[:, : other.length] = other.positions[:, : other.length]
        self.length = other.length

    def select_rows(self, rows: Tensor) -> None:
        """Make row i of the cache a copy of row `rows[i]`: beams that survive, requests that are not finished."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
        self.positions = self.positions.index_select(0, rows)


@dataclass
class ForwardContext:
    """One forward pass, as its layers see it."""

    rotation: Rotation | None = None
    local_rotation: Rotation | None = None
    """Of the layers with local attention."""
    mask: "Tensor | BlockMask | None" = None
    local_mask: "Tensor | BlockMask | None" = None
    """All that layers with local attention may see, where that is not the window's part of `mask`."""
    positions: tuple[Tensor, Tensor] | None = None
    """Of queries (B, T) and keys (B, S), where a pattern needs them."""
    cache: KVCache | None = None
    fused: Fused | None = None
    """For blocks that are computed as one function."""
