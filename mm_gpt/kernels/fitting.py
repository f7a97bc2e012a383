"""Values into blocks whose scales are searched for: GGUF's K blocks, where the format leaves that to the writer, and
Q4_1 and Q5_1 where bytes need not be the reference's.

Each group of values tries some ranges, fits scale (and minimum) to its codes by least squares, and keeps what has the
least squared error. Then scales are rounded to what the file can say, and the codes are chosen anew for that. A K block
has two scales in half precision for 256 values, and small factors of them for each group.
"""

from typing import Any

import numba
import numpy as np

from mm_gpt.kernels.blocks import F0, F1, HALF_UP, jit, store

TRIALS = 12
"""Ranges that are tried: from more than the whole one to one that cuts the largest values off."""
_search = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"nnan", "nsz", "reassoc", "contract"})
"""For loops that only choose: sums in any order become vector instructions."""


def encode(name: str, values: np.ndarray, out: np.ndarray) -> None:
    """Values (n, block) in float32 into blocks (n, bytes)."""
    num = len(values)
    if name in ("Q4_1", "Q5_1"):
        most = 15 if name == "Q4_1" else 31
        scales, minima = np.empty((num, 1), np.float32), np.empty((num, 1), np.float32)
        ranges(values, np.float32(most), scales, minima, True)
        both = _half(np.hstack((scales, -minima)))
        out[:, :4] = both.view(np.uint8)
        _store_pairs(values, both.astype(np.float32), most, out)
        return
    if name == "Q6_K":
        factors = np.empty((num, 16), np.float32)
        _scales(values, factors)
        top = np.take_along_axis(factors, np.abs(factors).argmax(axis=1)[:, None], 1)
        d = _half(top / np.float32(-128))
        out[:, 208:] = d.view(np.uint8)
        _store_q6(values, factors, d.astype(np.float32)[:, 0], out)
        return
    most = 31 if name == "Q5_K" else 15
    scales, minima = np.empty((num, 8), np.float32), np.empty((num, 8), np.float32)
    ranges(values, np.float32(most), scales, minima, False)
    d, m = (_half(array.max(axis=1, keepdims=True) / np.float32(63)) for array in (scales, minima))
    m[d == 0] = 0  # minima without a scale say nothing
    out[:, :2], out[:, 2:4] = d.view(np.uint8), m.view(np.uint8)
    _store_affine(values, scales, minima, d.astype(np.float32)[:, 0], m.astype(np.float32)[:, 0], most, out)


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


@jit
def _nearest(x: Any, low: Any, high: Any) -> Any:
    """A float as a whole number in [low, high]."""
    return np.int32(min(max(np.floor(x + HALF_UP), np.float32(low)), np.float32(high)))


@jit
def _ratio(a: Any, b: Any) -> Any:
    return a / b if b != F0 else F0


@_search
def ranges(values: np.ndarray, most: Any, scales: np.ndarray, minima: np.ndarray, positive: bool) -> None:
    """Scale s and minimum m of each 32 values x ~ s q - m, with q from 0 to `most`; x may be `positive`, all of them,
    with an m below 0."""
    for b in range(len(values)):
        for group in range(scales.shape[1]):
            x = values[b, 32 * group : 32 * group + 32]
            low, high, sum_x = F0, F0, F0
            if positive:
                low, high = x[0], x[0]
            for j in range(32):
                low, high = min(low, x[j]), max(high, x[j])
                sum_x += x[j]
            if high == low:  # all are the same, or 0
                scales[b, group], minima[b, group] = F0, -low
                continue
            scales[b, group], minima[b, group], best = (high - low) / most, -low, np.float32(np.inf)
            for trial in range(TRIALS):
                inverse = (most + np.float32(0.15) * np.float32(trial - 4)) / (high - low)
                sum_q, sum_qq, sum_qx = F0, F0, F0
                for j in range(32):
                    q = min(np.floor((x[j] - low) * inverse + HALF_UP), most)
                    sum_q += q
                    sum_qq += q * q
                    sum_qx += q * x[j]
                spread = np.float32(32) * sum_qq - sum_q * sum_q
                scale = _ratio(np.float32(32) * sum_qx - sum_q * sum_x, spread)
                start = (sum_x - scale * sum_q) / np.float32(32)
                if start > F0 and not positive:  # the K formats have no m below 0
                    scale, start = _ratio(sum_qx, sum_qq), F0
                if scale <= F0:
                    continue
                error, step = F0, F1 / scale
                for j in range(32):
                    q = min(max(np.floor((x[j] - start) * step + HALF_UP), F0), most)
                    away = scale * q + start - x[j]
                    error += away * away
                if error < best:
                    scales[b, group], minima[b, group], best = scale, -start, error


