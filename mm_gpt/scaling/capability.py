"""What a large model will be able to do, from what small ones do.

Two ways. GPT-4's report (arXiv 2303.08774, section 3.2): the mean over problems of -log(pass rate) falls as a power law
of compute, alpha C^-k, on problems that every small model solves at least once, in buckets of difficulty that small
models decide. OLMo's ladder (Bhagia et al., arXiv 2412.04403): accuracy is a sigmoid of the loss, and a scaling law
gives the loss. And a check of claims that an ability emerges (Schaeffer et al., arXiv 2304.15004).

Nothing here looks at the target before its number is predicted: filters and buckets are made from small models alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mm_gpt.errors import MMGPTError
from mm_gpt.scaling.laws import Fit, HeldOut, fit_power, held_out_error
from mm_gpt.scaling.points import CannotTell, Point
from mm_gpt.scaling.solver import Array

SMALL = 1e-3
"""GPT-4's capability was predicted from models with at most a thousandth of its compute."""
BUCKETS = 6
"""GPT-4's report has six, and shows the third."""


@dataclass(frozen=True)
class Attempts:
    """What one model did with each problem."""

    flops: float
    """C of its training."""
    samples: int
    """Attempts at each problem."""
    passed: Mapping[str, int]
    """Problem -> how many of them passed."""
    name: str = ""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise MMGPTError(f"{self}: samples must be at least 1, not {self.samples}")
        for problem, passed in self.passed.items():
            if not 0 <= passed <= self.samples:
                raise MMGPTError(f"{self}: problem {problem!r} passed {passed} of {self.samples} times")

    def __str__(self) -> str:
        return self.name or f"model of {self.flops:.3g} FLOPs"

    def rate(self, problem: str) -> float:
        """Pass rate. Raises MMGPTError for a problem that was not attempted."""
        if problem not in self.passed:
            raise MMGPTError(f"{self}: no attempts at problem {problem!r}")
        return self.passed[problem] / self.samples


def mean_log_loss(model: Attempts, problems: Sequence[str], *, floor: bool = False) -> float:
    """Mean of -log(pass rate) over problems, in nats; not -log of the mean, which a few easy problems decide.

    With `floor` a rate counts as at least 1 / (2 samples); without it CannotTell is raised for a problem that was never
    solved, whose term is infinite.
    """
    if not problems:
        raise CannotTell("no problems are left that every small model solves at least once: take more samples")
    least = 1 / (2 * model.samples) if floor else 0.0
    rates = {problem: max(model.rate(problem), least) for problem in problems}
    for problem, rate in rates.items():
        if rate == 0:
            raise CannotTell(
                f"{model} never solves problem {problem!r}: leave out what small models do not solve "
                "(`solved_by_all`), or ask for the floor of 1 / (2 samples)"
            )
    return float(np.mean([-math.log(rate) for rate in rates.values()]))


def small_models(models: Sequence[Attempts], flops: float, *, most: float = SMALL) -> list[Attempts]:
    """Those with at most the share `most` of a target's compute: the only ones that a prediction may look at."""
    return [model for model in models if model.flops <= most * flops]


def solved_by_all(small: Sequence[Attempts]) -> list[str]:
    """Problems that each of the small models solves at least once, in alphabetical order."""
    _check_models(small)
    return [problem for problem in _problems(small) if all(model.passed[problem] > 0 for model in small)]


