"""X^T X against float64, whatever the width, the dtype and the way the tokens arrive."""

import pytest
import torch

from lib.methods.gram import PANEL, add_cross_, add_upper_gram_, mirror_, split


def add_gram_(hessian: torch.Tensor, x: torch.Tensor) -> None:
    add_upper_gram_(hessian, x)
    mirror_(hessian)


def inputs(tokens: int, width: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(width)).to(dtype)


@pytest.mark.parametrize("width", [1, 7, PANEL, PANEL + 1, 3 * PANEL - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_is_exact(width, dtype):
    x = inputs(50, width, dtype)
    hessian = torch.zeros(width, width)
    add_gram_(hessian, x)
    exact = x.double().T @ x.double()
    assert torch.allclose(hessian.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(hessian, hessian.T)


def test_upper_gram_adds_up_over_batches():
    x = inputs(90, 2 * PANEL + 3)
    hessian = torch.zeros(x.shape[1], x.shape[1])
    for batch in x.split(40):
        add_upper_gram_(hessian, batch)
    exact = x.double().T @ x.double()
    assert torch.allclose(hessian.triu().double(), exact.triu(), rtol=1e-5, atol=1e-4)
    mirror_(hessian)
    assert torch.equal(hessian, hessian.T)


def test_gram_adds_to_what_is_there():
    x = inputs(20, 5)
    hessian = torch.ones(5, 5)
    add_gram_(hessian, x)
    assert torch.allclose(hessian, 1 + x.T @ x)


def test_no_tokens_add_nothing():
    hessian = torch.eye(5)
    add_gram_(hessian, inputs(0, 5))
    assert torch.equal(hessian, torch.eye(5))


def test_inputs_need_not_be_contiguous():
    x = inputs(30, 40).T  # (40, 30)
    hessian = torch.zeros(30, 30)
    add_gram_(hessian, x)
    assert torch.allclose(hessian, x.T @ x, rtol=1e-5, atol=1e-4)


def test_cross_sums_add_up():
    left, x, total = inputs(50, 7), inputs(50, 5, torch.bfloat16), torch.ones(7, 5)
    add_cross_(total, left, x)
    exact = 1 + left.double().T @ x.double()
    assert torch.allclose(total.double(), exact, rtol=1e-5, atol=1e-4)


def test_two_halves_are_as_good_as_float32():
    """What tensor cores would be given, multiplied in float64: the split alone loses digits."""
    x = inputs(400, 64, torch.bfloat16)
    drift = (x.float() + 0.02 * inputs(400, 65)[:, :64]).bfloat16().float() - x.float()
    exact = drift.double().T @ x.double()
    parts = split(drift)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    two = sum(part.double().T @ x.double() for part in parts)
    one = parts[0].double().T @ x.double()
    plain = (drift.T @ x.float()).double()

    def error(found):
        return ((found - exact).norm() / exact.norm()).item()

    assert error(two) < 1e-5 and error(two) <= 10 * error(plain) + 1e-6
    assert error(one) <= 5e-3
    lag = 1000 * inputs(400, 32)  # float32 with all its digits
    assert ((lag - sum(part.float() for part in split(lag))).abs() <= 2**-16 * lag.abs()).all()
