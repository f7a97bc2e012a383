"""The inner loop of a matrix product on AVX-512: a tile of 6 rows by 64 columns stays in registers.

Written as LLVM vector IR, since no loop of Python or numba becomes these instructions. Both operands come in groups of
4 bytes along the inner dimension K: 4 values of 8 bits, multiplied by `vpdpbusd` (unsigned by signed, summed exactly in
int32), or 2 of bfloat16, by `vdpbf16ps` (summed in float32). Weights are packed as the loop reads them: panels of 64
columns, in a panel group after group, in a group the 4 bytes of each column.

The order of the sums of one output depends on nothing but K: its bits do not depend on the rows beside it.
"""

import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import extending, njit, types

TILE_ROWS, TILE_COLUMNS = 6, 64
"""24 accumulators, 4 vectors of weights and one of values: 29 of the 32 registers."""
GROUP = 4
"""Bytes along K that one lane of an instruction takes."""
_LANES = 16
_VECTORS = TILE_COLUMNS // _LANES
_EXP2 = (0.99992806, 0.69326097, 0.24261113, 0.05517166)
"""2^x for -0.5 <= x <= 0.5 as a polynomial, fitted for the least relative error."""
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_INTS = ir.VectorType(_I32, _LANES)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)


class _BFloats(ir.Type):
    """A vector of bfloat16: llvmlite has no type for it."""

    def __init__(self, count: int):
        self.count = count

    def _to_string(self) -> str:
        return f"<{self.count} x bfloat>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloats) and other.count == self.count

    def __hash__(self) -> int:
        return hash((_BFloats, self.count))


@cache
def missing() -> str | None:
    """What the processor lacks for these kernels, in a few words; None: nothing."""
    features = llvmlite.binding.get_host_cpu_features()
    absent = [name for name in ("avx512f", "avx512bw", "avx512vnni", "avx512bf16") if not features.get(name)]
    return f"the processor has no {absent[0]}" if absent else None


intrinsic: Any = extending.intrinsic  # its types are those of the function that emits, not of the one that is called
_VERSION = f"{zlib.crc32(Path(__file__).read_bytes()):x}"
_FAST = {"reassoc", "contract", "nsz", "arcp"}  # not nnan: a NaN must come out as one


def jit(*, fast: bool = False, inner: bool = False) -> Callable[[Any], Any]:
    """Compiled when it is first called, without the interpreter's lock, and kept on disk.

    `fast`: sums may be taken in the order that is fastest, the same each time. `inner`: only compiled code calls it.
    """

    def decorate(function: Any) -> Any:
        function.__qualname__ += f"_{_VERSION}"  # numba keeps it until its own file changes, but this one is part of it
        options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "no_cfunc_wrapper": True}
        options |= {"fastmath": _FAST if fast else False, "no_cpython_wrapper": inner}
        return njit(**options)(function)

    return decorate


@intrinsic
def address(_context: Any, array: Any) -> Any:
    """Where an array's data begins, as a signed integer: numba turns sums of signed and unsigned ones into floats."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(view.data, _I64)

    return types.int64(array), emit


@intrinsic
def float_of_bits(_context: Any, _bits: Any) -> Any:
    """The float32 with these bits."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), emit


@intrinsic
def bits_of_float(_context: Any, _value: Any) -> Any:
    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), emit


def _tile(name: str, operand: ir.Type, total: ir.Type) -> Callable[..., None]:
    """tile(rows, stride, panel, groups, row_scale, zero, scale, sums, bias, out, out_stride), pointers as integers.

    `rows` and `out` are 6 rows of bytes and of floats, `stride` and `out_stride` bytes apart. `panel` lies on a
    multiple of 64 bytes, and `groups` is at least 1. out = (total - zero sums) row_scale scale + bias in int8, and
    total + bias in bfloat16. `row_scale` and `zero` hold one value a row, the others one a column.
    """

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        rows, stride, panel, groups, row_scale, zero, scale, sums, bias, out, out_stride = arguments
        places = [builder.add(rows, builder.mul(stride, _I64(row))) for row in range(TILE_ROWS)]
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        group = builder.phi(_I64)
        group.add_incoming(_I64(0), before)
        old = [[builder.phi(total) for _ in range(_VECTORS)] for _ in range(TILE_ROWS)]
        start = builder.add(panel, builder.mul(group, _I64(GROUP * TILE_COLUMNS)))
        offset = builder.mul(group, _I64(GROUP))
        weights = [_load(builder, start, operand, i, align=64) for i in range(_VECTORS)]
        new = []
        for row, place in enumerate(places):
            lanes = builder.bitcast(_spread(builder, _load(builder, builder.add(place, offset), _I32)), operand)
            new.append([_call(builder, name, total, old[row][i], lanes, weights[i]) for i in range(_VECTORS)])
            for i in range(_VECTORS):
                old[row][i].add_incoming(total(None), before)
                old[row][i].add_incoming(new[row][i], loop)
        following = builder.add(group, _I64(1))
        group.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, groups), loop, after)
        builder.position_at_end(after)
        biases = [_load(builder, bias, _FLOATS, i) for i in range(_VECTORS)]
        if total == _INTS:
            scales = [_load(builder, scale, _FLOATS, i) for i in range(_VECTORS)]
            corrections = [_load(builder, sums, _INTS, i) for i in range(_VECTORS)]
        for row in range(TILE_ROWS):
            if total == _INTS:
                factor = _spread(builder, _load(builder, row_scale, ir.FloatType(), row))
                point = _spread(builder, _load(builder, zero, _I32, row))
            for i, value in enumerate(new[row]):
                if total == _INTS:
                    exact = builder.sub(value, builder.mul(point, corrections[i]))
                    value = builder.fmul(builder.sitofp(exact, _FLOATS), builder.fmul(factor, scales[i]))
                value = builder.fadd(value, biases[i])
                place = builder.add(out, builder.add(builder.mul(out_stride, _I64(row)), _I64(64 * i)))
                builder.store(value, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(_c: Any, rows, stride, panel, groups, row_scale, zero, scale, sums, bias, out, out_stride) -> Any:  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 11), emit

    return tile


