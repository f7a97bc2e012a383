"""Blocks of small numbers to floats, and floats to Q8_0: what every model passes through when it is loaded and read.

Compiled as the products are, and like them kept on the disk: numba, which does the rest of `blocks`, takes a third of a
second and 60 MB before its first loop.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from mm_gpt.kernels.library import library
from mm_gpt.kernels.matmul import callable_at, round_bf16
from mm_gpt.kernels.processor import host_isa
from mm_gpt.kernels.simd import F32, I8, I32, Code, Module, Value, vector
from mm_gpt.kernels.unpack import BLOCK_FORMATS, Part

LANES = 16
LIMIT = float(1 << 20)
"""Above all codes: what is not below is an overflow or no number, and becomes 0 as in the reference."""


def decode(name: str, blocks: np.ndarray, out: np.ndarray) -> None:
    """Blocks (n, bytes) into values (n, block): float32, or the bits of bfloat16 as uint16. Both contiguous."""
    assert blocks.flags.c_contiguous
    assert out.flags.c_contiguous
    target = "f32" if out.dtype == np.float32 else "bf16"
    _function(f"{name} to {target}", 3)(blocks.ctypes.data, len(blocks), out.ctypes.data)


def encode_q8_0(values: np.ndarray, out: np.ndarray) -> None:
    """Values (n, 32) in float32 into blocks (n, 34). Both contiguous."""
    assert values.flags.c_contiguous
    assert out.flags.c_contiguous
    scales = np.empty((len(values), 1), np.float32)
    _function("f32 to Q8_0", 4)(values.ctypes.data, len(values), scales.ctypes.data, out.ctypes.data)
    with np.errstate(over="ignore"):
        out[:, :2] = scales.astype(np.float16).view(np.uint8)


@cache
def _function(name: str, num_args: int) -> Callable[..., None]:
    return callable_at(library("expand", host_isa(), _write).address(name), num_args)


def _write(module: Module) -> None:
    for kind in BLOCK_FORMATS:
        _write_expand(module, kind, "f32", 4)
        _write_expand(module, kind, "bf16", 2)
    function = module.function("f32 to Q8_0", 4, exported=True)
    with function as (code, (floats, count, scales, out)), code.loop(0, count) as i:
        _encode_block(code, floats + i * 128, scales + i * 4, out + i * 34 + 2)


def _write_expand(module: Module, kind: str, target: str, size: int) -> None:
    """`size`: bytes of a value."""
    form = BLOCK_FORMATS[kind]
    function = module.function(f"{kind} to {target}", 3, exported=True)
    with function as (code, (blocks, count, out)), code.loop(0, count) as i:
        for index, part in enumerate(form.unpack(code, blocks + i * form.block_bytes)):
            numbers = part.numbers()
            for half in range(2):
                values = _values(numbers, part, half)
                place = i * (form.block_values * size) + (32 * index + LANES * half) * size
                code.store(values if target == "f32" else round_bf16(values), out, place)


def _values(numbers: Value, part: Part, half: int) -> Value:
    """<16 x float>, one half of a part's numbers."""
    if part.lane is None:
        scale = part.scale.shuffle([8 * half + lane // 2 for lane in range(LANES)])
    else:
        scale = part.scale.shuffle([part.lane] * LANES)
    values = numbers.part(LANES * half, LANES).to(F32) * scale
    if part.minimum is None:
        return values
    minimums, place = part.minimum
    return values + minimums.shuffle([place] * LANES)


def _encode_block(code: Code, floats: Value, scale: Value, codes: Value) -> None:
    """The largest magnitude becomes 127; what lies in the middle goes away from zero."""
    halves = [code.load(floats, vector(F32, LANES), 64 * half) for half in range(2)]
    sizes = [code.intrinsic("fabs", values) for values in halves]
    d = code.max_lanes(code.intrinsic("maximum", *sizes)) / 127.0
    code.store(d, scale)
    inverse = (d > 0.0).where(code.number(F32, 1.0) / d, 0.0)
    for half, values in enumerate(halves):
        scaled = values * inverse
        size = code.intrinsic("fabs", scaled)
        whole = code.intrinsic("floor", size)
        whole = whole + code.intrinsic("floor", (size - whole) * 2.0)
        numbers = (whole < LIMIT).where(whole, 0.0).to(I32)
        code.store((scaled < 0.0).where(numbers * -1, numbers).to(I8), codes, LANES * half)
