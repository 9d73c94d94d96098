"""Numbers that papers, the published code and the README state, written out once more.

Elsewhere tests import these names, so that a number that changes by mistake would judge itself.
"""

from __future__ import annotations

from importlib import import_module

import pytest

STATED = {
    # OWL, Yin et al. 2023, section 4: M = 5 and lambda = 0.08, so blocks differ by 2 lambda at most
    "lib.pruning.owl:OUTLIER": 5,
    "lib.methods.sparsity:ALLOCATION_SPAN": 0.16,
    # the published code of Wanda's variant
    "lib.methods.wanda:VARIANT_TOLERANCE": 1e-3,
    # the README on --bos auto
    "lib.eval:COLLAPSE": 1.5,
    # tests/bench/README.md: how costs grow, how far shares of zeros differ, from how many windows
    "lib.pruning.by_error:GROWTH": 2.0,
    "lib.pruning.by_error:BELOW": 0.4,
    "lib.pruning.by_error:LEAST_KEPT": 1 / 3,
    "lib.pruning.by_error:WINDOWS": 8,
    "lib.methods.admm:LEAST_COST": 0.01,
    "lib.methods.least_squares:FLOOR": 0.01,
    "lib.methods.admm:STIFFENING": 2.5,
    # tests/bench/README.md: recovery
    "lib.recover:RATE": 0.6,
    "lib.recover:CROSS_ENTROPY": 0.2,
    "lib.recover:BETAS": (0.9, 0.95),
    "lib.recover:GRADIENT_NORM": 1.0,
    "lib.recover:WARM_UP": 0.1,
    "lib.recover:LAST_RATE": 0.05,
    "lib.recover:MEASURED": 10,
}


@pytest.mark.parametrize("place", STATED)
def test_a_stated_number_is_the_number_in_use(place: str) -> None:
    module, name = place.split(":")
    assert getattr(import_module(module), name) == STATED[place]
