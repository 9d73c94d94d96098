"""Damping that rises tenfold until a matrix can be factored, and a Cholesky that says when not."""

import pytest
import torch

from lib.methods.damping import cholesky, damped_cholesky_
from lib.util.errors import UserError


def test_it_rises_tenfold_with_a_warning_and_not_for_ever():
    with pytest.warns(UserWarning, match="damping 0.01; it is raised"):
        factor = damped_cholesky_(-0.05 * torch.eye(3), 0.01, torch.tensor(1.0))
    assert torch.allclose(factor @ factor.T, 0.05 * torch.eye(3))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="with damping 10; use more"):
        damped_cholesky_(-11 * torch.eye(3), 0.01)


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
    with pytest.raises(UserError, match="can't be factored"):
        cholesky(hessian)
