"""Blocks of small numbers to floats, and floats to Q8_0: what every model passes through when it is loaded and read.

Compiled as the products are, and like them kept on the disk: numba, which does the rest of `blocks`, takes a third of a
second and 60 MB before its first loop.
"""

from functools import cache

import numpy as np

from mm_gpt.kernels.library import library
from mm_gpt.kernels.matmul import callable_at, round_bf16
from mm_gpt.kernels.processor import host_isa
from mm_gpt.kernels.simd import BF16, F32, I8, I32, Code, Module, Value, vector
from mm_gpt.kernels.unpack import BLOCK_FORMATS

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
def _function(name: str, num_args: int):  # type: ignore[no-untyped-def]
    return callable_at(library("expand", host_isa(), _write).address(name), num_args)


def _write(module: Module) -> None:
    for kind, form in BLOCK_FORMATS.items():
        for target, size in (("f32", 4), ("bf16", 2)):
            writing = module.function(f"{kind} to {target}", 3, exported=True)
            with writing as (code, (blocks, count, out)), code.loop(0, count) as i:
                for index, part in enumerate(form.unpack(code, blocks + i * form.block_bytes)):
                    for half in range(2):
                        values = part.values(half)
                        place = i * (form.block_values * size) + (32 * index + LANES * half) * size
                        if target == "bf16":  # one instruction where the processor has it, ten elsewhere
                            values = values.to(BF16) if module.isa.dot_bf16 else round_bf16(values)
                        code.store(values, out, place)
    writing = module.function("f32 to Q8_0", 4, exported=True)
    with writing as (code, (floats, count, scales, out)), code.loop(0, count) as i:
        _encode_block(code, floats + i * 128, scales + i * 4, out + i * 34 + 2)


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
