"""Attention of one new token of a row over its key-value blocks, as code for one configuration.

Shapes: C head size, g query heads that share a key-value head. Blocks: `kv_blocks.py`.
"""

import math
from dataclasses import dataclass

from llvmlite import ir

from mm_gpt.kernels.elementwise import FLOATS, LANES, exp, norm, softcap
from mm_gpt.kernels.kv_blocks import BLOCK, padded_head
from mm_gpt.kernels.matmul import round_bf16, widen_bf16
from mm_gpt.kernels.simd import F32, I16, I32, Code, Module, Value, vector

MAX_HEADS = 4
"""Query heads that go over a key together, at most."""
MAX_VECTORS = 4
"""Vectors of a value that are summed in one pass."""


@dataclass(frozen=True)
class PatternSpec:
    """`mm_gpt.model.attention.Pattern`, of one half of the heads."""

    kind: str
    window: int | None = None
    stride: int | None = None
    summary: int | None = None


@dataclass(frozen=True)
class HeadSpec:
    """What the heads of a decoder have in common."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    softcap: float | None
    qk_norm: bool
    norm_eps: float
    rotary: bool
    rotary_scaled: bool
    """xPos: keys have angles of their own."""
    kv_dtype: str
    """float32 or bfloat16."""

    @property
    def value_bytes(self) -> int:
        return 4 if self.kv_dtype == "float32" else 2

    @property
    def tiles(self) -> list[int]:
        """Numbers of heads that `attend` is written for, the largest first."""
        group = self.num_heads // self.num_kv_heads
        return sorted({size for size in (min(group, MAX_HEADS), 2, 1) if size <= group}, reverse=True)


def _load(code: Code, spec: HeadSpec, address: Value, index: Value) -> Value:
    """16 numbers of a block as float32."""
    if spec.kv_dtype == "float32":
        return code.load(address, FLOATS, index * 4)
    return widen_bf16(code.load(address, vector(I16, LANES), index * 2))


def _keep(code: Code, spec: HeadSpec, value: Value, address: Value, index: Value) -> None:
    code.store(value if spec.kv_dtype == "float32" else round_bf16(value), address, index * spec.value_bytes)


def write_keep(module: Module, spec: HeadSpec) -> ir.Function:
    """`keep(key, value, keys, values, slot)`: a new token's key and value, C floats each, into a head's block."""
    C, padded = spec.head_size, padded_head(spec.head_size)
    with module.function("keep", 5) as (code, (key, value, keys, values, slot)):
        with code.loop(0, C) as c:
            _keep(code, spec, code.load(key, F32, c * 4), keys, c * BLOCK + slot)
        for start in range(0, padded, LANES):
            numbers = code.load_first(value + start * 4, FLOATS, code.i64(C - start))
            _keep(code, spec, numbers, values, slot * padded + start)
    return module.ir.globals["keep"]


def write_turn(module: Module, spec: HeadSpec) -> ir.Function:
    """`turn(head, weight, angles, out)`: a head's C floats, normed if it is so, turned by its position.

    angles: C/2 cosines, then C/2 sines.
    """
    C = spec.head_size
    with module.function("turn", 4) as (code, (head, weight, angles, out)):
        source = head
        if spec.qk_norm:
            norm(code, "rms", spec.norm_eps, head, C, out, weight, weight)
            source = out
        if spec.rotary:
            half = C // 2
            lanes = math.gcd(half, LANES)
            kind = vector(F32, lanes) if lanes > 1 else F32
            with code.loop(0, half * 4, lanes * 4) as i:
                first, second = code.load(source, kind, i), code.load(source, kind, i + half * 4)
                cos, sin = code.load(angles, kind, i), code.load(angles, kind, i + half * 4)
                code.store(first * cos - second * sin, out, i)
                code.store(second * cos + first * sin, out, i + half * 4)
        elif not spec.qk_norm:
            with code.loop(0, C * 4, 4) as i:
                code.store(code.load(source, F32, i), out, i)
    return module.ir.globals["turn"]


def _seen(code: Code, pattern: PatternSpec, place: Value, keys: Value) -> Value:
    """Which of 16 keys the token at `place` looks at; the same as `mm_gpt.model.attention.visible`."""
    distance = place - keys
    causal = distance >= 0
    kind, stride, summary = pattern.kind, pattern.stride or 1, pattern.summary or 0
    if kind == "dense":
        return causal
    if kind == "local":
        assert pattern.window is not None
        return causal & (distance < pattern.window)
    band, column = distance < stride, (distance % stride).compare("==", 0)
    block = (place // stride).splat(LANES).compare("==", keys // stride)
    late = keys % stride >= stride - summary
    seen = {
        "strided": lambda: band | column,
        "strided_local": lambda: band,
        "strided_column": lambda: column,
        "fixed": lambda: block | late,
        "fixed_block": lambda: block,
        "fixed_summary": lambda: late | distance.compare("==", 0),
    }[kind]()
    return causal & seen


def _first_block(code: Code, pattern: PatternSpec, place: Value) -> Value:
    """The first block with a key that can be seen."""
    reach = pattern.window if pattern.kind == "local" else pattern.stride if pattern.kind == "strided_local" else None
    if pattern.kind == "fixed_block":
        assert pattern.stride is not None
        return place // pattern.stride * pattern.stride // BLOCK
    if reach is None:
        return code.i64(0)
    return (place >= reach).where(place - (reach - 1), 0) // BLOCK


def write_attend(module: Module, name: str, spec: HeadSpec, pattern: PatternSpec, heads: int) -> ir.Function:
    """`NAME(q, table, key_offset, value_offset, place, scores, out)`.

    q: `heads` x C floats, scaled. table: addresses of the row's blocks; the offsets lead to the layer and head in one.
    place: the query's index in its row. scores: room for `heads` x 16 floats a block. out: `heads` x C floats.
    """
    C, padded = spec.head_size, padded_head(spec.head_size)
    with module.function(name, 7, inline=False) as (code, (q, table, key_offset, value_offset, place, scores, out)):
        first = _first_block(code, pattern, place)
        end = place // BLOCK + 1
        stride = (end - first) * (BLOCK * 4)
        lines = [scores + stride * g for g in range(heads)]
        maxima = [code.variable(code.number(FLOATS, -math.inf)) for _ in range(heads)]
        place32 = place.to(I32)

        with code.loop(first, end) as block:
            keys = code.load_i64(table, block * 8) + key_offset
            unroll = 2 if C % 2 == 0 else 1
            sums = [[code.variable(code.number(FLOATS, 0.0)) for _ in range(unroll)] for _ in range(heads)]
            with code.loop(0, C, unroll) as c:
                for u in range(unroll):
                    key = _load(code, spec, keys, (c + u) * BLOCK)
                    for g in range(heads):
                        query = code.load(q, F32, (c + u) * 4 + g * C * 4)
                        sums[g][u].set(code.fma(key, query, sums[g][u].get()))
            seen = _seen(code, pattern, place32, (block * BLOCK).to(I32) + code.iota(I32, BLOCK))
            for g in range(heads):
                score = sums[g][0].get() if unroll == 1 else sums[g][0].get() + sums[g][1].get()
                if spec.softcap is not None:
                    score = softcap(code, spec.softcap, score)
                score = seen.where(score, -math.inf)
                code.store(score, lines[g], (block - first) * (BLOCK * 4))
                maxima[g].set((maxima[g].get() > score).where(maxima[g].get(), score))

        totals = [code.variable(code.number(FLOATS, 0.0)) for _ in range(heads)]
        largest = [code.max_lanes(line.get()) for line in maxima]
        with code.loop(0, stride, BLOCK * 4) as i:
            for g in range(heads):
                weight = exp(code, code.load(lines[g], FLOATS, i) - largest[g])
                code.store(weight, lines[g], i)
                totals[g].set(totals[g].get() + weight)
        inverses = [1.0 / code.sum_lanes(total.get()) for total in totals]

        for start in range(0, padded, LANES * MAX_VECTORS):
            starts = range(start, min(padded, start + LANES * MAX_VECTORS), LANES)
            results = [[code.variable(code.number(FLOATS, 0.0)) for _ in starts] for _ in range(heads)]
            with code.loop(first, end) as block:
                values = code.load_i64(table, block * 8) + value_offset
                left = place + 1 - block * BLOCK
                # No further than the last token: what lies behind may be anything, NaN too.
                with code.loop(0, (left < BLOCK).where(left, BLOCK)) as token:
                    weights = [code.load(line, F32, ((block - first) * BLOCK + token) * 4) for line in lines]
                    for v, column in enumerate(starts):
                        value = _load(code, spec, values, token * padded + column)
                        for g in range(heads):
                            results[g][v].set(code.fma(value, weights[g], results[g][v].get()))
            for g in range(heads):
                for v, column in enumerate(starts):
                    result = results[g][v].get() * inverses[g]
                    if column + LANES <= C:
                        code.store(result, out, (g * C + column) * 4)
                    else:
                        for lane in range(C - column):
                            code.store(result.lane(lane), out, (g * C + column + lane) * 4)
    return module.ir.globals[name]
