"""Shares of samples that are held out."""

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from mm_gpt.datasets.loading.holdout import held_out


@given(percent=st.integers(0, 99), count=st.integers(0, 400))
def test_a_holdout_is_the_share_that_was_asked_for(percent: int, count: int) -> None:
    """Of every beginning exactly that share, rounded up: 0.4 held out a half, and so did 0.5."""
    share = percent / 100
    chosen = [number for number in range(count) if held_out(number, share)]
    assert len(chosen) == math.ceil(Fraction(percent, 100) * count)


@given(percent=st.integers(1, 99), start=st.integers(0, 10_000), length=st.integers(1, 300))
def test_a_holdout_is_spread_evenly(percent: int, start: int, length: int) -> None:
    """Any stretch holds its share, to one sample: files sorted by source or label split alike."""
    found = sum(held_out(number, percent / 100) for number in range(start, start + length))
    assert abs(found - percent / 100 * length) < 1


def test_every_tenth() -> None:
    assert [number for number in range(200) if held_out(number, 0.1)] == list(range(0, 200, 10))
    assert [number for number in range(10) if held_out(number, 0.4)] == [0, 2, 5, 7]
    assert not any(held_out(number, 0.0) for number in range(50))