def difficulty_buckets(
    small: Sequence[Attempts], *, count: int = BUCKETS, drop_hardest: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Problems in buckets of (almost) equal size by the mean pass rate of the small models, the hardest first.

    `drop_hardest` leaves out that many before (GPT-4's report: 15). All problems are in a bucket, also those that some
    model never solves; `predict_capability` leaves these out. Equal rates go by name.
    """
    _check_models(small)
    rates = {problem: float(np.mean([model.rate(problem) for model in small])) for problem in _problems(small)}
    ranked = sorted(rates, key=lambda problem: (rates[problem], problem))[drop_hardest:]
    if not 1 <= count <= len(ranked):
        raise MMGPTError(f"{len(ranked)} problems cannot be put into {count} buckets")
    return tuple(tuple(map(str, bucket)) for bucket in np.array_split(ranked, count))


@dataclass(frozen=True)
class CapabilityPrediction:
    """Mean of -log(pass rate) of a model that is still to come."""

    problems: tuple[str, ...]
    """What it is over: known before the target runs."""
    log_loss: float
    low: float
    """Of the interval of 90 %."""
    high: float
    held_out: HeldOut
    """The largest of the small models, predicted from the others."""
    fit: Fit
    """alpha C^-k, as a `pure` law of compute: a is alpha, b is -k."""

    def __str__(self) -> str:
        return (
            f"mean -log(pass rate) {self.log_loss:.3f} (90 %: {self.low:.3f} to {self.high:.3f}) over "
            f"{len(self.problems)} problems; "
            f"the largest small model, held out, was missed by {self.held_out.error:+.1%}"
        )


def predict_capability(
    models: Sequence[Attempts],
    flops: float,
    *,
    problems: Sequence[str] | None = None,
    most: float = SMALL,
    floor: bool = False,
    seed: int = 0,
) -> CapabilityPrediction:
    """Fit -E_P[log pass rate] = alpha C^-k to the small ones of `models` (`small_models`) and predict it at `flops`.

    Of `problems` (all by default; a bucket, say) those are left that every small model solves, unless there is a floor.
    Raises CannotTell as `fit_power` and `held_out_error`, and where no problem is left.
    """
    small = small_models(models, flops, most=most)
    if not small:
        raise CannotTell(f"no model has at most {most:g} of the target's {flops:.3g} FLOPs: train smaller ones")
    wanted = _problems(small) if problems is None else list(problems)
    solved = set(wanted) if floor else set(solved_by_all(small))
    kept = [problem for problem in wanted if problem in solved]
    points = [Point(1.0, 1.0, model.flops, mean_log_loss(model, kept, floor=floor), str(model)) for model in small]
    target = Point(1.0, 1.0, flops, name=f"{flops:.3g} FLOPs")
    fit = fit_power(points, floor=False, seed=seed)
    low, high = fit.interval(target)
    held_out = held_out_error(points, "pure", seed=seed)
    return CapabilityPrediction(tuple(kept), fit.predict(target), low, high, held_out, fit)


def _problems(models: Sequence[Attempts]) -> list[str]:
    return sorted({problem for model in models for problem in model.passed})


def _check_models(models: Sequence[Attempts]) -> None:
    """All have attempted the same problems."""
    for model in models:
        for problem in _problems(models):
            model.rate(problem)


@dataclass(frozen=True)
class AccuracyFit:
    """accuracy = low + (high - low) / (1 + exp(k (loss - middle)))"""

    low: float
    """Of a model that knows nothing; at least what guessing gives."""
    high: float
    """Of a loss of 0; at most 1."""
    k: float
    middle: float
    error: float
    """Root of the mean squared error of the accuracies that were fitted."""

    def predict(self, loss: float) -> float:
        """Accuracy at a loss."""
        return float(self.low + (self.high - self.low) * _falling(np.array(loss), self.k, self.middle))


def fit_accuracy(
    losses: Sequence[float], accuracies: Sequence[float], *, chance: float, top: float = 1.0
) -> AccuracyFit:
    """Least squares for accuracy as a sigmoid of loss between `chance` and `top`.

    Evaluations in the course of training may be among the pairs (OLMo: all but the first tenth, means of five), and so
    may what a loss of 0 means, (0, 1). Given k and middle, low and high are a linear problem with bounds; k and middle
    are found on a grid that is refined, so that there is no start to be wrong about.
    Raises CannotTell for fewer than five pairs, and where accuracy does not leave chance.
    """
    x, y = np.array(losses, dtype=float), np.array(accuracies, dtype=float)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise MMGPTError(f"{len(x)} losses and {len(y)} accuracies: as many of both are needed, all of them finite")
    if not 0 <= chance < top <= 1:
        raise MMGPTError(f"chance and top must be 0 <= chance < top <= 1, not {chance} and {top}")
    if len(x) < 5:
        raise CannotTell(f"{len(x)} pairs of loss and accuracy are too few for a sigmoid: at least 5 are needed")
    if np.ptp(x) == 0 or y.max() < chance + 0.25 * (top - chance):
        raise CannotTell(
            f"accuracy gets to {y.max():.3g} with {chance:.3g} for guessing: at least a quarter of the way to {top:g} "
            "is needed to tell how it goes on"
        )
    width = float(np.ptp(x))
    steepness = (math.log(0.3 / width), math.log(100 / width))
    middles = (float(x.min()) - 1.5 * width, float(x.max()) + 0.5 * width)
    best = (math.inf, 0.0, 0.0, 0.0, 0.0)
    for _ in range(14):
        k, middle = (
            each.ravel() for each in np.meshgrid(np.exp(np.linspace(*steepness, 25)), np.linspace(*middles, 25))
        )
        low, high, error = _bounded_lines(_falling(x, k[:, None], middle[:, None]), y, chance, top)
        index = int(np.argmin(error))
        found = tuple(float(each[index]) for each in (error, k, middle, low, high))
        best = min(best, found)  # type: ignore[assignment]
        near_k, near_m = (steepness[1] - steepness[0]) / 8, (middles[1] - middles[0]) / 8
        steepness = (math.log(best[1]) - near_k, math.log(best[1]) + near_k)
        middles = (best[2] - near_m, best[2] + near_m)
    squares, steep, centre, bottom, ceiling = best
    return AccuracyFit(bottom, ceiling, steep, centre, math.sqrt(squares / len(x)))


def _falling(losses: Array, k: Array | float, middle: Array | float) -> Array:
    return 1 / (1 + np.exp(np.clip(k * (losses - middle), -500, 500)))


def _bounded_lines(s: Array, y: Array, chance: float, top: float) -> tuple[Array, Array, Array]:
    """low, high, squared error (G,) of y (n,) = low (1 - s) + high s with s (G, n), chance <= low <= high <= top."""
    tiny = 1e-300
    centred = s - s.mean(axis=1, keepdims=True)
    slope = (centred * y).sum(axis=1) / ((centred**2).sum(axis=1) + tiny)
    base = y.mean() - slope * s.mean(axis=1)
    free_fits = (base >= chance) & (slope >= 0) & (base + slope <= top)
    high = np.clip(chance + ((y - chance) * s).sum(axis=1) / ((s**2).sum(axis=1) + tiny), chance, top)
    low = np.clip(((y - top * s) * (1 - s)).sum(axis=1) / (((1 - s) ** 2).sum(axis=1) + tiny), chance, top)
    lows = np.stack([np.where(free_fits, base, chance), np.full(len(s), chance), low])
    highs = np.stack([np.where(free_fits, base + slope, chance), high, np.full(len(s), top)])
    errors = ((lows[:, :, None] + (highs - lows)[:, :, None] * s - y) ** 2).sum(axis=2)  # (3, G)
    best, index = errors.argmin(axis=0), np.arange(len(s))
    return lows[best, index], highs[best, index], errors[best, index]


@dataclass(frozen=True)
class Emergence:
    """Whether an ability comes suddenly over a ladder, and in which numbers."""

    verdict: Literal["emergent", "only exact match jumps", "smooth"]
    exact_match_jumps: tuple[int, ...]
    """Rungs, from 0 for the smallest, at which exact match has jumped since the one before."""
    likelihood_jumps: tuple[int, ...]


def emergence(
    flops: Sequence[float],
    exact_match: Sequence[float],
    log_likelihood: Sequence[float],
    *,
    problems: int,
    likelihood_error: float = 0.01,
) -> Emergence:
    """Compare exact match with the likelihood of the same answers (mean logarithm, a token) over the rungs of a ladder.

    A number jumps at a rung if more than half of its improvement over the whole ladder falls into that step while less
    than half of the ladder's log compute does, and if it rises there more than three times as fast, per decade, as in
    the fastest of the other steps, and by more than three standard errors: of `problems` answers for exact match, of
    `likelihood_error` nats a rung for the likelihood.
    "emergent" is said only where both jump at the same rung. Where exact match alone jumps, a threshold on a whole
    answer turned a smooth gain into a step (Schaeffer et al., arXiv 2304.15004). Raises CannotTell for fewer than five
    rungs.
    """
    c, em, ll = (np.array(each, dtype=float) for each in (flops, exact_match, log_likelihood))
    if not len(c) == len(em) == len(ll):
        raise MMGPTError(
            f"{len(c)} rungs with {len(em)} exact matches and {len(ll)} likelihoods: one of each is needed"
        )
    if len(c) < 5:
        raise CannotTell(f"{len(c)} rungs are too few to tell a jump from a slope: at least 5 are needed")
    if not (np.isfinite(c).all() and np.isfinite(em).all() and np.isfinite(ll).all()) or c.min() <= 0:
        raise CannotTell("a rung has no finite numbers: leave out runs that diverged")
    if em.min() < 0 or em.max() > 1 or ll.max() > 0:
        raise MMGPTError("exact match must be from 0 to 1, and the logarithm of a likelihood at most 0")
    if problems < 1:
        raise MMGPTError(f"problems must be at least 1, not {problems}")
    order = np.argsort(c)
    if (np.diff(c[order]) == 0).any():
        raise MMGPTError("two rungs have the same compute: give one number a rung")
    decades = np.diff(np.log10(c[order]))
    middle = (em[order][1:] + em[order][:-1]) / 2
    noise = 3 * np.sqrt(2 * middle * (1 - middle) / problems)
    exact = _jumps(em[order], decades, noise)
    likely = _jumps(ll[order], decades, np.full(len(decades), 3 * math.sqrt(2) * likelihood_error))
    both = set(exact) & set(likely)
    return Emergence("emergent" if both else "only exact match jumps" if exact else "smooth", exact, likely)


def _jumps(values: Array, decades: Array, noise: Array) -> tuple[int, ...]:
    """Rungs at which `values` (n,) have jumped; `decades` and `noise` are of the steps (n - 1,)."""
    steps = np.diff(values)
    rates = steps / decades
    jumps = []
    for index, step in enumerate(steps):
        others = np.delete(rates, index).max()
        large = step > max(values.max() - values[0], 0) / 2 and decades[index] < decades.sum() / 2
        if large and step > noise[index] and rates[index] > 3 * others:
            jumps.append(index + 1)
    return tuple(jumps)
