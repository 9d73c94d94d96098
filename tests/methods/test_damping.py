"""Damping that rises tenfold until a matrix can be factored, and a Cholesky that says when not."""

import pytest
import torch

from lib.methods.damping import cholesky, rising
from lib.util.errors import UserError


def test_it_rises_tenfold_with_a_warning_and_not_for_ever():
    seen = []
    with pytest.warns(UserWarning) as warned, pytest.raises(UserError, match="even with .* 10;"):
        for damping in rising(0.01):
            assert len(warned) == len(seen)  # none where the first is enough
            seen.append(damping)
    assert seen == pytest.approx([0.01, 0.1, 1, 10])


def test_a_factor_gives_the_matrix_back():
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = x.T @ x
    factor = cholesky(hessian.tril())  # the upper triangle is not read
    assert torch.equal(factor, factor.tril())
    assert torch.allclose(factor @ factor.T, hessian)


@pytest.mark.parametrize("wrong", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(3, 3), (4, 1)])
def test_what_is_not_positive_definite_has_none(wrong, place):
    hessian = torch.eye(5)
    hessian[place] = wrong if wrong or place == (3, 3) else 2.0
    assert cholesky(hessian) is None
