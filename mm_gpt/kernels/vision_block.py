"""A block of a vision transformer on the CPU: what is done to each row alone, a block of rows at a time.

Between two products a block of rows stays in the nearer caches, and only tokens, queries, keys and values are written
out. Shapes: M rows (the tokens of all images), D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mm_gpt.kernels.full_attention import attend, room_for_heads
from mm_gpt.kernels.gemm import ROW_BLOCK, PackedWeight, blocks, linear, normalise_rows, to_bf16
from mm_gpt.kernels.tiles import aligned, run

Norm = tuple[bool, np.ndarray, np.ndarray, float]
"""Whether the mean is taken away, gain (D,), offset (D,), epsilon."""


@dataclass(frozen=True, eq=False)
class VisionBlock:
    """x + out(attention(qkv(norm(x)))), then x + down(activation(up(norm(x))))."""

    heads: int
    activation: int
    attention_norm: Norm
    qkv: PackedWeight
    normalise_heads: Callable[[np.ndarray], None] | None
    """Changes queries, keys and values of some rows, (rows, 3 * D), in place."""
    out: PackedWeight
    mlp_norm: Norm
    up: PackedWeight
    down: PackedWeight

    def __call__(self, x: np.ndarray, threads: int) -> None:
        """Changes the tokens x (N, T, D) float32, contiguous, in place."""
        images, _, width = x.shape
        rows = x.reshape(-1, width)
        qkv = room_for_heads(len(rows), 3 * width)
        run(lambda part: self._into_heads(rows, part[0], part[1], qkv), blocks(len(rows)), threads)
        attended = attend(qkv, images, self.heads, threads=threads)
        run(lambda part: self._behind_heads(rows, attended, part[0], part[1]), blocks(len(rows)), threads)

    def _into_heads(self, x: np.ndarray, start: int, stop: int, out: np.ndarray) -> None:
        normed = aligned((ROW_BLOCK, x.shape[1]), np.float32)
        normalise_rows(x, start, stop, self.attention_norm, normed)
        qkv = aligned((ROW_BLOCK, out.shape[1]), np.float32)
        linear(normed, 0, stop - start, self.qkv, qkv, 0)
        if self.normalise_heads is not None:
            self.normalise_heads(qkv[: stop - start])
        to_bf16(qkv, 0, stop - start, out, start)

    def _behind_heads(self, x: np.ndarray, attended: np.ndarray, start: int, stop: int) -> None:
        linear(attended, start, stop, self.out, x, start, add=True)
        normed = aligned((ROW_BLOCK, x.shape[1]), np.float32)
        normalise_rows(x, start, stop, self.mlp_norm, normed)
        hidden = aligned((ROW_BLOCK, self.up.rows), np.float32)
        linear(normed, 0, stop - start, self.up, hidden, 0, activation=self.activation)
        linear(hidden, 0, stop - start, self.down, x, start, add=True)
