"""What fused experts are multiplied with is seen, however the product is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lib.model.linears import find_linears, watch_inputs, watch_outputs

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by place": lambda x, w: F.linear(x, w),
    "both by name": lambda x, w: F.linear(weight=w, input=x),
    "matmul by name": lambda x, w: torch.matmul(x, other=w.T),
    "method": lambda x, w: x.matmul(w.T),
    "operator": lambda x, w: x @ w.T,
}


class Experts(nn.Module):
    """Three matrices in one parameter; expert i gets i + 1 tokens."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 8))
        self.product = product

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.product(x[: i + 1], self.weight[i]) for i in range(3)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_experts_inputs_are_seen(name: str) -> None:
    experts, x, seen = Experts(PRODUCTS[name]), torch.randn(4, 8), {}
    linears, left = find_linears(experts, "block")
    expected = experts(x)
    with watch_inputs(linears, lambda linear, its: seen.update({linear.expert: its})):
        found = experts(x)
    assert not left and [linear.expert for linear in linears] == [0, 1, 2]
    assert seen.keys() == {0, 1, 2}
    assert all(torch.equal(seen[i], x[: i + 1]) for i in range(3))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("module", "keyword"), [(nn.Linear(8, 8), "input"), (Conv1D(8, 8), "x")])
def test_inputs_and_outputs_of_a_call_by_keyword_are_seen(module: nn.Module, keyword: str) -> None:
    [linear] = find_linears(nn.ModuleDict({"linear": module}), "0")[0]
    seen: list[Tensor] = []
    x = torch.ones(3, 8)
    with watch_inputs([linear], lambda _, x: seen.append(x)):
        module(**{keyword: x})
    with watch_outputs([linear], lambda _, x, out: seen.append(x)):
        module(**{keyword: x})
    assert [tensor is x for tensor in seen] == [True, True]
