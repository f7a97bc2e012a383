"""What a training step does between its matrix products, forward and backward, each in one pass over its rows.

Activations are bfloat16 or float32, all sums and functions float32. Residuals, norm weights, rotations and what is
kept of a softmax are float32. Shapes: M tokens, D width, F inner width, H query and K key-value heads, G = H / K, C
head size, V vocabulary, B rows, T tokens of a row. Sizes are part of the code; all but V are multiples of 16, C of 32.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

from mm_gpt.kernels.elementwise import FLOATS, LANES, exp, sigmoid
from mm_gpt.kernels.matmul import round_bf16, widen_bf16
from mm_gpt.kernels.parallel import Body, Kernel
from mm_gpt.kernels.simd import BF16, F32, I8, I16, I32, Code, Value, vector

Kind = Literal["bf16", "f32"]
HIDDEN = -1e30
"""A score that nobody looks at."""


def _size(kind: Kind) -> int:
    return 2 if kind == "bf16" else 4


def _read(code: Code, kind: Kind, row: Value, i: "int | Value") -> Value:
    """16 numbers of a row, from the i-th on."""
    if kind == "f32":
        return code.load(row, FLOATS, code.i64(i) * 4)
    return widen_bf16(code.load(row, vector(I16, LANES), code.i64(i) * 2))


def _write(code: Code, kind: Kind, value: Value, row: Value, i: "int | Value") -> None:
    if kind == "f32":
        code.store(value, row, code.i64(i) * 4)
        return
    rounded = value.to(BF16).bits(I16) if code.module.isa.dot_bf16 else round_bf16(value)
    code.store(rounded, row, code.i64(i) * 2)


def _float(code: Code, address: Value, i: Value) -> Value:
    return code.load(address, F32, i * 4)


def norm_forward(kind: Kind, width: int, eps: float, *, adds: bool) -> Body:
    """y = x / rms(x) · weight, and 1 / rms(x); with `adds` first x += h, written to `out`.

    x f32 (M, D), h (M, D), weight f32 (D,), out f32 (M, D), y (M, D), inverse f32 (M,).
    """

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        x, h, weight, out, y, inverse = args
        with code.loop(start, end) as m:
            row, half = m * (4 * width), m * (_size(kind) * width)
            squares = code.variable(code.number(FLOATS, 0.0))
            with code.loop(0, width, LANES) as i:
                values = _read(code, "f32", x + row, i)
                if adds:
                    values = values + _read(code, kind, h + half, i)
                    _write(code, "f32", values, out + row, i)
                squares.set(code.fma(values, values, squares.get()))
            scale = 1.0 / code.intrinsic("sqrt", code.sum_lanes(squares.get()) * (1 / width) + eps)
            code.store(scale, inverse, m * 4)
            with code.loop(0, width, LANES) as i:
                values = _read(code, "f32", (out if adds else x) + row, i)
                _write(code, kind, values * scale * _read(code, "f32", weight, i), y + half, i)

    return body


def norm_backward(kind: Kind, width: int) -> Body:
    """Through the norm and the residual beside it: the gradient of x, and again y, which was not kept.

    dy (M, D), gradient f32 (M, D) of x by the residual, x f32 (M, D), inverse f32 (M,), weight f32 (D,) to
    out f32 (M, D), the same as `rounded` (M, D), y (M, D), and a sum for each piece, f32 (pieces, D), of weight's.
    """

    def body(code: Code, piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        dy, gradient, x, inverse, weight, out, rounded, y, sums = args
        own = sums + piece * (4 * width)
        with code.loop(start, end) as m:
            row, half = m * (4 * width), m * (_size(kind) * width)
            scale = _float(code, inverse, m)
            dots = code.variable(code.number(FLOATS, 0.0))
            with code.loop(0, width, LANES) as i:
                slope, values = _read(code, kind, dy + half, i), _read(code, "f32", x + row, i) * scale
                w = _read(code, "f32", weight, i)
                dots.set(code.fma(slope * w, values, dots.get()))
                _write(code, kind, values * w, y + half, i)
                _write(code, "f32", code.fma(slope, values, _read(code, "f32", own, i)), own, i)
            mean = code.sum_lanes(dots.get()) * (1 / width)
            with code.loop(0, width, LANES) as i:
                slope, values = _read(code, kind, dy + half, i), _read(code, "f32", x + row, i) * scale
                w = _read(code, "f32", weight, i)
                total = code.fma(slope * w - values * mean, scale, _read(code, "f32", gradient + row, i))
                _write(code, "f32", total, out + row, i)
                _write(code, kind, total, rounded + half, i)

    return body


def add(kind: Kind, width: int) -> Body:
    """out = x + h, f32 (M, D), f32 and (M, D)."""

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        x, h, out = args
        with code.loop(start, end) as m:
            row, half = m * (4 * width), m * (_size(kind) * width)
            with code.loop(0, width, LANES) as i:
                _write(code, "f32", _read(code, "f32", x + row, i) + _read(code, kind, h + half, i), out + row, i)

    return body


def swiglu_forward(kind: Kind, inner: int) -> Body:
    """out = silu(gate) · up: (M, 2 F), gates first, to (M, F)."""

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        gate_up, out = args
        with code.loop(start, end) as m:
            gate = gate_up + m * (2 * _size(kind) * inner)
            up, to = gate + _size(kind) * inner, out + m * (_size(kind) * inner)
            with code.loop(0, inner, LANES) as i:
                x = _read(code, kind, gate, i)
                _write(code, kind, x * sigmoid(code, x) * _read(code, kind, up, i), to, i)

    return body


def swiglu_backward(kind: Kind, inner: int) -> Body:
    """gate_up (M, 2 F) and the gradient of what comes out (M, F): the gradient of gate_up, and what came out, again."""

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        gate_up, slope, out, gradient = args
        size = _size(kind)
        with code.loop(start, end) as m:
            gate, to = gate_up + m * (2 * size * inner), gradient + m * (2 * size * inner)
            row = m * (size * inner)
            with code.loop(0, inner, LANES) as i:
                x, up, dy = (_read(code, kind, place, i) for place in (gate, gate + size * inner, slope + row))
                s = sigmoid(code, x)
                active = x * s
                _write(code, kind, active * up, out + row, i)
                _write(code, kind, dy * active, to + size * inner, i)
                _write(code, kind, dy * up * code.fma(active, 1.0 - s, s), to, i)

    return body


def rope_forward(kind: Kind, tokens: int, heads: int, kv_heads: int, size: int, scale: float) -> Body:
    """Queries, keys and values out of one matrix, turned, queries times `scale`.

    qkv (M, (H + 2 K) C), cos and sin f32 (M, C) to q (B, K, T, G, C), k and v (B, K, T, C).
    """
    group, half = heads // kv_heads, size // 2

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        qkv, cos, sin, q, k, v = args
        with code.loop(start, end) as m:
            b, t = m // tokens, m % tokens
            row, angle = qkv + m * (_size(kind) * (heads + 2 * kv_heads) * size), m * (4 * size)
            for head in range(heads + 2 * kv_heads):
                to = _head_place(kind, head, b, t, (q, k, v), tokens, heads, kv_heads, size)
                for i in range(0, half, LANES):
                    first, second = (_read(code, kind, row, head * size + i + at) for at in (0, half))
                    if head < heads + kv_heads:
                        c, s = (_read(code, "f32", table + angle, i) for table in (cos, sin))
                        first, second = first * c - second * s, code.fma(second, c, first * s)
                    if head < heads:
                        first, second = first * scale, second * scale
                    _write(code, kind, first, to, i)
                    _write(code, kind, second, to, i + half)

    assert group * kv_heads == heads
    return body


def rope_backward(kind: Kind, tokens: int, heads: int, kv_heads: int, size: int, scale: float) -> Body:
    """The gradient of qkv from those of q, k and v: turned back."""
    half = size // 2

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        q, k, v, cos, sin, gradient = args
        with code.loop(start, end) as m:
            b, t = m // tokens, m % tokens
            row, angle = gradient + m * (_size(kind) * (heads + 2 * kv_heads) * size), m * (4 * size)
            for head in range(heads + 2 * kv_heads):
                place = _head_place(kind, head, b, t, (q, k, v), tokens, heads, kv_heads, size)
                for i in range(0, half, LANES):
                    first, second = _read(code, kind, place, i), _read(code, kind, place, i + half)
                    if head < heads:
                        first, second = first * scale, second * scale
                    if head < heads + kv_heads:
                        c, s = (_read(code, "f32", table + angle, i) for table in (cos, sin))
                        first, second = code.fma(first, c, second * s), second * c - first * s
                    _write(code, kind, first, row, head * size + i)
                    _write(code, kind, second, row, head * size + i + half)

    return body


def _head_place(
    kind: Kind, head: int, b: Value, t: Value, places: tuple[Value, Value, Value], T: int, H: int, K: int, size: int
) -> Value:
    """Where a head of a token lies in q (B, K, T, G, C), k or v (B, K, T, C)."""
    q, k, v = places
    G = H // K
    if head < H:
        return q + (((b * K + head // G) * T + t) * G + head % G) * (_size(kind) * size)
    first, base = (H, k) if head < H + K else (H + K, v)
    return base + ((b * K + (head - first)) * T + t) * (_size(kind) * size)


def merge_heads(kind: Kind, tokens: int, heads: int, kv_heads: int, size: int) -> Body:
    """y (B, K, T, G, C) to (M, H C)."""

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        y, out = args
        with code.loop(start, end) as m:
            b, t = m // tokens, m % tokens
            for head in range(heads):
                place = _head_place(kind, head, b, t, (y, y, y), tokens, heads, kv_heads, size)
                to = out + (m * heads + head) * (_size(kind) * size)
                for i in range(0, size, LANES):
                    _write(code, kind, _read(code, kind, place, i), to, i)

    return body


def split_heads(kind: Kind, tokens: int, heads: int, kv_heads: int, size: int) -> Body:
    """The gradient (M, H C) to (B, K, T, G, C), and its product with y (M, H C) for each head, f32 (B, K, T, G)."""
    group = heads // kv_heads

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        gradient, y, out, dots = args
        with code.loop(start, end) as m:
            b, t = m // tokens, m % tokens
            for head in range(heads):
                to = _head_place(kind, head, b, t, (out, out, out), tokens, heads, kv_heads, size)
                row = (m * heads + head) * (_size(kind) * size)
                total = code.number(FLOATS, 0.0)
                for i in range(0, size, LANES):
                    slope = _read(code, kind, gradient + row, i)
                    total = code.fma(slope, _read(code, kind, y + row, i), total)
                    _write(code, kind, slope, to, i)
                place = ((b * kv_heads + head // group) * tokens + t) * group + head % group
                code.store(code.sum_lanes(total), dots, place * 4)

    return body


Masking = Literal["causal", "mask"]


def _seen(code: Code, masking: Masking, mask: Value, visible: Value, i: Value) -> Value:
    """Which of 16 keys a query sees."""
    if masking == "causal":
        return code.iota(I32, LANES) < (visible - i).to(I32)
    return code.load(mask, vector(I8, LANES), i).compare("!=", 0)


def _query(masking: Masking, r: Value, args: tuple[Value, ...], heads: int, kv_heads: int) -> tuple[Value, Value]:
    """Of row r of the scores (B, K, Tq, G): the row of its mask, and how many keys it sees."""
    mask, queries, first, tokens = args
    group = heads // kv_heads
    t = (r // group) % queries + first
    return mask + (r // (queries * heads) * tokens + t) * tokens, t + 1


def softmax_forward(kind: Kind, heads: int, kv_heads: int, masking: Masking) -> Body:
    """Scores (B, K, Tq, G, S) to weights in their place, and the logarithm of each row's sum, f32 (B, K, Tq, G).

    The queries are `queries` tokens from `first` on, of rows of `tokens`; mask: bytes (B, T, T), not 0 where a query
    looks. Zeros for all others of the S keys.
    """

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        scores, sums, keys, *rest = args
        with code.loop(start, end) as r:
            row = scores + r * keys * _size(kind)
            mask, visible = _query(masking, r, tuple(rest), heads, kv_heads)
            reach = (visible + (LANES - 1)) // LANES * LANES if masking == "causal" else keys
            highest = code.variable(code.number(FLOATS, HIDDEN))
            with code.loop(0, reach, LANES) as i:
                seen = _seen(code, masking, mask, visible, i)
                highest.set(code.intrinsic("maximum", highest.get(), seen.where(_read(code, kind, row, i), HIDDEN)))
            top = code.max_lanes(highest.get())
            total = code.variable(code.number(FLOATS, 0.0))
            with code.loop(0, reach, LANES) as i:
                seen = _seen(code, masking, mask, visible, i)
                total.set(total.get() + seen.where(exp(code, _read(code, kind, row, i) - top), 0.0))
            whole = code.intrinsic("maximum", code.sum_lanes(total.get()), code.number(F32, 1e-30))
            logarithm = top + code.intrinsic("log", whole)
            code.store(logarithm, sums, r * 4)
            scale = 1.0 / whole
            with code.loop(0, reach, LANES) as i:
                seen = _seen(code, masking, mask, visible, i)
                _write(code, kind, seen.where(exp(code, _read(code, kind, row, i) - top) * scale, 0.0), row, i)
            with code.loop(reach, keys, LANES) as i:
                _write(code, kind, code.number(FLOATS, 0.0), row, i)

    return body


def softmax_backward(kind: Kind, heads: int, kv_heads: int, masking: Masking) -> Body:
    """Scores and the gradient of the weights, both (B, K, Tq, G, S): in their places the weights, and the gradient of
    the scores. sums and dots f32 (B, K, Tq, G): of the whole rows, with `first` and `queries` as in the forward pass.
    """

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        scores, slopes, sums, dots, keys, *rest = args
        with code.loop(start, end) as r:
            row, slope = (place + r * keys * _size(kind) for place in (scores, slopes))
            mask, visible = _query(masking, r, tuple(rest), heads, kv_heads)
            reach = (visible + (LANES - 1)) // LANES * LANES if masking == "causal" else keys
            logarithm, dot = _float(code, sums, r), _float(code, dots, r)
            with code.loop(0, reach, LANES) as i:
                seen = _seen(code, masking, mask, visible, i)
                weights = seen.where(exp(code, _read(code, kind, row, i) - logarithm), 0.0)
                gradient = weights * (_read(code, kind, slope, i) - dot)
                _write(code, kind, weights, row, i)
                _write(code, kind, gradient, slope, i)
            with code.loop(reach, keys, LANES) as i:
                for place in (row, slope):
                    _write(code, kind, code.number(FLOATS, 0.0), place, i)

    return body


def cross_entropy(kind: Kind, *, learns: bool) -> Body:
    """logits (M, V), labels i64 (M,), scales f32 (M,): the loss of each f32 (M,), times its scale; with `learns` the
    logits become their gradient. V is a multiple of 16."""

    def body(code: Code, _piece: Value, start: Value, end: Value, args: list[Value]) -> None:
        logits, labels, scales, losses, size = args
        with code.loop(start, end) as m:
            row = logits + m * size * _size(kind)
            highest = code.variable(code.number(FLOATS, HIDDEN))
            with code.loop(0, size, LANES) as i:
                highest.set(code.intrinsic("maximum", highest.get(), _read(code, kind, row, i)))
            top = code.max_lanes(highest.get())
            totals = code.variable(code.number(FLOATS, 0.0))
            with code.loop(0, size, LANES) as i:
                totals.set(totals.get() + exp(code, _read(code, kind, row, i) - top))
            whole = top + code.intrinsic("log", code.sum_lanes(totals.get()))
            label, scale = code.load_i64(labels, m * 8), _float(code, scales, m)
            at = row + label * _size(kind)
            if kind == "f32":
                chosen = code.load(at, F32)
            else:
                chosen = widen_bf16(code.load(at, I16).splat(LANES)).lane(0)
            code.store((whole - chosen) * scale, losses, m * 4)
            if learns:
                with code.loop(0, size, LANES) as i:
                    _write(code, kind, exp(code, _read(code, kind, row, i) - whole) * scale, row, i)
                gradient = (exp(code, (chosen - whole).splat(LANES)) - 1.0) * scale
                if kind == "f32":
                    code.store(gradient.lane(0), at)
                else:
                    rounded = gradient.to(BF16).bits(I16) if code.module.isa.dot_bf16 else round_bf16(gradient)
                    code.store(rounded.lane(0), at)

    return body


_BODIES: dict[str, tuple[int, Callable[..., Body]]] = {
    "norm_forward": (6, norm_forward),
    "norm_backward": (9, norm_backward),
    "add": (3, add),
    "swiglu_forward": (2, swiglu_forward),
    "swiglu_backward": (4, swiglu_backward),
    "rope_forward": (6, rope_forward),
    "rope_backward": (6, rope_backward),
    "merge_heads": (2, merge_heads),
    "split_heads": (4, split_heads),
    "softmax_forward": (7, softmax_forward),
    "softmax_backward": (9, softmax_backward),
    "cross_entropy": (5, cross_entropy),
}


@cache
def kernel(name: str, *settings: object, **options: object) -> Kernel:
    """One of the functions above for these sizes, over rows of tokens (or of scores)."""
    num_args, make = _BODIES[name]
    return Kernel(f"training {name} {settings} {sorted(options.items())}", num_args, make(*settings, **options))
