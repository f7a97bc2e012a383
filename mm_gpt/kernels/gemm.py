"""Matrix products of many rows on the CPU, in int8 or bfloat16, with what comes before and after them.

Shapes: M rows, K values in, N values out. x (M, K) float32 times packed weights (N, K), plus bias, is (M, N) float32.

int8: weights have one scale per output, symmetric. Each row of x is quantised where it is used, to 0..255 over its own
range (zero included, and exact), as LLM.int8 (2208.07339) and ZeroQuant (2206.01861) do per token; the sums are exact,
and the zero point is taken out by the sum of the output's weights. bf16: both are rounded to it, sums are float32.

A row's result does not depend, bit for bit, on how many rows there are, on its place, or on the number of threads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mm_gpt.errors import MMGPTError
from mm_gpt.kernels.tiles import (
    GROUP,
    TILE_COLUMNS,
    TILE_ROWS,
    address,
    aligned,
    bf16_tile,
    bits_of_float,
    float_of_bits,
    int8_tile,
    jit,
    run,
)

Kind = Literal["int8", "bf16"]

ROW_BLOCK = 8 * TILE_ROWS
"""Rows that one thread takes through a product: weights are read once for all of them."""
MAX_COLUMNS = 2**16
"""K up to which no sum of 255 · 127 leaves int32."""
NO_ACTIVATION, GELU, GELU_TANH, QUICK_GELU = range(4)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix (N, K) as the kernels read it."""

    kind: Kind
    rows: int
    """N"""
    columns: int
    """K"""
    panels: np.ndarray
    """(panels of 64 outputs, groups of 4 bytes along K, 64, 4) uint8; what is beyond N and K is zero."""
    scale: np.ndarray
    """(padded N,) float32: what an integer weight of this output stands for. Ones for bf16."""
    sums: np.ndarray
    """(padded N,) int32: of the integer weights of each output. Zeros for bf16."""
    bias: np.ndarray
    """(padded N,) float32"""

    @property
    def row_bytes(self) -> int:
        """Of a row of x as it is multiplied."""
        return self.panels.shape[1] * GROUP


