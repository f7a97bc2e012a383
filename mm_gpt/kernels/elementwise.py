"""Functions of vectors of float32: exponential, activations, norms. Relative errors are about 1e-7 unless said."""

import math
from collections.abc import Callable

from mm_gpt.kernels.simd import F32, I32, Code, Value, vector

LANES = 16
FLOATS = vector(F32, LANES)


def exp(code: Code, x: Value) -> Value:
    """0 below -87; finite above 88."""
    tiny = x < -87.0
    x = tiny.where(-87.0, x)  # comparisons leave NaN as it is
    x = (x > 88.0).where(88.0, x)
    whole = code.intrinsic("roundeven", x * math.log2(math.e))
    # ln 2 in two parts, the first short enough for exact products.
    rest = code.fma(whole, code.number(x.type, -0.693145751953125), x)
    rest = code.fma(whole, code.number(x.type, -1.428606765330187e-06), rest)
    # e^r on |r| <= ln 2 / 2: seven terms of the series leave 5e-9.
    total = code.number(x.type, 1 / math.factorial(7))
    for power in range(6, -1, -1):
        total = code.fma(total, rest, code.number(x.type, 1 / math.factorial(power)))
    scale = ((whole.to(I32) + 127) << 23).bits(F32)
    return tiny.where(0.0, total * scale)


def sigmoid(code: Code, x: Value) -> Value:
    return 1.0 / (exp(code, 0.0 - x) + 1.0)


def tanh(code: Code, x: Value) -> Value:
    """By its continued fraction where the other formula loses digits."""
    big = 1.0 - 2.0 / (exp(code, x * 2.0) + 1.0)
    square = x * x
    fraction = code.number(x.type, 11.0)
    for odd in (9.0, 7.0, 5.0, 3.0, 1.0):
        fraction = square / fraction + odd
    return (code.intrinsic("fabs", x) < 0.5).where(x / fraction, big)


def normal_cdf(code: Code, x: Value) -> Value:
    """Φ(x) = erfc(-x / √2) / 2 by the Chebyshev fit of Press et al., Numerical Recipes, 6.2 (1.2e-7 relative)."""
    z = code.intrinsic("fabs", x) * math.sqrt(0.5)
    t = 1.0 / (z * 0.5 + 1.0)
    coefficients = (
        *(0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807),
        *(-0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223),
    )
    total = code.number(x.type, coefficients[0])
    for coefficient in coefficients[1:]:
        total = code.fma(total, t, code.number(x.type, coefficient))
    tail = t * exp(code, total - z * z) * 0.5
    return (x > 0.0).where(1.0 - tail, tail)


def activate(code: Code, name: str, x: Value) -> Value:
    """One of the decoder's activations."""
    if name == "silu":
        return x * sigmoid(code, x)
    if name == "gelu":
        return x * normal_cdf(code, x)
    if name == "gelu_tanh":  # 0.5 (1 + tanh u) is sigmoid(2u)
        inner = code.fma(x * x * x, code.number(x.type, 0.044715), x) * (2 * math.sqrt(2 / math.pi))
        return x * sigmoid(code, inner)
    assert name == "relu"
    return code.intrinsic("maximum", x, code.number(x.type, 0.0))


def softcap(code: Code, cap: float, x: Value) -> Value:
    return tanh(code, x * (1 / cap)) * cap


def norm(code: Code, kind: str, eps: float, x: Value, size: int, out: Value, weight: Value, bias: Value) -> None:
    """RMS or layer norm of `size` numbers at x, to `out` (which may be x)."""
    whole = size // LANES * LANES
    tail = code.i64(size - whole)

    def each(apply: Callable[[Value, Value | None], None]) -> None:
        with code.loop(0, whole, LANES) as i:
            apply(i, None)
        if whole < size:
            apply(code.i64(whole), tail)

    def read(address: Value, i: Value, count: Value | None) -> Value:
        place = address + i * 4
        return code.load(place, FLOATS) if count is None else code.load_first(place, FLOATS, count)

    zeros = code.number(FLOATS, 0.0)
    mean = code.number(F32, 0.0)
    if kind == "layer":
        total = code.variable(zeros)
        each(lambda i, count: total.set(total.get() + read(x, i, count)))
        mean = code.sum_lanes(total.get()) * (1 / size)
    squares = code.variable(zeros)

    def add_square(i: Value, count: Value | None) -> None:
        centred = read(x, i, count) - mean if kind == "layer" else read(x, i, count)
        if count is not None and kind == "layer":
            centred = (code.iota(I32, LANES) < (size - whole)).where(centred, 0.0)
        squares.set(code.fma(centred, centred, squares.get()))

    each(add_square)
    variance = code.sum_lanes(squares.get()) * (1 / size) + eps
    inverse = 1.0 / code.intrinsic("sqrt", variance)

    def scale(i: Value, count: Value | None) -> None:
        values = read(x, i, count)
        if kind == "layer":
            values = values - mean
        values = values * inverse * read(weight, i, count)
        if kind == "layer":
            values = values + read(bias, i, count)
        if count is None:
            code.store(values, out, i * 4)
        else:
            for lane in range(size - whole):
                code.store(values.lane(lane), out, i * 4 + 4 * lane)

    each(scale)
