"""A few rows of activations times a matrix, as it is stored: floats, or the blocks of GGUF files.

Each number of the result is a dot product over K in an order that depends on K alone: a row's bits are the same alone
and among others, and whoever of the team computes it. Weights are read and unpacked once for several rows.

Float weights: float32 activations; for BF16 weights activations are rounded to bfloat16, as the processor's bfloat16
dot product wants them. Blocks: activations become int16 in blocks of 32 with a scale each, and the products of a block
are summed as integers, exactly, whatever the instruction set; one block's sum is at most 32 · 128 · 32767 < 2^31.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from mm_gpt.kernels.library import library
from mm_gpt.kernels.processor import ISA
from mm_gpt.kernels.simd import BF16, F16, F32, I16, I32, Code, Module, Value, lanes_of, vector
from mm_gpt.kernels.unpack import BLOCK_FORMATS, MINIMUM, BlockFormat

BLOCK = 32
"""Values of activations under one scale."""
LANES = 16
TILE = 4
"""Rows of weights and of activations that one pass over K works on, where there are several of both."""
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
KINDS = (*FLOAT_BYTES, *BLOCK_FORMATS)
Prepared = str
"""How activations are stored for a kind of weights: f32, bf16 or i16."""


def prepared_for(kind: str) -> Prepared:
    return {"F32": "f32", "F16": "f32", "BF16": "bf16"}.get(kind, "i16")


def row_bytes(kind: str, columns: int) -> int:
    if kind in FLOAT_BYTES:
        return FLOAT_BYTES[kind] * columns
    form = BLOCK_FORMATS[kind]
    return columns // form.block_values * form.block_bytes


def prepared_bytes(columns: int) -> int:
    """Room for a row of activations in any form, whole cache lines."""
    return (columns + 63) // 64 * 64 * 4


# ---- activations ----


def write_prepare(module: Module, form: Prepared, *, exported: bool = False) -> ir.Function:
    """`prepare_FORM(x, columns, out)`: one row of float32 into the form that kernels read."""
    with module.function(f"prepare_{form}", 3, exported=exported) as (code, (x, columns, out)):
        if form == "i16":
            _quantise(code, x, columns, out)
        else:
            lanes = 16 if form == "f32" else 32
            with code.loop(0, columns, lanes) as i:
                values = code.load_first(x + i * 4, vector(F32, lanes), columns - i)
                if form == "f32":
                    code.store(values, out, i * 4)
                else:
                    code.store(round_bf16(values), out, i * 2)
    return module.ir.globals[f"prepare_{form}"]


def round_bf16(values: Value) -> Value:
    """float -> the bits of bfloat16 as i16, to the nearest, ties to even; NaN stays NaN."""
    bits = values.bits(I32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = values.compare("ord", values)
    return is_nan.where(rounded, (bits >> 16) | 0x40).to(I16)


def widen_bf16(bits: Value) -> Value:
    """The bits of bfloat16, as i16 -> float."""
    return (bits.to(I32, signed=False) << 16).bits(F32)


def _quantise(code: Code, x: Value, columns: Value, out: Value) -> None:
    """x -> int16 numbers, then for each block of 32 its scale, then for each the sum of scale · numbers."""
    scales = out + columns * 2
    offsets = scales + columns // 8
    with code.loop(0, columns // BLOCK) as block:
        values = [code.load(x, vector(F32, 16), block * 128 + half * 64) for half in range(2)]
        sizes = [code.intrinsic("fabs", part) for part in values]
        largest = code.max_lanes(code.intrinsic("maximum", *sizes))
        inverse = (largest > 1e-30).where(code.number(F32, 32767.0) / largest, 0.0)
        numbers = [code.intrinsic("roundeven", part * inverse).to(I32) for part in values]
        code.store(numbers[0].to(I16), out, block * 64)
        code.store(numbers[1].to(I16), out, block * 64 + 32)
        scale = largest * (1 / 32767)
        code.store(scale, scales, block * 4)
        code.store(scale * code.sum_lanes(numbers[0] + numbers[1]).to(F32), offsets, block * 4)


# ---- products ----


def _multiply_pairs(code: Code, a: Value, b: Value) -> Value:
    """<32 x i16> · <32 x i16> -> <16 x i32>, the sums of two products next to each other."""
    if code.module.isa.madd_bits == 512:
        return code.intrinsic("x86.avx512.pmaddw.d.512", a, b, result=vector(I32, 16), typed=False)
    if code.module.isa.madd_bits == 256:
        low, high = (
            code.intrinsic(
                "x86.avx2.pmadd.wd",
                a.shuffle(range(start, start + 16)),
                b.shuffle(range(start, start + 16)),
                result=vector(I32, 8),
                typed=False,
            )
            for start in (0, 16)
        )
        return low.shuffle(range(16), high)
    even, odd = (a.shuffle(range(start, 32, 2)).to(I32) * b.shuffle(range(start, 32, 2)).to(I32) for start in (0, 1))
    return even + odd


@dataclass(frozen=True)
class _Tile:
    """Addresses of rows of weights and of activations that are multiplied with each other."""

    weights: list[Value]
    rows: list[Value]
    columns: Value
    ahead: Value | None
    """Where the next tile's weights begin, to be fetched meanwhile."""

    def fetch(self, code: Code, offset: Value, size: int) -> None:
        """The bytes of the next tile that are to this one's as `offset`, of each row, and the `size` behind."""
        if self.ahead is not None:
            for line in range(0, size * len(self.weights), 64):
                code.prefetch(self.ahead + offset * len(self.weights) + line)