@jit
def _store_pairs(values: np.ndarray, pairs: np.ndarray, most: int, out: np.ndarray) -> None:
    codes = np.empty(32, np.int32)
    for b in range(len(values)):
        for j in range(32):
            codes[j] = _nearest(_ratio(values[b, j] - pairs[b, 1], pairs[b, 0]), 0, most)
        store(codes, out[b], 8 if most == 31 else 4, most == 31)


@jit
def _store_affine(
    values: np.ndarray, scales: np.ndarray, minima: np.ndarray, d: np.ndarray, m: np.ndarray, most: int, out: np.ndarray
) -> None:
    codes = np.empty(256, np.int32)
    factors = np.empty(16, np.int32)
    at = 48 if most == 31 else 16
    for b in range(len(values)):
        for group in range(8):
            factors[group] = _nearest(_ratio(scales[b, group], d[b]), 0, 63)
            factors[8 + group] = _nearest(_ratio(minima[b, group], m[b]), 0, 63)
            scale, start = d[b] * np.float32(factors[group]), m[b] * np.float32(factors[8 + group])
            for j in range(32 * group, 32 * group + 32):
                codes[j] = _nearest(_ratio(values[b, j] + start, scale), 0, most)
        for j in range(4):
            out[b, 4 + j] = np.uint8(factors[j] | (factors[4 + j] >> 4 << 6))
            out[b, 8 + j] = np.uint8(factors[8 + j] | (factors[12 + j] >> 4 << 6))
            out[b, 12 + j] = np.uint8((factors[4 + j] & 15) | ((factors[12 + j] & 15) << 4))
        if most == 31:
            for j in range(32):
                word = 0
                for group in range(8):
                    word |= (codes[32 * group + j] >> 4) << group
                out[b, 16 + j] = np.uint8(word)
        for group in range(0, 8, 2):
            for j in range(32):
                low, high = codes[32 * group + j] & 15, codes[32 * group + 32 + j] & 15
                out[b, at + 16 * group + j] = np.uint8(low | (high << 4))


@_search
def _scales(values: np.ndarray, scales: np.ndarray) -> None:
    """The signed scale s of each 16 values x ~ s q, with q from -32 to 31."""
    for b in range(len(values)):
        for group in range(16):
            x = values[b, 16 * group : 16 * group + 16]
            top = F0
            for j in range(16):
                if abs(x[j]) > abs(top):
                    top = x[j]
            scales[b, group] = F0
            if top == F0:
                continue
            best = np.float32(-1)
            for trial in range(-7, 8):
                inverse = -(np.float32(32) + np.float32(0.15) * np.float32(trial)) / top
                sum_qq, sum_qx = F0, F0
                for j in range(16):
                    q = min(max(np.floor(x[j] * inverse + HALF_UP), np.float32(-32)), np.float32(31))
                    sum_qq += q * q
                    sum_qx += q * x[j]
                # With the best scale for these codes the error is sum x² - (sum q x)² / sum q²
                gain = _ratio(sum_qx * sum_qx, sum_qq)
                if gain > best:
                    scales[b, group], best = _ratio(sum_qx, sum_qq), gain


@jit
def _store_q6(values: np.ndarray, scales: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
    codes = np.empty(256, np.int32)
    for b in range(len(values)):
        for group in range(16):
            factor = _nearest(_ratio(scales[b, group], d[b]), -128, 127)
            out[b, 192 + group] = np.uint8(factor)
            scale = d[b] * np.float32(factor)
            for j in range(16 * group, 16 * group + 16):
                codes[j] = _nearest(_ratio(values[b, j], scale), -32, 31) + 32
        for half in range(2):
            for j in range(32):
                c = codes[128 * half + j : 128 * half + 128 : 32]
                for pair in range(2):
                    out[b, 64 * half + 32 * pair + j] = np.uint8((c[pair] & 15) | ((c[pair + 2] & 15) << 4))
                high = (c[0] >> 4) | (c[1] >> 4 << 2) | (c[2] >> 4 << 4) | (c[3] >> 4 << 6)
                out[b, 128 + 32 * half + j] = np.uint8(high)
