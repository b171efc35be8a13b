"""Intervals for shares of right answers. Pure arithmetic; the level is 95 % throughout."""

from math import sqrt
from typing import NamedTuple

Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """A share or a difference of two, with its 95 % interval."""

    estimate: float
    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """Score interval for a share, without continuity correction.

    Source: Wilson 1927, JASA 22:209; Newcombe 1998, Stat. Med. 17:857, method 3.

    Raises:
        ValueError: not 0 <= right <= total with total > 0.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} of {total} is no share")
    share, z2 = right / total, Z_95**2
    middle = share + z2 / (2 * total)
    spread = Z_95 * sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    # At the ends the bound is exact; rounding would put it beside the estimate.
    low = 0.0 if right == 0 else (middle - spread) / scale
    high = 1.0 if right == total else (middle + spread) / scale
    return Interval(share, low, high)


def paired_difference(first: list[bool], second: list[bool]) -> Interval:
    """The share of right answers of `first` less that of `second` on the same items, in the same order.

    Source: Newcombe 1998, Stat. Med. 17:2635, method 10: score intervals of both shares, combined with the correlation phi,
    which is corrected for continuity where it is positive.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be paired")
    pairs = list(zip(first, second, strict=True))
    return newcombe_10(*(pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))))


def newcombe_10(both: int, first_only: int, second_only: int, neither: int) -> Interval:
    """`paired_difference` from the four counts of the items."""
    total = both + first_only + second_only + neither
    p1, low1, high1 = wilson(both + first_only, total)
    p2, low2, high2 = wilson(both + second_only, total)
    phi = _phi(both, first_only, second_only, neither)
    down = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    difference = p1 - p2
    return Interval(difference, difference - sqrt(max(down, 0.0)), difference + sqrt(max(up, 0.0)))


def _phi(both: int, first_only: int, second_only: int, neither: int) -> float:
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    if margins == 0:
        return 0.0
    product = both * neither - first_only * second_only
    if product > 0:
        product_corrected = max(product - (both + first_only + second_only + neither) / 2, 0.0)
        return product_corrected / sqrt(margins)
    return product / sqrt(margins)