def _load(builder: ir.IRBuilder, place: ir.Value, kind: ir.Type, index: int = 0, align: int = 1) -> ir.Value:
    """The `index`-th value of this kind, of 4 bytes or of 64, from a place on."""
    size = 4 if kind in (_I32, ir.FloatType()) else 64
    place = builder.add(place, _I64(size * index)) if index else place
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=align)


def _spread(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """In all lanes of a vector."""
    vector = ir.VectorType(value.type, _LANES)
    first = builder.insert_element(vector(ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(first, vector(ir.Undefined), _INTS([0] * _LANES))


int8_tile = _tile("llvm.x86.avx512.vpdpbusd.512", _INTS, _INTS)
bf16_tile = _tile("llvm.x86.avx512bf16.dpbf16ps.512", _BFloats(32), _FLOATS)


@intrinsic
def softmax_row(_context: Any, scores: Any, count: Any, factor: Any, weights: Any) -> Any:
    """softmax_row(scores, count, factor, weights): exp(factor (score - largest)) as bfloat16, and their sum in float32.

    `scores` and `weights` are pointers to `count` values, a multiple of 16; `factor` is times log2(e).
    """

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        scores, count, factor, weights = arguments
        factors = _spread(builder, factor)

        def larger(offset: ir.Value, best: ir.Value) -> ir.Value:
            score = _load(builder, builder.add(scores, builder.mul(offset, _I64(4))), _FLOATS)
            return builder.select(builder.fcmp_ordered(">", score, best), score, best)

        best = _for_each_vector(builder, count, _FLOATS([-3e38] * _LANES), larger)
        highest = _call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), best)
        shift = _spread(builder, builder.fneg(builder.fmul(highest, factor)))

        def weigh(offset: ir.Value, total: ir.Value) -> ir.Value:
            score = _load(builder, builder.add(scores, builder.mul(offset, _I64(4))), _FLOATS)
            weight = _exp2(builder, _fma(builder, score, factors, shift))
            halves = _call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _BFloats(16), weight)
            place = builder.add(weights, builder.mul(offset, _I64(2)))
            builder.store(halves, builder.inttoptr(place, _BFloats(16).as_pointer()), align=2)
            return builder.fadd(total, weight)

        total = _for_each_vector(builder, count, _FLOATS(None), weigh)
        zero = ir.Constant(ir.FloatType(), 0.0)
        return _call(builder, "llvm.vector.reduce.fadd.v16f32", ir.FloatType(), zero, total, fastmath=("reassoc",))

    return types.float32(types.int64, types.int64, types.float32, types.int64), emit


def _for_each_vector(
    builder: ir.IRBuilder, count: ir.Value, start: ir.Value, step: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """A loop over 0, 16, ... below `count`: `step` makes the next value from the index and the last value."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    index, last = builder.phi(_I64), builder.phi(start.type)
    following, value = builder.add(index, _I64(_LANES)), step(index, last)
    for phi, first, later in ((index, _I64(0), following), (last, start, value)):
        phi.add_incoming(first, before)
        phi.add_incoming(later, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return value


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x of 16 floats, to 1e-4 of itself: far below what bfloat16 keeps."""
    whole = _call(builder, "llvm.roundeven.v16f32", _FLOATS, x)
    rest, power = builder.fsub(x, whole), _FLOATS([_EXP2[-1]] * _LANES)
    for factor in reversed(_EXP2[:-1]):
        power = _fma(builder, power, rest, _FLOATS([factor] * _LANES))
    every, nearest = ir.IntType(16)(-1), _I32(4)
    scale = "llvm.x86.avx512.mask.scalef.ps.512"  # times 2^whole; what is too small becomes zero
    return _call(builder, scale, _FLOATS, power, whole, _FLOATS(None), every, nearest)


def _fma(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(builder, "llvm.fma.v16f32", _FLOATS, x, y, z)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value, **options: Any) -> ir.Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments, **options)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that begins on a cache line, as vectors are read fastest."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def run(job: Callable[[Any], None], items: Iterable[Any], threads: int) -> None:
    """`job(item)` for every item, by `threads` threads, the caller's among them, each taking the next when it is free.

    `job` calls what gives up the interpreter's lock. Raises what a job raised, after all have ended.
    """
    waiting = iter(list(items))  # a list's: the next item of it can be taken by any thread

    def work() -> None:
        for item in waiting:
            job(item)

    others = [_pool(threads, os.getpid()).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not live on in a fork of it."""
    return ThreadPoolExecutor(threads, "mm-gpt-tiles")
