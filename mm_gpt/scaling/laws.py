"""Scaling laws fitted to finished runs, and what they say about a run that is still to come.

Three forms: `parametric` L(N, D) = A / N^alpha + B / D^beta + E (Hoffmann et al., arXiv 2203.15556), `power`
L(C) = a C^b + c (OpenAI, GPT-4 Technical Report, arXiv 2303.08774, section 3) and `pure` L(C) = a C^b, for what has no
floor. All are fitted by `solver`: Huber loss of log L with delta 1e-3, summed, from many random starts.

A fit refuses rather than guesses. CannotTell is raised for too few rungs, too small a span, a gradient that is not
zero, a loss that grows with size, and, when a prediction is asked, for optima that are as good but disagree about it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mm_gpt.config import from_dict
from mm_gpt.errors import MMGPTError
from mm_gpt.scaling.checks import MIN_DECADES, check_effects, check_ladder, checked
from mm_gpt.scaling.forms import (
    COEFFICIENTS,
    FormName,
    Scale,
    from_theta,
    logs,
    predicted,
    random_starts,
    rung,
    to_theta,
)
from mm_gpt.scaling.points import CannotTell, Point
from mm_gpt.scaling.solver import CONVERGED, EXACT, Array, Solutions, gradient_norm, log_law, minimise

DELTA = 1e-3
STARTS = 32
MAX_STEPS = 400
RIVAL = 0.01
"""Optima whose objective is at most this share above the best one's are as good."""
SPREAD = 0.01
"""Optima as good as each other may disagree about a prediction by this share of it."""
RESAMPLES = 400
ROUNDING = 1e-20
"""Objectives up to this for each run are rounding."""


@dataclass(frozen=True)
class Optimum:
    """A place where the gradient is zero."""

    objective: float
    coefficients: dict[str, float]


