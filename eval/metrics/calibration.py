"""Whether a model's confidence is what it is worth: the expected calibration error (Naeini et al. 2015, 1706.04599)."""

from collections.abc import Sequence

import numpy as np

BINS = 10


def calibration_bins(
    confidences: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray, *, bins: int = BINS
) -> list[tuple[float, float, int]]:
    """Of `bins` equal parts of 0..1, those that are not empty: mean confidence, accuracy, number of answers.

    The parts are fixed and not fitted to the answers, so that two models are held against the same ones; 1 belongs to
    the last. Raises ValueError for no answers, other lengths, and confidences that are no probabilities.
    """
    sure, is_right = np.asarray(confidences, dtype=float), np.asarray(right, dtype=float)
    if sure.ndim != 1 or sure.shape != is_right.shape or not len(sure) or bins < 1:
        raise ValueError(f"{sure.shape} confidences and {is_right.shape} answers in {bins} bins make no calibration")
    if not ((sure >= 0) & (sure <= 1)).all():  # NaN is neither
        raise ValueError("a confidence is not a number from 0 to 1")
    places = np.minimum((sure * bins).astype(int), bins - 1)
    return [
        (float(sure[own].mean()), float(is_right[own].mean()), int(own.sum()))
        for own in (places == number for number in range(bins))
        if own.any()
    ]


def expected_calibration_error(
    confidences: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray, *, bins: int = BINS
) -> float:
    """Σ (n_b / n) |accuracy_b - confidence_b|. Raises what `calibration_bins` does."""
    found = calibration_bins(confidences, right, bins=bins)
    return sum(n * abs(accuracy - sure) for sure, accuracy, n in found) / sum(n for _, _, n in found)
