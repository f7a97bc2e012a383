"""Which samples are kept from training, to validate on."""

import numpy as np


def held_out(numbers: np.ndarray, share: float) -> np.ndarray:
    """Whether each of the samples `numbers` (N,) is held out: bool (N,). Of the first n, `share` of them rounded up.

    It follows from the number alone, so that a run that goes on never trains on what it validated with.
    """
    return np.ceil((numbers + 1) * share) > np.ceil(numbers * share)
