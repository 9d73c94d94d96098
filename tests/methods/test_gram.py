"""X^T X against float64, whatever the width, dtype and batch, and what is factored of it."""

import pytest
import torch

from lib.methods.gram import (
    PANEL,
    add_upper_gram_,
    cholesky,
    damped_cholesky_,
    mirror_,
    split,
)
from lib.util.errors import UserError


def inputs(tokens: int, width: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(width)).to(dtype)


@pytest.mark.parametrize("width", [1, 7, PANEL, PANEL + 1, 3 * PANEL - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_adds_up_over_batches(width, dtype):
    x = inputs(90, width, dtype)
    hessian = torch.ones(width, width)
    for batch in (*x.split(40), x[:0]):
        add_upper_gram_(hessian, batch)
    exact = 1 + x.double().T @ x.double()
    assert torch.allclose(hessian.triu().double(), exact.triu(), rtol=1e-5, atol=1e-4)
    mirror_(hessian)
    assert torch.equal(hessian, hessian.T)


def test_two_halves_are_as_good_as_float32():
    """What tensor cores would be given, multiplied in float64: the split alone loses digits."""
    x = inputs(400, 64, torch.bfloat16)
    drift = (x.float() + 0.02 * inputs(400, 65)[:, :64]).bfloat16().float() - x.float()
    exact = drift.double().T @ x.double()
    parts = split(drift)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    two = sum(part.double().T @ x.double() for part in parts)
    assert (two - exact).norm() / exact.norm() < 1e-5
    lag = 1000 * inputs(400, 32)  # float32 with all its digits
    assert ((lag - sum(part.float() for part in split(lag))).abs() <= 2**-16 * lag.abs()).all()


def test_it_rises_tenfold_with_a_warning_and_not_for_ever():
    with pytest.warns(UserWarning, match="damping 0.01, which is raised"):
        factor = damped_cholesky_(-0.05 * torch.eye(3), 0.01, torch.tensor(1.0))
    assert torch.allclose(factor @ factor.T, 0.05 * torch.eye(3))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="with damping 10. Use more"):
        damped_cholesky_(-11 * torch.eye(3), 0.01)


@pytest.mark.parametrize("wrong", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(3, 3), (4, 1)])
def test_what_is_not_positive_definite_has_none(wrong, place):
    hessian = torch.eye(5)
    hessian[place] = wrong if wrong or place == (3, 3) else 2.0
    with pytest.raises(UserError, match="cannot be factored"):
        cholesky(hessian)