def _block_tile(code: Code, form: BlockFormat, tile: _Tile) -> Value:
    """The dot product of each row of activations with each of weights, row by row, as lanes of one vector."""
    weights, rows, columns = tile.weights, tile.rows, tile.columns
    sums = [[code.variable(code.number(vector(F32, LANES), 0.0)) for _ in weights] for _ in rows]
    scales = [row + columns * 2 for row in rows]
    offsets = [scale + columns // 8 for scale in scales]
    per_block = form.block_values // BLOCK
    count = len(weights) * len(rows)
    # Alone, the vector that a minimum comes in is summed as it is: taking a lane out costs more than all the others.
    alone = count == 1 and per_block == 1
    minima = code.variable(code.number(vector(F32, 4) if alone else lanes_of(F32, count), 0.0))

    with code.loop(0, columns // form.block_values) as block:
        tile.fetch(code, block * form.block_bytes, form.block_bytes)
        unpacked = [form.unpack(code, weight + block * form.block_bytes) for weight in weights]
        for index in range(per_block):
            place = block * per_block + index
            parts = [each[index] for each in unpacked]
            row_scales = [code.load(scale, F32, place * 4) for scale in scales]
            numbers = [part.numbers() for part in parts]
            for r, row in enumerate(rows):
                values = code.load(row, vector(I16, 32), place * 64)
                for n, part in enumerate(parts):
                    dots = _multiply_pairs(code, numbers[n], values).to(F32)
                    scale = part.scale * row_scales[r]
                    if part.lane is not None:
                        scale = scale.shuffle([part.lane] * LANES)
                    sums[r][n].set(code.fma(dots, scale, sums[r][n].get()))
            found = [part.minimum for part in parts if part.minimum is not None]
            row_offsets = [code.load(offset, F32, place * 4) for offset in offsets]
            if found and alone:
                minima.set(code.fma(found[0][0], row_offsets[0], minima.get()))
            elif found:
                minimum = code.vector_of([values.lane(lane) for values, lane in found])
                minimum = minimum.part_of(list(range(len(weights))) * len(rows))
                offset = code.vector_of(row_offsets).part_of([r for r in range(len(rows)) for _ in weights])
                minima.set(code.fma(minimum, offset, minima.get()))
    totals = code.sum_lanes_of([total.get() for line in sums for total in line])
    if not form.has_minima:
        return totals
    return totals + (minima.get().lane(MINIMUM) if alone else minima.get())


def _float_product(code: Code, kind: str, weight: Value, row: Value, total: Value) -> Value:
    if kind == "F32":
        return code.fma(weight, row, total)
    if kind == "F16":
        return code.fma(weight.to(F32), row, total)
    if code.module.isa.dot_bf16:
        return code.intrinsic(
            "x86.avx512bf16.dpbf16ps.512", total, weight.bits(BF16), row.bits(BF16), result=total.type, typed=False
        )
    low_weight, low_row = (pair.bits(I32) << 16 for pair in (weight, row))
    high_weight, high_row = (pair.bits(I32) & 0xFFFF0000 for pair in (weight, row))
    total = code.fma(high_weight.bits(F32), high_row.bits(F32), total)
    return code.fma(low_weight.bits(F32), low_row.bits(F32), total)


def _float_tile(code: Code, kind: str, tile: _Tile) -> list[Value]:
    """Vectors whose lanes sum to the dot products, in the same order."""
    weights, rows, columns = tile.weights, tile.rows, tile.columns
    lanes = 32 if kind == "BF16" else 16
    stored = vector({"F32": F32, "F16": F16, "BF16": I16}[kind], lanes)
    size, row_size = FLOAT_BYTES[kind], 2 if kind == "BF16" else 4
    zeros = code.number(vector(F32, 16), 0.0)
    sums = [[code.variable(zeros) for _ in weights] for _ in rows]

    def step(i: Value, count: Value | None = None) -> None:
        """Adds `lanes` products from i on, or only `count`; activations end in zeros."""
        places = [weight + i * size for weight in weights]
        loaded = [
            code.load(place, stored) if count is None else code.load_first(place, stored, count) for place in places
        ]
        for r, row in enumerate(rows):
            values = code.load(row, vector(I16 if kind == "BF16" else F32, lanes), i * row_size)
            for n, weight in enumerate(loaded):
                sums[r][n].set(_float_product(code, kind, weight, values, sums[r][n].get()))

    whole = columns // lanes * lanes
    with code.loop(0, whole, lanes) as i:
        tile.fetch(code, i * size, lanes * size)
        step(i)
    with code.when(whole < columns):
        step(whole, columns - whole)
    return [total.get() for line in sums for total in line]


def write_matmul(module: Module, kind: str) -> None:
    """`matmul(weights, row_bytes, columns, start, end, rows, rows_stride, num_rows, out, out_stride, bias)`.

    out[r, n] = weights[n] · rows[r] + bias[n] for n in [start, end); strides in bytes; bias may be 0, none.

    A single row of activations takes the weights one row after the other: the processor fetches one stream ahead of
    its reader at twice the speed of several that are read in turns. With more rows, tiles of weights are asked for in
    that order while the tile before is worked on.
    """
    with module.function("matmul", 11, exported=True) as (code, args):
        weights, stride, columns, start, end, rows, rows_stride, num_rows, out, out_stride, bias = args

        def tile(n: Value, num_weights: int, r: Value, size: int) -> None:
            addresses = _Tile(
                [weights + (n + i) * stride for i in range(num_weights)],
                [rows + (r + i) * rows_stride for i in range(size)],
                columns,
                weights + (n + num_weights) * stride if num_weights > 1 else None,
            )
            if kind in FLOAT_BYTES:
                results = code.sum_lanes_of(_float_tile(code, kind, addresses))
            else:
                results = _block_tile(code, BLOCK_FORMATS[kind], addresses)
            extra = code.variable(code.number(lanes_of(F32, num_weights), 0.0))
            with code.when(bias > 0):
                extra.set(code.load(bias, extra.get().type, n * 4))
            for j in range(size):
                line = results if size == 1 else results.part(j * num_weights, num_weights)
                code.store(line + extra.get(), out + (r + j) * out_stride, n * 4)

        def all_rows(n: Value, num_weights: int) -> None:
            done = code.i64(0)
            for size in (TILE, TILE // 2, 1) if num_weights > 1 else (1,):
                upto = num_rows // size * size
                with code.loop(done, upto, size) as r:
                    tile(n, num_weights, r, size)
                done = upto

        tiled = (num_rows > 1).where(start + (end - start) // TILE * TILE, start)
        with code.loop(start, tiled, TILE) as n:
            all_rows(n, TILE)
        with code.loop(tiled, end) as n:
            all_rows(n, 1)


def write_expand(module: Module, kind: str) -> None:
    """`expand(row, columns, out)`: one row of weights as float32, up to a whole vector."""
    with module.function("expand", 3, exported=True) as (code, (row, columns, out)):
        if kind in FLOAT_BYTES:
            stored = vector({"F32": F32, "F16": F16, "BF16": I16}[kind], LANES)
            with code.loop(0, columns, LANES) as i:
                values = code.load_first(row + i * FLOAT_BYTES[kind], stored, columns - i)
                values = widen_bf16(values) if kind == "BF16" else values.to(F32) if kind == "F16" else values
                code.store(values, out, i * 4)
        else:
            form = BLOCK_FORMATS[kind]
            with code.loop(0, columns // form.block_values) as block:
                for index, part in enumerate(form.unpack(code, row + block * form.block_bytes)):
                    lanes = [i // 2 if part.lane is None else part.lane for i in range(BLOCK)]
                    values = part.numbers().to(F32) * part.scale.shuffle(lanes)
                    if part.minimum is not None:
                        values = values + part.minimum[0].shuffle([part.minimum[1]] * BLOCK)
                    code.store(values, out, (block * form.block_values + index * BLOCK) * 4)


@dataclass(frozen=True)
class Kernels:
    """Addresses of the functions for one kind of weights."""

    matmul: int
    prepare: int
    expand: int


@cache
def kernels(kind: str, level: ISA) -> Kernels:
    def write(module: Module) -> None:
        write_prepare(module, prepared_for(kind), exported=True)
        write_matmul(module, kind)
        write_expand(module, kind)

    made = library(f"matmul {kind}", level, write)
    return Kernels(made.address("matmul"), made.address(f"prepare_{prepared_for(kind)}"), made.address("expand"))


def callable_at(address: int, num_args: int) -> Callable[..., None]:
    """A compiled function of i64 arguments; the GIL is released while it runs."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * num_args)(address)
