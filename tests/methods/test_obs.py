"""Neurons chosen and repaired, against one at a time with every inverse computed anew."""

from __future__ import annotations

import numpy
import pytest
import torch
from support import CPU, alike_inputs
from torch import Tensor

from lib.methods.admm import Admm
from lib.methods.least_squares import FLOOR
from lib.methods.sparsegpt import SparseGPT
from lib.methods.wanda import Wanda


def by_brute_force(
    hessian: numpy.ndarray, target: numpy.ndarray, count: int
) -> tuple[list[int], numpy.ndarray]:
    """Float64: the neuron whose loss is least goes, all others solved again, until `count` stay.

    tr(Q^T A Q) - 2 tr(B^T Q) is computed for every set that lacks one more.
    """

    def best(rows: list[int]) -> tuple[float, numpy.ndarray]:
        solution = numpy.linalg.solve(hessian[numpy.ix_(rows, rows)], target[rows])
        return float(-(target[rows] * solution).sum()), solution

    rows = list(range(len(hessian)))
    while len(rows) > count:
        rows = min(([r for r in rows if r != gone] for gone in rows), key=lambda r: best(r)[0])
    return rows, best(rows)[1]


def damped(x: Tensor, share: float = 0.01) -> numpy.ndarray:
    hessian = (x.double().T @ x.double()).numpy()
    return hessian + share * numpy.diag(hessian).mean() * numpy.eye(len(hessian))


@pytest.mark.parametrize("by_stream", [False, True])
def test_admm_aims_at_the_dense_model(by_stream: bool) -> None:
    """Against least squares on the outputs that the dense model has, and what is ahead."""
    x, [weight] = alike_inputs(40, 12)
    generator = torch.Generator().manual_seed(1)
    dense = x + 0.2 * torch.randn(x.shape, generator=generator)
    ahead = 0.3 * torch.randn(len(x), 12, generator=generator) * by_stream
    method, pruned = Admm(40, CPU), weight.clone()
    method.damping = 0.0
    if by_stream:
        method.observe(x, residual_error=ahead + (dense - x) @ weight.T)
    else:
        method.observe(x, dense)
    kept = method.remove_neurons_(pruned, x.new_ones(40), 25)
    aim = dense @ weight.T + ahead
    scale = x.norm(dim=0)
    # damping is a few more rows of the least squares, which pull towards the weights as they were
    tall = torch.cat([x, FLOOR**0.5 * scale.diag()]).double()
    right = torch.cat([aim, FLOOR**0.5 * (scale * weight).T]).double()
    best = torch.linalg.lstsq(tall[:, kept], right).solution
    assert torch.allclose(pruned[:, kept].T.double(), best, atol=2e-3)
    scaled = tall / scale.double()
    rows, _ = by_brute_force((scaled.T @ scaled).numpy(), (scaled.T @ right).numpy(), 25)
    assert len(set(kept.tolist()) & set(rows)) >= 22  # a stage is several at once


@pytest.mark.parametrize("method", [SparseGPT, Admm, Wanda])
def test_neurons_that_are_never_active_go_first(method: type) -> None:
    x, [weight] = alike_inputs(40, 12)
    x[:, [3, 7, 20]] = 0
    observer, pruned = method(40, CPU), weight.clone()
    observer.observe(x)
    kept = observer.remove_neurons_(pruned, x.new_ones(40), 37)
    assert not {3, 7, 20}.intersection(kept.tolist())
    assert torch.allclose(x @ pruned.T, x @ weight.T, atol=0.05)
