"""What runs must be for a law to be fitted to them, and what a fitted law must be to mean something."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mm_gpt.scaling.forms import COEFFICIENTS, FormName, check_form, logs, rung
from mm_gpt.scaling.points import CannotTell, Point

MIN_RUNGS = 3
MIN_DECADES = 1.5
VANISHED = 1e-5
"""A term that is at most this share of the loss of its smallest run has run off to where nothing changes any more."""


def checked(points: Sequence[Point]) -> list[Point]:
    """Each run once, in an order of their own: a fit depends neither on order nor on repetition.

    Raises CannotTell for numbers that are not finite and above 0.
    """
    for point in points:
        for name in ("parameters", "tokens", "flops", "loss"):
            value = getattr(point, name)
            if not (math.isfinite(value) and value > 0):
                hint = ": leave out runs that diverged" if name == "loss" else ""
                raise CannotTell(f"run {point}: {name} is {value}{hint}")
    unique = {(p.parameters, p.tokens, p.flops, p.loss): p for p in points}
    return [unique[key] for key in sorted(unique)]


def check_effects(form: FormName, coefficients: Mapping[str, float], runs: list[Point]) -> None:
    """Raise CannotTell where the loss does not fall with size, or does not change: there too the gradient is zero."""
    terms = [("A", "alpha", "parameters"), ("B", "beta", "tokens")] if form == "parametric" else [("a", "b", "flops")]
    for scale, exponent, what in terms:
        power = coefficients[exponent] * (-1 if exponent == "b" else 1)
        if power <= 0:
            raise CannotTell(
                f"the loss of these runs does not fall with {what} (best fit: {exponent} = "
                f"{coefficients[exponent]:.3g}): look for runs that diverged or were tuned worse than others"
            )
        smallest = min(runs, key=lambda run: getattr(run, what))
        with np.errstate(divide="ignore"):  # of a coefficient of 0
            effect = np.log(coefficients[scale]) - power * math.log(getattr(smallest, what))
        if effect < math.log(VANISHED * smallest.loss):
            raise CannotTell(
                f"the fit sees no effect of {what} in these runs: {exponent} = {coefficients[exponent]:.3g}"
            )


def check_ladder(form: FormName, runs: list[Point], decades: float, why: str) -> None:
    """Raise CannotTell for too few rungs or runs, too small a span, or tokens that go with parameters."""
    check_form(form)
    what = "sizes of model" if form == "parametric" else "amounts of compute"
    rungs = {rung(form, point) for point in runs}
    if len(rungs) < MIN_RUNGS:
        raise CannotTell(f"{len(rungs)} {what}{why} are too few: a fit needs at least {MIN_RUNGS}")
    flops = [point.flops for point in runs]
    span = math.log10(max(flops) / min(flops))
    if span < decades:
        raise CannotTell(f"the runs span {span:.2f} decades of compute: a fit needs at least {decades:g}")
    if len(runs) < len(COEFFICIENTS[form]):
        raise CannotTell(f"{len(runs)} runs{why} are too few for {len(COEFFICIENTS[form])} coefficients")
    if form == "parametric":
        x = logs(form, runs)
        thinnest = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)[-1] / math.sqrt(len(runs))
        if thinnest < 1e-3:
            raise CannotTell(
                "tokens go with parameters in the same way in all runs, so that their effects cannot be told apart: "
                "vary tokens per parameter, or fit the law of compute alone"
            )
