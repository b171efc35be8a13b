"""Intervals against published figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from campaigns.evaluation.statistics import newcombe_10, paired_difference, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(right: int, total: int, low: float, high: float) -> None:
    interval = wilson(right, total)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert interval.estimate == right / total


@pytest.mark.parametrize(
    ("table", "estimate", "low", "high"),
    [  # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33:2850: Bentur et al. 2009 and Cavo et al. 2012
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),
        ((59, 6, 16, 80), -0.062, -0.119, -0.005),
    ],
)
def test_the_paired_difference_gives_the_published_intervals(
    table: tuple[int, int, int, int], estimate: float, low: float, high: float
) -> None:
    interval = newcombe_10(*table)
    assert tuple(round(figure, 3) for figure in interval) == (estimate, low, high)


def test_a_pairing_is_counted_item_by_item() -> None:
    first = [True] * 1 + [True] * 1 + [False] * 7 + [False] * 12
    second = [True] * 1 + [False] * 1 + [True] * 7 + [False] * 12
    assert paired_difference(first, second) == newcombe_10(1, 1, 7, 12)


COUNTS = st.integers(0, 80)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_the_interval_holds_its_estimate_and_turns_with_its_sides(both: int, first: int, second: int, neither: int) -> None:
    if both + first + second + neither == 0:
        return
    interval = newcombe_10(both, first, second, neither)
    assert -1 - 1e-9 <= interval.low <= interval.estimate <= interval.high <= 1 + 1e-9
    turned = newcombe_10(both, second, first, neither)
    assert turned == pytest.approx((-interval.estimate, -interval.high, -interval.low))


@given(st.integers(0, 200), st.integers(1, 200))
def test_a_share_lies_in_its_interval(right: int, more: int) -> None:
    interval = wilson(right, right + more)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


def test_what_cannot_be_computed_is_refused() -> None:
    for right, total in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError):
            wilson(right, total)
    with pytest.raises(ValueError):
        paired_difference([True], [])
    with pytest.raises(ValueError):
        paired_difference([], [])
