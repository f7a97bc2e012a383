"""Packing of examples into rows: nothing lost, nothing twice, nothing too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_gpt.datasets.loading.packing import pack
from mm_gpt.errors import ContextOverflowError


@given(st.lists(st.integers(0, 64)), st.integers(64, 200), st.integers(1, 50))
def test_every_example_once_and_no_row_too_long(lengths: list[int], row_length: int, window: int) -> None:
    rows = pack(lengths, row_length, window=window)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(sum(lengths[i] for i in row) <= row_length for row in rows)
    assert pack(lengths, row_length, window=window) == rows


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(1, 20))
def test_rows_keep_to_their_window(lengths: list[int], window: int) -> None:
    """Packing must not undo the shuffle: an example stays among its neighbours."""
    for row in pack(lengths, 64, window=window):
        assert len({index // window for index in row}) == 1


@given(st.lists(st.integers(1, 64), min_size=1))
def test_at_most_one_row_of_a_window_is_half_empty(lengths: list[int]) -> None:
    """First fit: two rows that fit into one would have been one."""
    fills = sorted(sum(lengths[i] for i in row) for row in pack(lengths, 64))
    assert len(fills) < 2 or fills[0] + fills[1] > 64


def test_golden() -> None:
    assert pack([3, 7, 5, 2, 6], 10) == [[1, 0], [4, 3], [2]]
    assert pack([3, 7, 5, 2, 6], 10, window=2) == [[1, 0], [2, 3], [4]]
    assert pack([], 10) == []


def test_too_long_is_named() -> None:
    with pytest.raises(ContextOverflowError, match="example 2 has 11 tokens; a row holds 10"):
        pack([1, 10, 11], 10)


def test_little_is_wasted() -> None:
    """Next-fit would lose 12 % of the positions of such a mix."""
    lengths = [20 + (i * 7919) % 180 for i in range(2000)]
    rows = pack(lengths, 512)
    assert sum(lengths) / (512 * len(rows)) > 0.98
