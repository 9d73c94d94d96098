"""X^T X against float64, whatever the width, the dtype and the way the tokens arrive."""

import pytest
import torch

from lib.methods.gram import PANEL, add_upper_gram_, mirror_


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
