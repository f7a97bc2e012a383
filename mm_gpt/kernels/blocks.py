"""Floats into the blocks that `expand` has no code for: loops compiled by numba, cached on disk, without the GIL.

Scales pass through numpy, which has half precision. Largest values are found among the bits of floats, as integers:
such loops become vector instructions, those over floats do not.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
MAGNITUDE = np.uint32(0x7FFFFFFF)
F0, F1, HALF_UP = np.float32(0), np.float32(1), np.float32(0.5)
LIMIT = np.float32(1 << 20)
"""Above all codes: what is not below is an overflow or no number, and becomes 0 as in the reference."""


def encode(name: str, values: np.ndarray, out: np.ndarray) -> None:
    """Values (n, block) in float32 into blocks (n, bytes); those of the K formats are for `fitting`."""
    scales = np.empty((len(values), 2), np.float32)
    _ENCODERS[name](values, values.view(np.int32), out, scales)
    num = 2 if name in ("Q4_1", "Q5_1") else 1
    with np.errstate(over="ignore"):
        out[:, : 2 * num] = scales[:, :num].astype(np.float16).view(np.uint8)


@jit
def encode_bf16(bits: np.ndarray, out: np.ndarray) -> None:
    """float32's bits to bfloat16's, to the nearest, to even; what is no number stays so."""
    for i in range(len(bits)):
        n = bits[i]
        rounded = (n + np.uint32(0x7FFF) + ((n >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (n >> np.uint32(16)) | np.uint32(64)
        out[i] = np.uint16(quiet if (n & MAGNITUDE) > np.uint32(0x7F800000) else rounded)


@jit
def _inverse(d: Any) -> Any:
    return F1 / d if d != F0 else F0


@jit
def _code(x: Any, most: Any) -> Any:
    """A float as a code in [0, most]."""
    return min(np.int32(x) if abs(x) < LIMIT else np.int32(0), np.int32(most))


@jit
def _extreme(values: np.ndarray, bits: np.ndarray) -> Any:
    """The value of the largest magnitude, the first of them."""
    top = np.int32(0)
    for j in range(32):
        top = max(top, bits[j] & np.int32(0x7FFFFFFF))
    for j in range(32):
        if (bits[j] & np.int32(0x7FFFFFFF)) == top:
            return values[j]
    return F0


@jit
def _ends(bits: np.ndarray, ends: np.ndarray) -> None:
    """The keys of the least and the largest value; keys are in the order of floats."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(32):
        key = bits[j] ^ ((bits[j] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        low, high = min(low, key), max(high, key)
    ends[0] = low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF))
    ends[1] = high ^ ((high >> np.int32(31)) & np.int32(0x7FFFFFFF))


def _symmetric(bits_a_value: int) -> Callable[..., None]:
    """Codes around the middle: the value of the largest magnitude becomes the least code."""
    middle, high_bits = 1 << (bits_a_value - 1), bits_a_value == 5
    most, start = 2 * middle - 1, 6 if bits_a_value == 5 else 2

    @jit
    def encode(values: np.ndarray, bits: np.ndarray, out: np.ndarray, scales: np.ndarray) -> None:
        codes = np.empty(32, np.int32)
        for b in range(len(values)):
            d = _extreme(values[b], bits[b]) / np.float32(-middle)
            scales[b, 0] = d
            inverse = _inverse(d)
            for j in range(32):
                codes[j] = _code(values[b, j] * inverse + np.float32(middle + 0.5), most)
            store(codes, out[b], start, high_bits)

    return encode


def _affine(bits_a_value: int) -> Callable[..., None]:
    """Codes from the least value, 0, to the largest."""
    most, start, high_bits = (1 << bits_a_value) - 1, 8 if bits_a_value == 5 else 4, bits_a_value == 5

    @jit
    def encode(values: np.ndarray, bits: np.ndarray, out: np.ndarray, scales: np.ndarray) -> None:
        codes = np.empty(32, np.int32)
        ends = np.empty(2, np.int32)
        for b in range(len(values)):
            _ends(bits[b], ends)
            low, high = ends.view(np.float32)
            d = (high - low) / np.float32(most)
            scales[b, 0], scales[b, 1] = d, low
            inverse = _inverse(d)
            for j in range(32):
                codes[j] = _code((values[b, j] - low) * inverse + HALF_UP, most)
            store(codes, out[b], start, high_bits)

    return encode


@jit
def store(codes: np.ndarray, out: np.ndarray, start: int, high_bits: bool) -> None:
    """Nibbles from `start` on, the first half of the codes in the low ones; the fifth bits as a word before them."""
    for j in range(16):
        out[start + j] = np.uint8((codes[j] & 15) | ((codes[j + 16] & 15) << 4))
    if high_bits:
        for byte in range(4):
            word = 0
            for j in range(8):
                word |= (codes[8 * byte + j] >> 4) << j
            out[start - 4 + byte] = np.uint8(word)


_ENCODERS: dict[str, Callable[..., None]] = {
    "Q4_0": _symmetric(4),
    "Q5_0": _symmetric(5),
    "Q4_1": _affine(4),
    "Q5_1": _affine(5),
}