@dataclass(frozen=True)
class Optimal:
    """How to spend an amount of compute."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class HeldOut:
    """The largest rung of a ladder, predicted by a fit that has not seen it."""

    names: tuple[str, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """Predicted over measured, minus 1, of each run of the rung."""
        return tuple(p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True))

    @property
    def error(self) -> float:
        """The one that is farthest from 0."""
        return max(self.errors, key=abs)


@dataclass(frozen=True)
class Fit:
    """A law, and what it was fitted to. `fit_parametric` and `fit_power` make it."""

    form: FormName
    coefficients: dict[str, float]
    objective: float
    """Sum over the points of the Huber loss."""
    gradient_norm: float
    """Share of the pulls of the points that does not cancel; 0 at an optimum."""
    starts: int
    converged: int
    """Starts that ended where the gradient is zero; the others got stuck on the way and count for nothing."""
    runner_up: Optimum | None
    """The second-best optimum, if there is one."""
    rivals: tuple[Optimum, ...]
    """Other optima that are as good: within 1 % of the objective."""
    points: tuple[Point, ...]
    """What was fitted, each run once."""
    delta: float = DELTA
    seed: int = 0

    def predict(self, target: Point, *, spread: float = SPREAD) -> float:
        """Loss of a run. Raises CannotTell if optima that are as good differ about it by more than `spread`."""
        all_coefficients = [self.coefficients, *(rival.coefficients for rival in self.rivals)]
        best, *others = (float(predicted(self.form, each, [target])[0]) for each in all_coefficients)
        for other in others:
            if abs(other / best - 1) > spread:
                raise CannotTell(
                    f"two optima fit the runs equally well (within {RIVAL:.0%} of the objective) and predict "
                    f"{best:.4g} and {other:.4g} for {target}: add runs between the ladder and the target"
                )
        return best

    def interval(self, target: Point, *, share: float = 0.9, of_run: bool = True) -> tuple[float, float]:
        """Where the loss of a run lies with probability `share`; with `of_run=False` the law without a run's own noise.

        Parametric bootstrap: laws refitted to what this law would give with noise as large as its residuals show. How
        large that is is itself uncertain with few runs, so a first bootstrap finds how far residuals fall short of the
        noise that made them, and each resample draws its noise accordingly: without that, intervals of 90 % cover 80 %
        for six runs. Raises CannotTell if no run is left to tell the noise from.
        """
        if not 0 < share < 1:
            raise MMGPTError(f"share must be above 0 and below 1, not {share}")
        thetas, noise = self._resampled
        laws = log_law(thetas, logs(self.form, [target])[None])[:, 0]
        if of_run:
            laws = laws + noise * np.random.default_rng([self.seed, 1]).standard_normal(len(laws))
        low, high = np.quantile(laws, [(1 - share) / 2, (1 + share) / 2])
        return float(np.exp(low)), float(np.exp(high))

    @property
    def residuals(self) -> tuple[float, ...]:
        """Predicted over measured, minus 1, of each point: a run that is far off has diverged, or was tuned worse."""
        losses = predicted(self.form, self.coefficients, self.points)
        return tuple(float(loss / point.loss - 1) for loss, point in zip(losses, self.points, strict=True))

    @property
    def covariance(self) -> tuple[tuple[float, ...], ...]:
        """Of the coefficients, in the order of `coefficients`, by the bootstrap."""
        return tuple(tuple(map(float, row)) for row in np.cov(self._resampled_coefficients.T))

    @property
    def quantiles(self) -> dict[str, tuple[float, float, float]]:
        """5 %, 50 % and 95 % of each coefficient, by the bootstrap."""
        rows = np.quantile(self._resampled_coefficients, [0.05, 0.5, 0.95], axis=0).T
        return {name: (float(a), float(b), float(c)) for name, (a, b, c) in zip(self.coefficients, rows, strict=True)}

    def optimal(self, flops: float) -> Optimal:
        """Parameters and tokens for the lowest loss at `flops` = 6 N D. Raises MMGPTError for a law of C alone."""
        if self.form != "parametric":
            raise MMGPTError(f"a law of form {self.form!r} knows only compute: fit L(N, D) to divide it")
        return compute_optimal(self.coefficients, flops)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: everything above, with the bootstrap's covariance and quantiles where they can be told."""
        values = dataclasses.asdict(self)
        if len(self.points) > len(self.coefficients) and np.isfinite(self.covariance).all():
            values |= {"covariance": self.covariance, "quantiles": self.quantiles}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "fit") -> "Fit":
        """What `to_dict` gave. Raises ConfigError for wrong keys, CannotTell for coefficients that are not the points'.

        The bootstrap is drawn again from the points and the seed, and not read.
        """
        own = {key: value for key, value in values.items() if key not in ("covariance", "quantiles")}
        fit = from_dict(cls, own, where=where)
        check_gradient(fit.points, fit.form, fit.coefficients, delta=fit.delta)
        return fit

    @cached_property
    def _resampled(self) -> tuple[Array, Array]:
        """Refitted laws (R, P) and the standard deviation of log L that each resample had (R,)."""
        free = len(self.points) - len(self.coefficients)
        if free < 1:
            raise CannotTell(
                f"{len(self.points)} runs for {len(self.coefficients)} coefficients leave none to tell the noise from: "
                "no interval; add runs"
            )
        x, y = logs(self.form, self.points), np.log([point.loss for point in self.points])
        scale = Scale.of(x)
        theta = np.repeat(scale.standard(to_theta(self.form, self.coefficients))[None], RESAMPLES, axis=0)
        z = scale.logs(x)[None]
        law = log_law(theta[:1], z)
        rng = np.random.default_rng(self.seed)

        def refit(noise: Array) -> tuple[Array, Array]:
            """Laws (R, P) of resamples with this noise, and the sums of their squared residuals (R,)."""
            resampled = law + noise[:, None] * rng.standard_normal((RESAMPLES, len(y)))
            found = minimise(theta, z, resampled, delta=self.delta).theta
            return found, ((log_law(found, z) - resampled) ** 2).sum(axis=1)

        squares = float(((law - y) ** 2).sum())
        if squares <= len(y) * EXACT**2:  # nothing but rounding
            return scale.natural(theta), np.zeros(RESAMPLES)
        guess = np.full(RESAMPLES, math.sqrt(squares / free))
        noise = np.sqrt(squares / refit(guess)[1]) * guess
        return scale.natural(refit(noise)[0]), noise

    @property
    def _resampled_coefficients(self) -> Array:
        """(R, coefficients)"""
        return np.array([list(from_theta(self.form, theta).values()) for theta in self._resampled[0]])


@dataclass(frozen=True)
class Prediction:
    """The loss of a run before it starts, never without the error that the same way of fitting made one rung below."""

    target: Point
    loss: float
    low: float
    """Of the interval of 90 %."""
    high: float
    held_out: HeldOut
    fit: Fit

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} (90 %: {self.low:.4f} to {self.high:.4f}) for {self.target}; "
            f"the ladder's largest rung, held out, was missed by {self.held_out.error:+.2%}"
        )


def fit_parametric(
    points: Sequence[Point], *, delta: float = DELTA, seed: int = 0, starts: int = STARTS, max_steps: int = MAX_STEPS
) -> Fit:
    """Fit L(N, D) = A / N^alpha + B / D^beta + E.

    Needs three sizes of model, 1.5 decades of compute and five runs that do not all have the same tokens per parameter.
    Raises CannotTell where that is missing or the fit decides nothing.
    """
    return _fit("parametric", points, delta=delta, seed=seed, starts=starts, max_steps=max_steps)


def fit_power(
    points: Sequence[Point],
    *,
    floor: bool = True,
    delta: float = DELTA,
    seed: int = 0,
    starts: int = STARTS,
    max_steps: int = MAX_STEPS,
) -> Fit:
    """Fit L(C) = a C^b + c; without `floor` c is 0, which extrapolates a loss badly: text has entropy.

    Needs three amounts of compute over 1.5 decades. Raises CannotTell as `fit_parametric`.
    """
    form: FormName = "power" if floor else "pure"
    return _fit(form, points, delta=delta, seed=seed, starts=starts, max_steps=max_steps)


