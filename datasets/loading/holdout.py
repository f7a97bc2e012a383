"""Which samples are kept from training to validate on."""

from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

Number = int | np.ndarray


def held_out(number: Number, share: float) -> Any:
    """Whether sample `number`, from 0, is one of the `share` that is held out: a function of these two alone.

    Of an array of numbers, an array of answers.

    Held out are the numbers at which ⌈share · n⌉ grows: of the first N samples ⌈share · N⌉, number 0 among them, and
    evenly spread, so that files in any order give both parts the same mix. A share of 1/k is every k-th.
    """
    above, below = _ratio(share)
    before, after = (-(-n * above // below) for n in (number, number + 1))
    return after > before


@lru_cache
def _ratio(share: float) -> tuple[int, int]:
    """The decimal number that was written: 0.1 in binary is a little more, and 70 * 0.1 is above 7."""
    return Fraction(str(share)).as_integer_ratio()
