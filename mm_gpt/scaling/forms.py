"""The forms of law, and how their coefficients and runs look to the solver."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.scaling.points import Point
from mm_gpt.scaling.solver import Array, log_law

FormName = Literal["parametric", "power", "pure"]
COEFFICIENTS: dict[str, tuple[str, ...]] = {
    "parametric": ("A", "B", "alpha", "beta", "E"),
    "power": ("a", "b", "c"),
    "pure": ("a", "b"),
}
"""L(N, D) = A / N^alpha + B / D^beta + E; L(C) = a C^b + c; L(C) = a C^b."""


def check_form(form: str) -> None:
    """Raise MMGPTError for a form that is none of `COEFFICIENTS`."""
    if form not in COEFFICIENTS:
        raise MMGPTError(unknown_name("form of law", form, COEFFICIENTS))


def logs(form: FormName, points: Sequence[Point]) -> Array:
    """What the law is of, as logarithms: (n, K)."""
    if form == "parametric":
        return np.log(np.array([[point.parameters, point.tokens] for point in points], dtype=float))
    return np.log(np.array([[point.flops] for point in points], dtype=float))


def rung(form: FormName, point: Point) -> float:
    """What makes runs of one rung: the size of the model, or for laws of compute alone its amount."""
    return point.parameters if form == "parametric" else point.flops


def predicted(form: FormName, coefficients: Mapping[str, float], points: Sequence[Point]) -> Array:
    """Loss that a law gives to runs: (n,)."""
    return np.exp(log_law(to_theta(form, coefficients)[None], logs(form, points)[None])[0])


def to_theta(form: FormName, coefficients: Mapping[str, float]) -> Array:
    """Coefficients as the solver's parameters: (P,). Raises MMGPTError for one that is missing or out of range."""
    check_form(form)
    for name in COEFFICIENTS[form]:
        value = coefficients.get(name, math.nan)
        if not math.isfinite(value) or (name in "ABEac" and value < 0):
            raise MMGPTError(f"a law of form {form!r} needs a coefficient {name}, not {coefficients.get(name)}")
    values = [coefficients[name] for name in COEFFICIENTS[form]]
    with np.errstate(divide="ignore"):
        if form == "parametric":
            A, B, alpha, beta, E = values
            return np.array([np.log(A), np.log(B), alpha, beta, np.log(E)])
        a, b, *c = values
        return np.array([np.log(a), -b, np.log(c[0]) if c else -np.inf])


def from_theta(form: FormName, theta: Array) -> dict[str, float]:
    """The solver's parameters (P,) as coefficients."""
    with np.errstate(over="ignore"):
        if form == "parametric":
            values = [*np.exp(theta[:2]), *theta[2:4], np.exp(theta[4])]
        else:
            values = [np.exp(theta[0]), -theta[1], np.exp(theta[2])]
    return {name: float(value) for name, value in zip(COEFFICIENTS[form], values, strict=False)}


def random_starts(form: FormName, centre: float, starts: int, seed: int) -> Array:
    """(starts, P): shares of the loss e^centre in the middle of the ladder, and exponents from 0.03 to 2."""
    if starts < 1:
        raise MMGPTError(f"starts must be at least 1, not {starts}")
    rng = np.random.default_rng(seed)
    laws = len(COEFFICIENTS[form]) // 2
    shares = np.log(rng.dirichlet(np.ones(laws + 1), starts))
    exponents = np.exp(rng.uniform(math.log(0.03), math.log(2), (starts, laws)))
    theta = np.concatenate([shares[:, :laws] + centre, exponents, shares[:, laws:] + centre], axis=1)
    if form == "pure":
        theta[:, -1] = -np.inf
    return theta


@dataclass(frozen=True)
class Scale:
    """Logarithms centred and divided by their deviation: units of N, D and C are then of no account to the solver."""

    middle: Array
    """(K,)"""
    width: Array
    """(K,)"""

    @classmethod
    def of(cls, x: Array) -> "Scale":
        """That of the runs' logarithms (n, K)."""
        return cls(x.mean(axis=0), x.std(axis=0))

    def logs(self, x: Array) -> Array:
        """(..., K) -> (..., K)"""
        return (x - self.middle) / self.width

    def centred(self, theta: Array) -> Array:
        """Parameters whose coefficients are of the middle already, with exponents a unit of the deviation."""
        laws = len(self.middle)
        changed = theta.copy()
        changed[..., laws : 2 * laws] *= self.width
        return changed

    def standard(self, theta: Array) -> Array:
        """Parameters of plain logarithms to those of scaled ones: (..., P)."""
        laws = len(self.middle)
        changed = theta.copy()
        changed[..., :laws] -= theta[..., laws : 2 * laws] * self.middle
        return self.centred(changed)

    def natural(self, theta: Array) -> Array:
        """The way back: (..., P)."""
        laws = len(self.middle)
        changed = theta.copy()
        changed[..., laws : 2 * laws] /= self.width
        changed[..., :laws] += changed[..., laws : 2 * laws] * self.middle
        return changed
