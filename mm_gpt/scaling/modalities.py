"""Scaling laws by modality: text and captions, say, each with a loss of its own, and what the one teaches the other.

`L_m(N, D_m, D_other) = A / N^alpha + B / (D_m + w D_other)^beta + E`: a token of the other kind is worth w of them.
Fitted as the laws of one modality (`laws`), with w from a grid that is refined, since the other coefficients are
found well for any w. Only runs that mix the kinds in different ways can tell w.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.scaling.forms import Scale, to_theta
from mm_gpt.scaling.laws import DELTA, Fit, fit_parametric
from mm_gpt.scaling.points import CannotTell, Point
from mm_gpt.scaling.solver import Array, log_law, minimise

WORTHS = np.concatenate([[0.0], np.geomspace(1e-4, 100, 19)])
"""Where w is looked for: three values a decade, refined around the best."""
RESAMPLES = 100
NOTHING = 0.01
"""A worth that may be this little or less, and a whole token or more, is not known."""


@dataclass(frozen=True)
class MixedPoint:
    """A finished run on several modalities. Keys of `tokens` and `losses` are their names."""

    parameters: float
    tokens: Mapping[str, float]
    losses: Mapping[str, float]
    """Of held-out data of each modality, in nats or bits."""
    flops: float
    name: str = ""

    def of(self, modality: str, worth: float) -> Point:
        """The run as one modality sees it, with its own tokens and `worth` of each other one."""
        for values in (self.tokens, self.losses):
            if modality not in values:
                raise MMGPTError(f"run {self.name or self.parameters}: {unknown_name('modality', modality, values)}")
        own = self.tokens[modality]
        tokens = own + worth * (sum(self.tokens.values()) - own)
        return Point(self.parameters, tokens, self.flops, self.losses[modality], self.name)


@dataclass(frozen=True)
class ModalityFit:
    """The law of one modality's loss."""

    modality: str
    worth: float
    """w: how many of its own tokens one token of another modality replaces."""
    worth_low: float
    """Of the interval of 90 %, by parametric bootstrap."""
    worth_high: float
    fit: Fit
    """L(N, D_m + w D_other)"""

    def predict(self, target: MixedPoint) -> float:
        """Loss of this modality in a run; its `losses` are not read. Raises CannotTell as `Fit.predict`."""
        blank = dataclasses.replace(target, losses=dict.fromkeys(target.tokens, float("nan")))
        return self.fit.predict(blank.of(self.modality, self.worth))


def fit_modalities(points: Sequence[MixedPoint], *, seed: int = 0) -> dict[str, ModalityFit]:
    """The law of each modality that all runs have a loss for.

    Raises CannotTell where `fit_parametric` does, where all runs mix the modalities in the same way, and where a token
    of another kind may be worth nothing as well as a whole one.
    """
    if not points:
        raise CannotTell("no runs: nothing to fit")
    names = set.intersection(*(set(point.losses) & set(point.tokens) for point in points))
    if not names:
        raise MMGPTError("the runs have no modality in common that has tokens and a loss in each")
    return {name: _fit_modality(points, name, seed) for name in sorted(names)}


def _fit_modality(points: Sequence[MixedPoint], modality: str, seed: int) -> ModalityFit:
    begin = fit_parametric([point.of(modality, 1.0) for point in points], seed=seed)
    mixture = _Mixture.of(points, modality)
    shares = mixture.own / (mixture.own + mixture.other)
    if np.ptp(shares) < 0.01:
        raise CannotTell(
            f"{modality}: all runs have the same share of its tokens ({shares[0]:.0%}), so that what other tokens are "
            "worth cannot be told: vary the mixture"
        )
    theta = mixture.scale.standard(to_theta("parametric", begin.coefficients))
    (worth,), thetas = mixture.best_worths(mixture.losses[None], theta[None], rounds=10)
    fit = fit_parametric([point.of(modality, float(worth)) for point in points], seed=seed)
    free = len(mixture.own) - 6  # five coefficients and w
    if free < 1:
        raise CannotTell(f"{modality}: {len(mixture.own)} runs for 6 coefficients leave none to tell the noise from")
    law = log_law(thetas, mixture.logs(np.array([worth])))  # (1, n)
    rng = np.random.default_rng(seed)
    noise = np.sqrt(((law - mixture.losses) ** 2).sum() / rng.chisquare(free, (RESAMPLES, 1)))
    resampled = law + noise * rng.standard_normal((RESAMPLES, len(mixture.own)))
    worths, _ = mixture.best_worths(resampled, np.repeat(thetas, RESAMPLES, axis=0), rounds=5)
    low, high = np.quantile(worths, [0.05, 0.95])
    if low <= NOTHING and high >= 1:
        raise CannotTell(
            f"{modality}: a token of another kind may be worth {low:.2g} to {high:.2g} of its own (90 %): "
            "add runs with other mixtures"
        )
    return ModalityFit(modality, float(worth), float(low), float(high), fit)


@dataclass(frozen=True)
class _Mixture:
    """The runs as one modality sees them, for many worths at once."""

    parameters: Array
    """(n,) logarithms"""
    own: Array
    """(n,) tokens"""
    other: Array
    """(n,) tokens"""
    losses: Array
    """(n,) logarithms"""
    scale: Scale

    @classmethod
    def of(cls, points: Sequence[MixedPoint], modality: str) -> "_Mixture":
        rows = {
            (p.parameters, p.tokens[modality], sum(p.tokens.values()) - p.tokens[modality], p.losses[modality])
            for p in points
        }
        parameters, own, other, losses = np.array(sorted(rows), dtype=float).T
        x = np.stack([np.log(parameters), np.log(own + other)], axis=1)
        return cls(np.log(parameters), own, other, np.log(losses), Scale.of(x))

    def logs(self, worths: Array) -> Array:
        """(B,) -> scaled logarithms (B, n, 2)"""
        tokens = np.log(self.own + worths[:, None] * self.other)
        return self.scale.logs(np.stack([np.broadcast_to(self.parameters, tokens.shape), tokens], axis=2))

    def best_worths(self, losses: Array, theta: Array, rounds: int) -> tuple[Array, Array]:
        """The w with the lowest objective for each row of losses (B, n), from `theta` (B, P): (B,) and laws (B, P)."""
        rows = len(losses)
        grid = np.broadcast_to(
            WORTHS if self.own.min() > 0 else WORTHS[1:], (rows, len(WORTHS) - (self.own.min() <= 0))
        )
        index = np.arange(rows)
        for _ in range(rounds):
            width = grid.shape[1]
            x = self.logs(grid.reshape(-1))
            found = minimise(np.repeat(theta, width, axis=0), x, np.repeat(losses, width, axis=0), delta=DELTA)
            best = found.objective.reshape(rows, width).argmin(axis=1)
            theta = found.theta.reshape(rows, width, -1)[index, best]
            worths = grid[index, best]
            low, high = grid[index, np.maximum(best - 1, 0)], grid[index, np.minimum(best + 1, width - 1)]
            grid = np.linspace(low, high, 9, axis=1)
        return worths, theta
