"""Intervals and McNemar's test, against sums over every outcome."""

from __future__ import annotations

from itertools import product

import pytest

from lib.quality.statistics import mcnemar, wilson_interval


@pytest.mark.parametrize("lost", range(6))
@pytest.mark.parametrize("gained", range(6))
def test_mcnemar_counts_every_outcome_of_the_coins(lost: int, gained: int) -> None:
    flips = lost + gained
    uneven = abs(lost - gained)
    tosses = [sum(coins) for coins in product((0, 1), repeat=flips)]
    expected = sum(abs(flips - 2 * heads) >= uneven for heads in tosses) / len(tosses)
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_mcnemar_of_many_flips() -> None:
    assert mcnemar(60, 40) == pytest.approx(0.0568879, rel=1e-5)  # as binom.test(40, 100) in R
    assert 0 < mcnemar(1000, 500) < 1e-30
    assert mcnemar(2000, 2000) == 1.0


def test_wilson_bounds_solve_its_equation() -> None:
    """The bounds are the shares p from which the measured one is 1.96 deviations away."""
    for successes, count in ((0, 10), (3, 10), (150, 300), (299, 300)):
        low, high = wilson_interval(successes, count)
        assert 0 <= low <= successes / count <= high <= 1
        for bound in {low, high} - {0.0, 1.0}:
            deviation = (bound * (1 - bound) / count) ** 0.5
            assert abs(successes / count - bound) == pytest.approx(1.959964 * deviation, rel=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)
