"""Confidence intervals: percentile bootstrap (Efron 1979) and Wilson's interval for proportions (Wilson 1927)."""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

_CHUNK = 2_000_000  # indices drawn at a time: 16 MB, whatever the number of items


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a score of the whole set of `n` items.

    `statistic` gets item indices (R, n), R resamples drawn with replacement, and returns one score for each, (R,).
    It is called with a few resamples at a time, so memory stays flat. Raises ValueError when `n`
    is 0 or `confidence` is not between 0 and 1.
    """
    if n < 1:
        raise ValueError("a bootstrap needs at least one item")
    _check_confidence(confidence)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    scores = [
        statistic(generator.integers(n, size=(min(rows, resamples - start), n))) for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(scores), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion; sensible for small `n` and for 0 or `n` successes.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials make no proportion")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - margin), min(1.0, centre + margin)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
