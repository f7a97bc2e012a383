"""Attention of all tokens to all, as in a vision tower, in bfloat16 with float32 sums and softmax, on the CPU.

Shapes: N images, T tokens, H heads, C features of a head, an even number. Six queries go through at a time: their
scores of all the keys stay in the nearest cache, so that the softmax is the plain one, over the whole row.
"""

import numpy as np

from mm_gpt.kernels.tiles import GROUP, TILE_COLUMNS, TILE_ROWS, address, aligned, bf16_tile, jit, run, softmax_row

_PAIR = GROUP // 2
"""Values of bfloat16 in a group."""


def room_for_heads(rows: int, width: int) -> np.ndarray:
    """For `attend`: (`rows` and some that only fill up the last six, `width`) bits of bfloat16."""
    return aligned((rows + TILE_ROWS - 1, width), np.uint16)


def attend(qkv: np.ndarray, images: int, heads: int, *, threads: int = 1) -> np.ndarray:
    """softmax(q k' / sqrt(C)) v for each image and head: (N * T, H * C) float32.

    `qkv` is a filled `room_for_heads(N * T, 3 * H * C)`: queries, keys and values of all heads, in this order.
    """
    rows, width = len(qkv) - TILE_ROWS + 1, qkv.shape[1] // 3
    out = np.empty((rows, width), np.float32)
    tokens, share = rows // max(images, 1), max(1, heads // (2 * threads))
    items = [(n * tokens, h, min(h + share, heads)) for n in range(images) for h in range(0, heads, share)]

    def job(item: tuple[int, int, int]) -> None:
        start, *some = item
        _attend(qkv[start : start + tokens + TILE_ROWS - 1], out[start : start + tokens], heads, range(*some))

    run(job, items, threads)
    return out


def _attend(qkv: np.ndarray, out: np.ndarray, heads: int, some: range) -> None:
    """Some heads of one image: `out` is (T, H * C)."""
    tokens, width = out.shape
    size, padded = width // heads, -(-tokens // TILE_COLUMNS) * TILE_COLUMNS
    k, v = (qkv[:tokens, at : at + width].reshape(tokens, heads, size) for at in (width, 2 * width))
    # What the tiles read: panels of 64 keys, and of 64 features of the values, with zeros for what is not there
    keys = np.zeros((padded, size // _PAIR), np.uint32)
    key_panels = aligned((padded // TILE_COLUMNS, size // _PAIR, TILE_COLUMNS), np.uint32)
    value_panels = aligned((-(-size // TILE_COLUMNS), padded // _PAIR, TILE_COLUMNS, _PAIR), np.uint16)
    value_panels[:] = 0
    absent = np.zeros(padded, np.float32)
    absent[tokens:] = -1e30  # is added to the scores
    scores, weights = aligned((TILE_ROWS, padded), np.float32), aligned((TILE_ROWS, padded), np.uint16)
    for head in some:
        keys[:tokens] = np.ascontiguousarray(k[:, head]).view(np.uint32)
        key_panels[:] = keys.reshape(-1, TILE_COLUMNS, keys.shape[1]).transpose(0, 2, 1)
        for panel in range(len(value_panels)):
            part = v[:, head, panel * TILE_COLUMNS : (panel + 1) * TILE_COLUMNS]
            for side in range(_PAIR):
                rows = part[side::_PAIR]
                value_panels[panel, : len(rows), : part.shape[1], side] = rows
        _attend_head(qkv, head * size, size, key_panels, value_panels, absent, scores, weights, out)


@jit()
def _attend_head(qkv, start, size, keys, values, absent, scores, weights, out):  # type: ignore[no-untyped-def]
    """The head whose queries begin at column `start`."""
    factor = np.float32(1.442695 / np.sqrt(size))
    tile, no_bias = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32), np.zeros(TILE_COLUMNS, np.float32)
    sums = np.empty(TILE_ROWS, np.float32)
    stride, columns = 2 * qkv.shape[1], scores.shape[1]
    for row in range(0, len(out), TILE_ROWS):
        queries = address(qkv) + row * stride + 2 * start
        for panel in range(len(keys) + len(values)):
            # One call for both products: each brings the code of a tile with it
            is_value = panel >= len(keys)
            if panel == len(keys):
                for i in range(TILE_ROWS):
                    at = i * columns
                    sums[i] = softmax_row(address(scores) + 4 * at, columns, factor, address(weights) + 2 * at)
            if is_value:
                i = panel - len(keys)
                groups, rows, rows_stride = values.shape[1], address(weights), 2 * columns
                place, bias = address(values) + i * groups * TILE_COLUMNS * GROUP, address(no_bias)
                to, to_stride = address(tile), 4 * TILE_COLUMNS
            else:
                groups, rows, rows_stride = keys.shape[1], queries, stride
                place, bias = address(keys) + panel * groups * TILE_COLUMNS * GROUP, address(absent) + 256 * panel
                to, to_stride = address(scores) + 4 * TILE_COLUMNS * panel, 4 * columns
            bf16_tile(rows, rows_stride, place, groups, 0, 0, 0, 0, bias, to, to_stride)
            if is_value:
                column = TILE_COLUMNS * (panel - len(keys))
                for i in range(min(TILE_ROWS, len(out) - row)):
                    inverse = np.float32(1) / sums[i]
                    for j in range(min(TILE_COLUMNS, size - column)):
                        out[row + i, start + column + j] = tile[i, j] * inverse
