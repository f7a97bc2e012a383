"""The order of training: everything once an epoch, shares as asked for, the same rows however they are reached."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.loading.plan import Cursor, Plan, Row, SourceWeight, language_shares, shuffled
from mm_gpt.errors import ConfigError, MMGPTError

Unit = tuple[int, ...]


class Numbers:
    """A source of units 0 ... n-1; unit u has the documents (u, 0), (u, 1), ... of these lengths."""

    def __init__(self, lengths: list[list[int]], name: str = "numbers"):
        self.lengths, self.name = lengths, name
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> float:
        return float(sum(map(sum, self.lengths)))

    def units(self, number: int, start: int, seed: int) -> Iterator[list[tuple[Unit, int]]]:
        for unit in shuffled(len(self), seed, self.name, number)[start:]:
            self.drawn += 1
            yield [((unit, part), length) for part, length in enumerate(self.lengths[unit])]


def singles(count: int, length: int, name: str = "numbers") -> Numbers:
    return Numbers([[length]] * count, name)


def epochs(plan: Plan, count: int) -> list[list[Row]]:
    found: list[list[Row]] = [[] for _ in range(count)]
    for row, cursor in plan.rows():
        if cursor.epoch >= count:
            return found
        found[cursor.epoch].append(row)
    raise AssertionError("rows have an end")


def units_of(rows: list[Row], source: int) -> Counter[Unit]:
    return Counter(item.unit for row in rows for item in row if item.source == source)


def share_of(rows: list[Row], source: int) -> float:
    tokens = Counter[int]()
    for row in rows:
        for item in row:
            tokens[item.source] += item.tokens
    return tokens[source] / tokens.total()


SOURCES = st.lists(st.lists(st.lists(st.integers(1, 30), max_size=3), min_size=1, max_size=25), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_each_unit_once_an_epoch(lengths: list[list[list[int]]], seed: int, window_rows: int, weighted: bool) -> None:
    """Stops: samples lost or doubled at the ends of windows, epochs and passes, with units of no or many documents."""
    if not any(any(unit) for source in lengths for unit in source):
        return
    sources = [Numbers(source, f"s{n}") for n, source in enumerate(lengths)]
    shares = [SourceWeight(weight=1.0 + n) if weighted else SourceWeight() for n in range(len(sources))]
    plan = Plan(sources, shares, row_length=20, seed=seed, window_rows=window_rows)
    for rows in epochs(plan, 3):
        for number, source in enumerate(lengths):
            every = [(unit, part) for unit, parts in enumerate(source) for part in range(len(parts))]
            assert units_of(rows, number) == Counter(every)
        for row in rows:
            assert sum(item.tokens for item in row) <= 20 or len(row) == 1  # an item longer than a row has its own


def test_fractions_of_an_epoch() -> None:
    """`repeat` 0.3: nothing comes again before everything has come; 2.5: two or three times."""
    sources = [singles(10, 5, "a"), singles(4, 5, "b")]
    plan = Plan(sources, [SourceWeight(repeat=0.3), SourceWeight(repeat=2.5)], row_length=20)
    per_epoch = epochs(plan, 10)
    assert [units_of(rows, 0).total() for rows in per_epoch] == [3] * 10
    assert [units_of(rows, 1).total() for rows in per_epoch] == [10] * 10
    assert units_of([row for rows in per_epoch for row in rows], 0) == Counter({(n, 0): 3 for n in range(10)})
    for rows in per_epoch:
        assert set(units_of(rows, 1).values()) <= {2, 3}
    assert units_of([row for rows in per_epoch[:2] for row in rows], 1) == Counter({(n, 0): 5 for n in range(4)})


def test_a_share_so_small_that_epochs_go_by() -> None:
    """Stops: `repeat` 0.1 of three samples taken for a source of nothing."""
    plan = Plan([singles(3, 5)], [SourceWeight(repeat=0.1)], row_length=20)
    rows = [row for row, _ in itertools.islice(plan.rows(), 6)]
    assert units_of(rows, 0) == Counter({(n, 0): 2 for n in range(3)})


def test_repeat_zero_leaves_a_source_out() -> None:
    plan = Plan([singles(3, 5, "a"), singles(3, 5, "b")], [SourceWeight(repeat=0), SourceWeight()], row_length=20)
    assert not units_of([row for rows in epochs(plan, 2) for row in rows], 0)


def test_sources_of_nothing() -> None:
    """Stops: a search without end."""
    with pytest.raises(MMGPTError, match="nothing to train on"):
        Plan([Numbers([])], row_length=20)
    with pytest.raises(MMGPTError, match="nothing to train on"):
        Plan([singles(3, 5)], [SourceWeight(repeat=0)], row_length=20)
    for wait in (True, False):
        with pytest.raises(MMGPTError, match="nothing to train on"):
            next(Plan([Numbers([[], [], []])], row_length=20, wait=wait).rows())
        plan = Plan([Numbers([[]] * 3, "empty"), singles(3, 5)], row_length=20, wait=wait)
        assert next(plan.rows())


@pytest.mark.parametrize(
    "share",
    [
        *(SourceWeight(repeat=value) for value in (-1, float("nan"), float("inf"))),
        *(SourceWeight(weight=value) for value in (0, -1, float("nan"))),
    ],
)
def test_impossible_shares(share: SourceWeight) -> None:
    with pytest.raises(ConfigError, match=r"numbers: (repeat|weight) must be"):
        Plan([singles(3, 5)], [share], row_length=20)


def test_weights_or_an_exponent() -> None:
    with pytest.raises(ConfigError, match="not both"):
        Plan([singles(3, 5)], [SourceWeight(weight=1)], row_length=20, exponent=0.7)


def test_shares_of_tokens_hold_while_sources_last() -> None:
    """Whatever the lengths of documents: 3 to 1 in tokens, not in documents, in the first part of an epoch."""
    long, short = singles(300, 20, "long"), singles(3000, 2, "short")
    plan = Plan([long, short], [SourceWeight(weight=3), SourceWeight(weight=1)], row_length=40, window_rows=10)
    rows = [row for row, _ in itertools.islice(plan.rows(), 100)]
    assert share_of(rows, 0) == pytest.approx(0.75, abs=0.01)
    for start in range(0, 100, 10):  # all along, not one source after the other
        assert share_of(rows[start : start + 10], 0) == pytest.approx(0.75, abs=0.06)
    (epoch,) = epochs(plan, 1)
    assert share_of(epoch, 0) == pytest.approx(0.5)  # in the end everything has come once


def test_by_default_all_sources_last_the_epoch() -> None:
    """Stops: a small source that is used up at the start of each epoch."""
    plan = Plan([singles(1000, 5, "a"), singles(100, 5, "b")], row_length=25, window_rows=10)
    (rows,) = epochs(plan, 1)
    for start in range(0, len(rows) - 20, 20):
        assert share_of(rows[start : start + 20], 1) == pytest.approx(1 / 11, abs=0.03)


def test_xlm_sampling_golden() -> None:
    """1901.07291: q_i in proportion to p_i ** 0.7, for three languages of 90, 9 and 1 %."""
    shares = language_shares([0.9, 0.09, 0.01], 0.7)
    assert shares == pytest.approx([0.8049, 0.1606, 0.0345], abs=5e-5)
    assert language_shares([900, 90, 10], 0.7) == pytest.approx(shares)
    assert language_shares([3, 1], 1.0) == pytest.approx([0.75, 0.25])
    assert language_shares([3, 1, 0], 0.0) == pytest.approx([0.5, 0.5, 0.0])
    sources = [singles(9000, 5, "en"), singles(900, 5, "fr"), singles(100, 5, "ur")]
    plan = Plan(sources, row_length=50, window_rows=10, exponent=0.7, wait=False)
    rows = [row for row, _ in itertools.islice(plan.rows(), 1000)]
    for number, share in enumerate(shares):
        assert share_of(rows, number) == pytest.approx(share, abs=0.005)


def test_without_waiting_shares_hold_to_the_end() -> None:
    """A small source begins again while the large one still has news; each of its passes shows everything once."""
    plan = Plan(
        [singles(1000, 5, "large"), singles(10, 5, "small")],
        [SourceWeight(weight=1), SourceWeight(weight=1)],
        row_length=25,
        window_rows=10,
        wait=False,
    )
    rows = [row for row, _ in itertools.islice(plan.rows(), 400)]
    for start in range(0, 400, 40):
        assert share_of(rows[start : start + 40], 0) == pytest.approx(0.5, abs=0.02)
    seen = units_of(rows, 1)
    assert max(seen.values()) - min(seen.values()) <= 5  # the window's units, in shuffled rows
    assert units_of(rows, 0).most_common(1)[0][1] == 1


def test_a_cursor_continues_with_the_next_row() -> None:
    """From JSON, at every window, over the ends of epochs."""
    generator = random.Random(0)
    lengths = [[[generator.randint(1, 15)] for _ in range(n)] for n in (40, 13)]

    def plan() -> Plan:
        sources = [Numbers(source, f"s{n}") for n, source in enumerate(lengths)]
        return Plan(sources, [SourceWeight(), SourceWeight(repeat=1.5)], row_length=20, seed=3, window_rows=4)

    rows = list(itertools.islice(plan().rows(), 120))
    assert rows[-1][1].epoch > 2
    for number, (_, cursor) in enumerate(rows):
        if number and cursor.window == rows[number - 1][1].window:
            continue
        again = Cursor(**json.loads(json.dumps(asdict(cursor))))
        assert again == cursor
        assert cursor.row == number
        assert list(itertools.islice(plan().rows(again), 120 - number)) == rows[number:]
        assert again == cursor  # as it was


def test_the_seed_decides() -> None:
    def rows(seed: int) -> list[Row]:
        return [row for row, _ in itertools.islice(Plan([singles(50, 7)], row_length=20, seed=seed).rows(), 40)]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    one, other = epochs(Plan([singles(50, 7)], row_length=20), 2)
    assert one != other  # each epoch in an order of its own


def test_sources_are_drawn_a_window_at_a_time() -> None:
    """Stops: an epoch in memory before its first row."""
    source = singles(1_000_000, 5)
    source.units = lambda number, start, seed: (  # type: ignore[method-assign]
        [((unit, 0), 5)] for unit in count_draws(source, start)
    )
    rows = Plan([source], row_length=20, window_rows=16).rows()
    for _ in range(32):
        next(rows)
    assert source.drawn <= 3 * 16 * 4


def count_draws(source: Numbers, start: int) -> Iterator[int]:
    for unit in range(start, len(source)):
        source.drawn += 1
        yield unit


def test_rows_are_full_and_mixed() -> None:
    """97 % of positions hold tokens, and no window begins with its longest documents."""
    generator = random.Random(1)
    source = Numbers([[min(512, int(generator.lognormvariate(4.5, 1)) + 1)] for _ in range(6000)])
    (rows,) = epochs(Plan([source], row_length=512, window_rows=64), 1)
    assert source.tokens / (512 * len(rows)) > 0.97
    longest = [row[0].tokens for row in rows[:64]]
    assert longest != sorted(longest, reverse=True)


def test_a_cursor_after_thousands_of_passes() -> None:
    """Stops: a place in the data that grows with the run, or is lost in it."""
    plan = Plan([singles(7, 20)], row_length=20, window_rows=2)
    rows = [row for row, _ in itertools.islice(plan.rows(), 7_000)]
    _, far = next(itertools.islice(plan.rows(), 6_000, None))
    assert [row for row, _ in itertools.islice(plan.rows(far), 7_000 - far.row)] == rows[far.row :]
    assert len(json.dumps(asdict(far))) < 200