def held_out_error(points: Sequence[Point], form: FormName, *, seed: int = 0) -> HeldOut:
    """Fit without the largest rung (all runs of the largest N; of the largest C for laws of C) and predict it.

    Raises CannotTell if fewer than three rungs are left. What is left may span less than 1.5 decades.
    """
    runs = checked(points)
    top = max((rung(form, point) for point in runs), default=0.0)
    left_out = [point for point in runs if rung(form, point) == top]
    kept = [point for point in runs if rung(form, point) < top]
    fit = _fit(form, kept, seed=seed, decades=0.0, why=", once the largest is held out to test the fit,")
    losses = tuple(fit.predict(point) for point in left_out)
    return HeldOut(tuple(map(str, left_out)), tuple(point.loss for point in left_out), losses)


def predict_run(points: Sequence[Point], target: Point, form: FormName = "parametric", *, seed: int = 0) -> Prediction:
    """Fit, hold out the largest rung, predict. Raises CannotTell if any of the three cannot be done."""
    fit = _fit(form, points, seed=seed)
    held_out = held_out_error(points, form, seed=seed)
    loss = fit.predict(target)
    low, high = fit.interval(target)
    return Prediction(target, loss, low, high, held_out, fit)


def check_gradient(
    points: Sequence[Point], form: FormName, coefficients: Mapping[str, float], *, delta: float = DELTA
) -> float:
    """Norm of the gradient at somebody's coefficients. Raises CannotTell if it is not zero: no optimum of the runs."""
    runs = checked(points)
    x, y = logs(form, runs), np.log([point.loss for point in runs])
    scale = Scale.of(x)
    theta = scale.standard(to_theta(form, coefficients))[None]
    norm = float(gradient_norm(theta, scale.logs(x)[None], y[None], delta)[0])
    if not norm <= CONVERGED:
        raise CannotTell(
            f"these coefficients are no optimum of these {len(runs)} runs (gradient norm {norm:.1e}, at most "
            f"{CONVERGED:.0e}): the fit was stopped early, or one of the two was changed"
        )
    check_effects(form, coefficients, runs)
    return norm


def compute_optimal(coefficients: Mapping[str, float], flops: float) -> Optimal:
    """N* = G (C/6)^(beta/(alpha+beta)) and D* = (C/6) / N*, with G = (alpha A / (beta B))^(1/(alpha+beta))."""
    A, B, alpha, beta, E = (coefficients[name] for name in COEFFICIENTS["parametric"])
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    parameters = G * (flops / 6) ** (beta / (alpha + beta))
    tokens = flops / 6 / parameters
    return Optimal(parameters, tokens, A / parameters**alpha + B / tokens**beta + E)


def _fit(
    form: FormName,
    points: Sequence[Point],
    *,
    delta: float = DELTA,
    seed: int = 0,
    starts: int = STARTS,
    max_steps: int = MAX_STEPS,
    decades: float = MIN_DECADES,
    why: str = "",
) -> Fit:
    runs = checked(points)
    check_ladder(form, runs, decades, why)
    x, y = logs(form, runs), np.log([point.loss for point in runs])
    scale = Scale.of(x)
    begin = scale.centred(random_starts(form, float(np.median(y)), starts, seed))
    found = minimise(begin, scale.logs(x)[None], y[None], delta=delta, max_steps=max_steps)
    optima = _optima(form, found, scale)
    lowest = int(np.argmin(found.objective))
    slack = ROUNDING * len(runs)
    # A start that got stuck below all optima shows that none of them is the best
    if not optima or found.objective[lowest] < optima[0].objective * (1 - 1e-4) - slack:
        raise CannotTell(
            f"the fit has not converged in {max_steps} steps from {starts} starts (gradient norm "
            f"{found.gradient_norm[lowest]:.1e}, at most {CONVERGED:.0e}): its coefficients would mean nothing"
        )
    first, *others = optima
    check_effects(form, first.coefficients, runs)
    return Fit(
        form=form,
        coefficients=first.coefficients,
        objective=first.objective,
        gradient_norm=float(found.gradient_norm[found.objective == first.objective].min()),
        starts=starts,
        converged=int(found.converged.sum()),
        runner_up=others[0] if others else None,
        rivals=tuple(each for each in others if each.objective <= first.objective * (1 + RIVAL) + slack),
        points=tuple(runs),
        delta=delta,
        seed=seed,
    )


def _optima(form: FormName, found: Solutions, scale: Scale) -> list[Optimum]:
    """The different places with zero gradient, the best first."""
    order = np.argsort(found.objective, kind="stable")
    sizes = np.exp(found.theta)  # so that a constant of e^-50 and one of e^-60 are the same 0
    kept: list[int] = []
    for index in order[found.converged[order]]:
        if all(np.abs(sizes[index] - sizes[other]).max() > 1e-3 * sizes[index].max() for other in kept):
            kept.append(int(index))
    natural = scale.natural(found.theta)
    return [Optimum(float(found.objective[index]), from_theta(form, natural[index])) for index in kept]
