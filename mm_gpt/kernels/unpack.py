"""The blocks of GGUF files, as they lie in memory, into integers and scales: one function for each format.

The formats are those of ggml-quants.c (llama.cpp): a float16 scale d, often a float16 minimum m, and the numbers; in
the large ones (K) d and m have small factors for each 16 or 32 numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mm_gpt.kernels.simd import F16, F32, I8, I16, I32, Code, Value, vector

MINIMUM = 1
"""Which float16 of a small block's is its minimum."""


@dataclass(frozen=True)
class Part:
    """32 values of a row of weights: value = scale · number + minimum."""

    numbers: Callable[[], Value]
    """Writes the code for <32 x i16>, when it is needed: all of a large block would not fit into registers."""
    scale: Value
    """<16 x float>, for each pair of numbers; or a few floats, of which the one at `lane` counts for all."""
    lane: int | None = None
    minimum: tuple[Value, int] | None = None
    """A few floats, and the place of the minimum among them."""


@dataclass(frozen=True)
class BlockFormat:
    block_values: int
    block_bytes: int
    unpack: Callable[[Code, Value], list[Part]]
    has_minima: bool = False


def _halves(code: Code, address: Value) -> Value:
    """<4 x float> from float16. Four at once are one instruction; one alone waits for what the register held before."""
    return code.load(address, vector(F16, 4)).to(F32)


def _nibbles(code: Code, packed: Value) -> Value:
    """<16 x i8> -> <32 x i8>: the low halves of all bytes, then the high ones."""
    return packed.shuffle(range(32), packed >> 4) & 15


def _fifth_bits(code: Code, address: Value) -> Value:
    """32 bits in memory -> <32 x i8> of 0 or 16."""
    bits = code.load(address, I32).bits_as_lanes()
    return bits.where(code.number(vector(I8, 32), 16), 0)


def _q8_0(code: Code, block: Value) -> list[Part]:
    return [Part(lambda: code.load(block, vector(I8, 32), 2).to(I16), _halves(code, block), 0)]


def _q4_0(code: Code, block: Value) -> list[Part]:
    def numbers() -> Value:
        return (_nibbles(code, code.load(block, vector(I8, 16), 2)) - 8).to(I16)

    return [Part(numbers, _halves(code, block), 0)]


def _q4_1(code: Code, block: Value) -> list[Part]:
    def numbers() -> Value:
        return _nibbles(code, code.load(block, vector(I8, 16), 4)).to(I16, signed=False)

    halves = _halves(code, block)
    return [Part(numbers, halves, 0, (halves, MINIMUM))]


def _q5_0(code: Code, block: Value) -> list[Part]:
    def numbers() -> Value:
        return ((_nibbles(code, code.load(block, vector(I8, 16), 6)) | _fifth_bits(code, block + 2)) - 16).to(I16)

    return [Part(numbers, _halves(code, block), 0)]


def _q5_1(code: Code, block: Value) -> list[Part]:
    def numbers() -> Value:
        return (_nibbles(code, code.load(block, vector(I8, 16), 8)) | _fifth_bits(code, block + 4)).to(
            I16, signed=False
        )

    halves = _halves(code, block)
    return [Part(numbers, halves, 0, (halves, MINIMUM))]


def _scales_of_k(code: Code, block: Value) -> tuple[Value, Value]:
    """Eight scales and eight minima from the 12 bytes of 6-bit numbers at 4, and d and dmin at 0."""
    first, second, high = (code.load(block, I32, 4 + 4 * word) for word in range(3))
    # Bytes 0-3 and 4-7 hold the low six bits' first four scales and minima; their two top bits and the last four
    # bytes' nibbles make the second four.
    words = (
        code.vector_of([first & 0x3F3F3F3F, (high & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)]),
        code.vector_of([second & 0x3F3F3F3F, ((high >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030)]),
    )
    factors = _halves(code, block)
    scales, minima = (
        pair.bits(I8).to(F32, signed=False) * factors.shuffle([index] * 8) for index, pair in enumerate(words)
    )
    return scales, minima * -1.0


def _q4_k(code: Code, block: Value) -> list[Part]:
    def numbers(index: int) -> Value:
        packed = code.load(block, vector(I8, 32), 16 + 32 * (index // 2))
        return (packed >> 4 if index % 2 else packed & 15).to(I16, signed=False)

    scales, minima = _scales_of_k(code, block)
    return [Part(partial(numbers, index), scales, index, (minima, index)) for index in range(8)]


def _q5_k(code: Code, block: Value) -> list[Part]:
    def numbers(index: int) -> Value:
        packed = code.load(block, vector(I8, 32), 48 + 32 * (index // 2))
        fifth = ((code.load(block, vector(I8, 32), 16) >> index) & 1) << 4
        return ((packed >> 4 if index % 2 else packed & 15) | fifth).to(I16, signed=False)

    scales, minima = _scales_of_k(code, block)
    return [Part(partial(numbers, index), scales, index, (minima, index)) for index in range(8)]


def _q6_k(code: Code, block: Value) -> list[Part]:
    def numbers(index: int) -> Value:
        half, quarter = index // 4, index % 4
        packed = code.load(block, vector(I8, 32), 64 * half + 32 * (quarter % 2))
        high = (code.load(block, vector(I8, 32), 128 + 32 * half) >> (2 * quarter)) & 3
        return (((packed >> 4 if quarter > 1 else packed & 15) | (high << 4)) - 32).to(I16)

    factor = _halves(code, block + 202).shuffle([3] * 16)  # at 208, the block's last two bytes
    scales = code.load(block, vector(I8, 16), 192).to(F32) * factor
    return [Part(partial(numbers, index), scales.shuffle([2 * index] * 8 + [2 * index + 1] * 8)) for index in range(8)]


BLOCK_FORMATS = {
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1, has_minima=True),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1, has_minima=True),
    "Q4_K": BlockFormat(256, 144, _q4_k, has_minima=True),
    "Q5_K": BlockFormat(256, 176, _q5_k, has_minima=True),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}
