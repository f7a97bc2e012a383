"""Attention of all tokens to all, as in a vision tower, in bfloat16 with float32 sums and softmax, on the CPU.

Shapes: T tokens, H heads, C features of a head. Six queries go through at a time: their scores of all the keys stay in
the nearest cache, so that the softmax is the plain one, over the whole row.
"""

import numpy as np
from numba import njit

from mm_gpt.kernels.gemm import _options, half, to_bf16
from mm_gpt.kernels.tiles import GROUP, TILE_COLUMNS, TILE_ROWS, address, aligned, bf16_tile, run, softmax_row

_PAIR = GROUP // 2
"""Values of bfloat16 in a group."""


def attend(qkv: np.ndarray, heads: int, *, threads: int = 1) -> np.ndarray:
    """softmax(q k' / sqrt(C)) v for each image and head: (N, T, H * C) float32.

    `qkv` (N, T, 3 * H * C) float32, contiguous, holds queries, keys and values of all heads, in this order.
    """
    images, tokens, width = qkv.shape
    out = np.empty((images, tokens, width // 3), np.float32)
    share = max(1, heads // (2 * threads))
    items = [(n, h, min(h + share, heads)) for n in range(images) for h in range(0, heads, share)]

    def job(item: tuple[int, int, int]) -> None:
        n, first, last = item
        attend_heads(qkv[n], heads, first, last, out[n], *_scratch(tokens, width // 3 // heads))

    run(job, items, threads)
    return out


def _scratch(tokens: int, size: int) -> tuple[np.ndarray, ...]:
    """Room for a head's keys and values as panels, for six queries, their scores and their probabilities."""
    padded = -(-tokens // TILE_COLUMNS) * TILE_COLUMNS
    groups, value_panels = -(-size // _PAIR), -(-size // TILE_COLUMNS)
    absent = np.zeros(padded, np.float32)
    absent[tokens:] = -1e30  # is added to the scores of keys that are not there
    return (
        aligned((padded // TILE_COLUMNS, groups, TILE_COLUMNS, _PAIR), np.uint16),
        aligned((value_panels, padded // _PAIR, TILE_COLUMNS, _PAIR), np.uint16),
        aligned((TILE_ROWS, groups * _PAIR), np.uint16),
        aligned((TILE_ROWS, padded), np.float32),
        aligned((TILE_ROWS, padded), np.uint16),
        absent,
    )


@njit(**_options)
def attend_heads(qkv, heads, first, last, out, keys, values, queries, scores, weights, absent):  # type: ignore[no-untyped-def]
    """Heads first to last of one image: `qkv` is (T, 3 * H * C), `out` (T, H * C)."""
    tokens, width = out.shape
    size = width // heads
    factor = np.float32(1.442695 / np.sqrt(size))
    tile, sums = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.empty(TILE_ROWS, np.float32)
    no_bias = np.zeros(TILE_COLUMNS, np.float32)
    for start in range(first * size, last * size, size):
        _pack_keys(qkv, width + start, size, keys)
        _pack_values(qkv, 2 * width + start, size, values)
        for row in range(0, tokens, TILE_ROWS):
            count = min(TILE_ROWS, tokens - row)
            for i in range(count):
                to_bf16(qkv[row + i, start : start + size], queries[i])
            for panel in range(keys.shape[0]):
                biases, to = absent[panel * TILE_COLUMNS :], scores[:, panel * TILE_COLUMNS :]
                _multiply(queries, keys[panel], biases, address(to), 4 * scores.shape[1])
            for i in range(count):
                sums[i] = softmax_row(address(scores[i]), scores.shape[1], factor, address(weights[i]))
            for panel in range(values.shape[0]):
                _multiply(weights, values[panel], no_bias, address(tile), 4 * TILE_COLUMNS)
                column = panel * TILE_COLUMNS
                for i in range(count):
                    place = out[row + i, start + column : start + min(column + TILE_COLUMNS, size)]
                    inverse = np.float32(1) / sums[i]
                    for j in range(len(place)):
                        place[j] = tile[i, j] * inverse


@njit(**_options)
def _multiply(rows, panel, bias, out, stride):  # type: ignore[no-untyped-def]
    """Six rows of bfloat16 times a panel, plus a bias for each column, to a place with this stride."""
    groups = panel.shape[0]
    bf16_tile(address(rows), groups * GROUP, address(panel), groups, 0, 0, 0, 0, address(bias), out, stride)


@njit(inline="never", **_options)
def _pack_keys(qkv, start, size, keys):  # type: ignore[no-untyped-def]
    panels, groups, columns, pair = keys.shape
    words = keys.view(np.uint32).reshape(panels, groups, columns)
    row = np.zeros(groups * pair, np.uint16)
    pairs = row.view(np.uint32)
    for token in range(panels * columns):
        if token < len(qkv):
            to_bf16(qkv[token, start : start + size], row)
        else:
            row[:] = 0
        panel, column = token // columns, token % columns
        for group in range(groups):
            words[panel, group, column] = pairs[group]


@njit(inline="never", **_options)
def _pack_values(qkv, start, size, values):  # type: ignore[no-untyped-def]
    panels, groups, columns, pair = values.shape
    values[:] = 0
    for panel in range(panels):
        column = start + panel * columns
        width = min(columns, start + size - column)
        for token in range(len(qkv)):
            place, side = values[panel, token // pair], token % pair
            for i in range(width):
                place[i, side] = half(qkv[token, column + i])