def pack(weight: np.ndarray, bias: np.ndarray | None, kind: Kind) -> PackedWeight:
    """Weights (N, K) float32 and bias (N,) as `gemm` takes them.

    Raises MMGPTError for what is not finite, for an empty matrix, and for K beyond `MAX_COLUMNS` in int8.
    """
    rows, columns = weight.shape
    if not rows or not columns:
        raise MMGPTError(f"a matrix of {rows} x {columns} cannot be packed")
    if kind == "int8" and columns > MAX_COLUMNS:
        raise MMGPTError(f"a matrix with {columns} columns is too wide for sums in int32 ({MAX_COLUMNS} at most)")
    if not np.isfinite(weight).all():
        raise MMGPTError("a matrix holds values that are not finite")
    padded = -(-rows // TILE_COLUMNS) * TILE_COLUMNS
    each = GROUP if kind == "int8" else GROUP // 2  # values in a group
    groups = -(-columns // each)
    scale, sums, offsets = np.ones(padded, np.float32), np.zeros(padded, np.int32), np.zeros(padded, np.float32)
    if bias is not None:
        offsets[:rows] = bias
    if kind == "int8":
        largest = np.abs(weight).max(axis=1)
        scale[:rows] = np.where(largest > 0, largest / 127, 1)
        values = np.zeros((padded, groups * each), np.int8)
        values[:rows, :columns] = np.clip(np.rint(weight / scale[:rows, None]), -127, 127)
        sums[:] = values.sum(axis=1, dtype=np.int32)
    else:
        values = np.zeros((padded, groups * each), np.uint16)
        values[:rows, :columns] = _bf16(np.ascontiguousarray(weight))
    panels = aligned((padded // TILE_COLUMNS, groups, TILE_COLUMNS, GROUP), np.uint8)
    blocks = values.view(np.uint8).reshape(-1, TILE_COLUMNS, groups, GROUP)
    panels[:] = blocks.transpose(0, 2, 1, 3)
    return PackedWeight(kind, rows, columns, panels, scale, sums, offsets)


def _bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 to the bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def gemm(x: np.ndarray, packed: PackedWeight, *, threads: int = 1) -> np.ndarray:
    """x (M, K) float32, contiguous, times the weights, plus the bias: (M, N) float32."""
    if x.ndim != 2 or x.shape[1] != packed.columns or x.dtype != np.float32 or not x.flags.c_contiguous:
        raise ValueError(f"expected rows of {packed.columns} contiguous float32, got {x.dtype} {x.shape}")
    out = np.empty((len(x), packed.rows), np.float32)
    rows = Rows(len(x), packed.row_bytes)
    run(lambda part: quantise_rows(x, part[0], part[1], packed.kind, rows, part[0]), blocks(len(x)), threads)
    # Few rows: the outputs are shared out as well, so that every thread has work
    panels = len(packed.panels)
    share = -(-panels // max(1, 2 * threads // len(list(blocks(len(x)))))) if len(x) else panels
    items = [(r, c, min(c + share, panels)) for r in blocks(len(x)) for c in range(0, panels, share)]

    weights = weights_of(packed)

    def multiply(item: tuple[tuple[int, int], int, int]) -> None:
        (start, stop), first, last = item
        multiply_rows(rows.arrays, weights, start, stop, first, last, NO_ACTIVATION, False, out, start)

    run(multiply, items, threads)
    return out


def linear(
    x: np.ndarray,
    start: int,
    stop: int,
    packed: PackedWeight,
    out: np.ndarray,
    to: int,
    *,
    activation: int = NO_ACTIVATION,
    add: bool = False,
) -> None:
    """A block of rows of x times all the weights, in this thread: into rows of `out` from `to` on, or added to them."""
    rows = Rows(ROW_BLOCK, packed.row_bytes)
    quantise_rows(x, start, stop, packed.kind, rows, 0)
    multiply_rows(rows.arrays, weights_of(packed), 0, stop - start, 0, len(packed.panels), activation, add, out, to)


def blocks(rows: int, size: int = ROW_BLOCK) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block of rows."""
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


class Rows:
    """Room for rows of x as they are multiplied: bytes, and in int8 the scale and zero point of each."""

    def __init__(self, rows: int, row_bytes: int):
        padded = -(-rows // TILE_ROWS) * TILE_ROWS
        values = aligned((padded, row_bytes), np.uint8)
        values[rows:] = 0
        self.arrays = values, np.ones(padded, np.float32), np.zeros(padded, np.int32)


def weights_of(packed: PackedWeight) -> tuple[bool, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return packed.kind == "int8", packed.panels, packed.scale, packed.sums, packed.bias


@jit(fast=True)
def normalise_rows(x, start, stop, norm, out):  # type: ignore[no-untyped-def]
    """Rows start to stop of x into the first rows of `out`, by LayerNorm or RMSNorm.

    `norm` is (whether the mean is taken away, gain, offset, epsilon).
    """
    centred, gain, offset, eps = norm
    width = x.shape[1]
    for row in range(start, stop):
        mean = np.float32(0)
        if centred:
            for i in range(width):
                mean += x[row, i]
            mean /= np.float32(width)
        total = np.float32(0)
        for i in range(width):
            total += (x[row, i] - mean) * (x[row, i] - mean)
        inverse = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            out[row - start, i] = (x[row, i] - mean) * inverse * gain[i] + offset[i]


def quantise_rows(x: np.ndarray, start: int, stop: int, kind: Kind, rows: "Rows", to: int) -> None:
    """Rows start to stop of x into `rows` from `to` on."""
    if kind == "int8":
        _to_uint8(x, start, stop, *rows.arrays, to)
    else:
        to_bf16(x, start, stop, rows.arrays[0].view(np.uint16), to)


@jit()
def _to_uint8(x, start, stop, values, scales, zeros, to):  # type: ignore[no-untyped-def]
    """A row is scale * (values - zero). NaN and infinity make the scale so."""
    width = x.shape[1]
    for row in range(start, stop):
        # As integers, in the order of the floats: these minima become vector instructions, and a NaN is the largest
        low, high = np.int32(0), np.int32(0)
        for i in range(width):
            bits = bits_of_float(x[row, i])
            key = np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            low = min(low, key)
            high = max(high, key)
        lowest = float_of_bits(np.int32(low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF))))
        reach = float_of_bits(high) - lowest
        inverse = np.float32(0)
        if np.float32(1e-30) < reach < np.float32(3e38):
            inverse = np.float32(255) / reach
        zero = np.int32(np.float32(0.5) - lowest * inverse)
        place = to + row - start
        scales[place], zeros[place] = reach / np.float32(255), zero
        shift = np.float32(zero) + np.float32(0.5)
        for i in range(width):
            value = min(max(x[row, i] * inverse + shift, np.float32(0)), np.float32(255))
            values[place, i] = np.uint8(np.int32(value))
        for i in range(width, values.shape[1]):
            values[place, i] = np.uint8(0)


@jit()
def to_bf16(x, start, stop, out, to):  # type: ignore[no-untyped-def]
    """Rows start to stop of x as the bits of bfloat16, ties to even, into `out` from `to` on, with zeros behind."""
    width = x.shape[1]
    for row in range(start, stop):
        place = to + row - start
        for i in range(width):
            bits = np.uint32(bits_of_float(x[row, i]))
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            out[place, i] = np.uint16(rounded >> np.uint32(16))
        for i in range(width, out.shape[1]):
            out[place, i] = np.uint16(0)


@jit()
def multiply_rows(rows, weights, start, stop, first, last, activation, add, out, to):  # type: ignore[no-untyped-def]
    """Rows start to stop times panels first to last: written to rows of `out` from `to` on, or added to them.

    `rows` and `weights` are `Rows.arrays` and `weights_of`; `start` is a multiple of the rows of a tile.
    """
    values, row_scale, zero = rows
    is_int8, panels, scale, sums, bias = weights
    tile = np.empty((TILE_ROWS, TILE_COLUMNS), np.float32)
    stride, groups = values.shape[1], panels.shape[1]
    for panel in range(first, last):
        column = panel * TILE_COLUMNS
        width = min(TILE_COLUMNS, out.shape[1] - column)
        panel_at = address(panels) + panel * groups * TILE_COLUMNS * GROUP
        scales, corrections = address(scale) + 4 * column, address(sums) + 4 * column
        biases = address(bias) + 4 * column
        for row in range(start, stop, TILE_ROWS):
            place = address(values) + row * stride
            factors, points = address(row_scale) + 4 * row, address(zero) + 4 * row
            target_row = to + row - start
            direct = not add and not activation and width == TILE_COLUMNS and row + TILE_ROWS <= stop
            target, target_stride = address(tile), 4 * TILE_COLUMNS
            if direct:
                target, target_stride = address(out) + 4 * (target_row * out.shape[1] + column), 4 * out.shape[1]
            if is_int8:
                int8_tile(
                    place, stride, panel_at, groups, factors, points, scales, corrections, biases, target, target_stride
                )
            else:
                bf16_tile(
                    place, stride, panel_at, groups, factors, points, scales, corrections, biases, target, target_stride
                )
            if not direct:
                if activation:
                    activate(tile, activation)
                for i in range(min(TILE_ROWS, stop - row)):
                    for j in range(width):
                        before = out[target_row + i, column + j] if add else np.float32(0)
                        out[target_row + i, column + j] = before + tile[i, j]


@jit(fast=True)
def activate(values, activation):  # type: ignore[no-untyped-def]
    """Values (rows, columns) in place."""
    for i in range(values.shape[0]):
        if activation == GELU:
            for j in range(values.shape[1]):
                values[i, j] = _gelu(values[i, j])
        else:
            cubic = np.float32(0.071354816 if activation == GELU_TANH else 0)
            linear = np.float32(1.5957691 if activation == GELU_TANH else 1.702)
            for j in range(values.shape[1]):
                x = values[i, j]
                square = min(x * x, np.float32(1e6))  # zero times infinity would be NaN
                values[i, j] = _swish(x, x * (linear + cubic * square))


@jit(fast=True, inner=True)
def exp2(x):  # type: ignore[no-untyped-def]
    """2^x for x <= 0, to 2e-7 of itself, in operations that become vector instructions; 2^-126 is the least."""
    x = max(x, np.float32(-126))
    whole = np.int32(x)
    y = x - np.float32(whole)  # in (-1, 0], where the polynomial was fitted for the least relative error
    p = np.float32(0.0009448999) * y + np.float32(0.009205788)
    p = (p * y + np.float32(0.055297349)) * y + np.float32(0.24018013)
    p = (p * y + np.float32(0.69314373)) * y + np.float32(1)
    return p * float_of_bits(np.int32((whole + np.int32(127)) << np.int32(23)))


@jit(fast=True, inner=True)
def _swish(x, y):  # type: ignore[no-untyped-def]
    """x times the logistic function of y."""
    e = exp2(-abs(y) * np.float32(1.442695))
    return x * (np.float32(1) if y > 0 else e) / (np.float32(1) + e)


@jit(fast=True, inner=True)
def _gelu(x):  # type: ignore[no-untyped-def]
    """x Phi(x), the error function after Abramowitz and Stegun, 7.1.26: to 1.5e-7 of Phi."""
    t = np.float32(1) / (np.float32(1) + np.float32(0.23164189) * abs(x))
    p = (np.float32(1.061405429) * t - np.float32(1.453152027)) * t + np.float32(1.421413741)
    p = ((p * t - np.float32(0.284496736)) * t + np.float32(0.254829592)) * t
    half = np.float32(0.5) * p * exp2(x * x * np.float32(-0.72134752))  # Phi(-|x|)
    return x * (np.float32(1) - half if x > 0 else half)
