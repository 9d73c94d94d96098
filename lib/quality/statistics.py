"""Confidence intervals of shares, and a test of whether two models differ."""

from __future__ import annotations

import math

Z = 1.959964  # of the normal distribution: 95% lie within so many standard deviations


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share; (0, 1) for a count of 0."""
    if not count:
        return 0.0, 1.0
    share, square = successes / count, Z * Z
    centre = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half = Z * spread / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    `lost` questions only the first model answers right, `gained` only the second. If both are
    equally good, each of these is the toss of a coin.
    """
    flips, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(flips, wins) for wins in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**flips))
