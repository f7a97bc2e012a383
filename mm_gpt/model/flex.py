"""Attention whose mask is a rule and the blocks that it divides (FlexAttention, 2412.05496), never T² in memory.

Shapes: B batch, T tokens, H heads, K key-value heads, C head size.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@functools.cache
def _kernel(is_compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Any = flex_attention
    return torch.compile(kernel) if is_compiled else kernel


def flex_attend(q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask", *, scale: float | None = None) -> Tensor:
    """Attention of q (B, H, T, C) over k and v (B, K, T, C) -> (B, H, T, C), by a mask of blocks
    (`mm_gpt.model.masks`).

    On a GPU one compiled kernel; elsewhere what torch computes in its place, T² scores and all, which tests compare.
    """
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
    kernel = _kernel(q.is_cuda)
    return kernel(q.to(dtype), k.to(dtype), v.to(dtype), block_mask=blocks, scale=scale, enable_gqa=True).to(v.dtype)
