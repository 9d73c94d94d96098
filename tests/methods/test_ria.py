"""RIA against its formula, written out slowly."""

from __future__ import annotations

import pytest
import torch
from support import CPU

from lib.methods.registry import method_of
from lib.methods.ria import Ria, relative_importance
from lib.methods.sparsity import Sparsity


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_formula_of_the_paper(alpha: float) -> None:
    """(|W_ij| / sum of column j + |W_ij| / sum of row i) times the norm of X_j to alpha."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=draw)
    x = torch.randn(20, 8, generator=draw) * torch.logspace(-1, 1, 8)
    score = torch.zeros(6, 8, dtype=torch.float64)
    for i in range(6):
        for j in range(8):
            size = abs(float(weight[i, j]))
            column = sum(abs(float(weight[k, j])) for k in range(6))
            row = sum(abs(float(weight[i, k])) for k in range(8))
            norm = sum(float(value) ** 2 for value in x[:, j]) ** 0.5
            score[i, j] = (size / column + size / row) * norm**alpha
    for sparsity in (Sparsity(0.5), Sparsity(0.5, 2, 4)):
        solver = method_of("ria", arguments=[f"alpha={alpha}"])(8, CPU)
        solver.observe(x)
        found = weight.clone()
        solver.prune_([found], [sparsity])
        if sparsity.m:
            lowest = score.view(6, 2, 4).argsort(-1)[..., :2]
            mask = torch.zeros(6, 2, 4).scatter_(-1, lowest, 1).view(6, 8).bool()
        else:  # of the whole matrix
            mask = score <= score.flatten().sort().values[23]
        assert torch.equal(found, weight.masked_fill(mask, 0))


def test_by_hand() -> None:
    """Column sums are 4 and 4, row sums 4 and 4; then rows and columns of zeros."""
    weight = torch.tensor([[3.0, -1.0], [1.0, 3.0]])
    assert relative_importance(weight).tolist() == [[1.5, 0.5], [0.5, 1.5]]
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert relative_importance(weight).tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert Ria.alpha == 0.5
