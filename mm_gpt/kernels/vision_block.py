"""A block of a vision transformer on the CPU: what is done to each row alone, a block of rows at a time.

Between two products a block of rows stays in the nearer caches, and only tokens, queries, keys and values are written
out. Shapes: M rows (the tokens of all images), D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

from mm_gpt.kernels.full_attention import attend
from mm_gpt.kernels.gemm import (
    NO_ACTIVATION,
    ROW_BLOCK,
    PackedWeight,
    Rows,
    _options,
    blocks,
    multiply_rows,
    normalise_rows,
    quantise_rows,
    weights_of,
)
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
    """Changes queries, keys and values (N, T, 3 * D) in place."""
    out: PackedWeight
    mlp_norm: Norm
    up: PackedWeight
    down: PackedWeight

    def __call__(self, x: np.ndarray, threads: int) -> None:
        """Changes the tokens x (N, T, D) float32, contiguous, in place."""
        images, tokens, width = x.shape
        rows = x.reshape(-1, width)
        qkv = np.empty((images, tokens, 3 * width), np.float32)
        flat = qkv.reshape(-1, 3 * width)
        run(lambda part: _into_heads(rows, *part, self.attention_norm, self.qkv, flat), blocks(len(rows)), threads)
        if self.normalise_heads is not None:
            self.normalise_heads(qkv)
        attended = attend(qkv, self.heads, threads=threads).reshape(-1, width)
        run(lambda part: self._behind_heads(rows, attended, *part), blocks(len(rows)), threads)

    def _behind_heads(self, x: np.ndarray, attended: np.ndarray, start: int, stop: int) -> None:
        room = Rows(ROW_BLOCK, self.out.row_bytes).arrays
        hidden = aligned((ROW_BLOCK, self.up.rows), np.float32)
        normed = aligned((ROW_BLOCK, self.up.columns), np.float32)
        down_room = Rows(ROW_BLOCK, self.down.row_bytes).arrays
        _rows_behind_heads(
            x,
            attended,
            start,
            stop,
            weights_of(self.out),
            room,
            self.mlp_norm,
            normed,
            weights_of(self.up),
            self.activation,
            hidden,
            weights_of(self.down),
            down_room,
        )


def _into_heads(x: np.ndarray, start: int, stop: int, norm: Norm, packed: PackedWeight, out: np.ndarray) -> None:
    room = Rows(ROW_BLOCK, packed.row_bytes).arrays
    normed = aligned((ROW_BLOCK, x.shape[1]), np.float32)
    _rows_into_heads(x, start, stop, norm, normed, weights_of(packed), room, out)


@njit(**_options)
def _rows_into_heads(x, start, stop, norm, normed, weights, room, out):  # type: ignore[no-untyped-def]
    normalise_rows(x, start, stop, norm, normed)
    quantise_rows(normed, 0, stop - start, weights[0], room, 0)
    multiply_rows(room, weights, 0, stop - start, 0, len(weights[1]), NO_ACTIVATION, False, out, start)


@njit(**_options)
def _rows_behind_heads(x, attended, start, stop, out, room, norm, normed, up, activation, hidden, down, down_room):  # type: ignore[no-untyped-def]
    count = stop - start
    quantise_rows(attended, start, stop, out[0], room, 0)
    multiply_rows(room, out, 0, count, 0, len(out[1]), NO_ACTIVATION, True, x, start)
    normalise_rows(x, start, stop, norm, normed)
    quantise_rows(normed, 0, count, up[0], room, 0)
    multiply_rows(room, up, 0, count, 0, len(up[1]), activation, False, hidden, 0)
    quantise_rows(hidden, 0, count, down[0], down_room, 0)
    multiply_rows(down_room, down, 0, count, 0, len(down[1]), NO_ACTIVATION, True, x, start)
