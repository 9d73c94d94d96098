"""ADMM against itself written out in numpy's float64."""

from __future__ import annotations

import numpy
import pytest
import torch
from support import CPU, alike_inputs
from torch import Tensor

from lib.methods import admm
from lib.methods.admm import Admm
from lib.methods.sparsegpt import SparseGPT
from lib.methods.sparsity import Sparsity

SPARSITIES = [Sparsity(0.5), Sparsity(0.7), Sparsity(0.5, 2, 4), Sparsity(0.5, 4, 8)]
Array = numpy.ndarray


def solve(x, weights, sparsity, dense=None, method=Admm, **settings) -> list[Tensor]:
    solver = method(x.shape[1], CPU)
    for name, value in settings.items():
        setattr(solver, name, value)
    solver.observe(x, *([] if dense is None else [dense]))
    pruned = [weight.clone() for weight in weights]
    solver.prune_(pruned, [sparsity] * len(weights) if isinstance(sparsity, Sparsity) else sparsity)
    return pruned


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.99])
def test_counts_are_exact_in_each_linear(ratio: float) -> None:
    x, weights = alike_inputs(72, 10, 25)
    for pruned in solve(x, weights, Sparsity(ratio)):
        assert (pruned == 0).sum() == int(pruned.numel() * ratio)
        assert ratio or torch.allclose(pruned, weights[len(pruned) == 25], atol=1e-3)
    for n, m in ((2, 4), (4, 8)):
        for pruned in solve(x, weights, Sparsity(n / m, n, m)):
            assert ((pruned.reshape(-1, m) == 0).sum(1) == n).all()


@pytest.mark.parametrize("method", [Admm, SparseGPT])
def test_each_linear_may_have_a_sparsity_of_its_own(method: type) -> None:
    x, weights = alike_inputs(72, 10, 25)
    pruned = solve(x, weights, [Sparsity(0.5), Sparsity(0.7)], method=method)
    for one, ratio in zip(pruned, (0.5, 0.7), strict=True):
        assert (one == 0).sum() == pytest.approx(int(one.numel() * ratio), abs=1)


def test_linears_side_by_side_equal_linears_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admm, "EXPLORED", -1)  # else one goes on for as long as another wants to
    monkeypatch.setattr(admm, "AGREED", -1)
    x, weights = alike_inputs(64, 12, 20)
    together = solve(x, weights, Sparsity(0.5))
    for pruned, weight in zip(together, weights, strict=True):
        [alone] = solve(x, [weight], Sparsity(0.5))
        assert torch.equal(pruned == 0, alone == 0)
        assert torch.allclose(pruned, alone, atol=1e-4)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
def test_dead_inputs_lose_their_weights(sparsity: Sparsity) -> None:
    x, [weight] = alike_inputs(64, 12)
    dense = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    dead = [3, 4, 40]
    x[:, dead] = 0
    [pruned] = solve(x, [weight], sparsity, dense, damping=0.5)
    assert (pruned[:, dead] == 0).all() and pruned.isfinite().all()


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_outputs_whose_errors_cost_more_are_kept_better(ratio: float) -> None:
    x, weights = alike_inputs(72, 40, 25)
    costs = [10.0 ** torch.linspace(-3, 2, len(weight)) for weight in weights]
    plain = solve(x, weights, Sparsity(ratio))
    weighed = solve(x, weights, Sparsity(ratio), output_costs=costs)
    for before, after, weight, cost in zip(plain, weighed, weights, costs, strict=True):
        assert (after == 0).sum() == (before == 0).sum()
        kept = (after != 0).sum(1)
        assert kept[-1] > kept[0]
        errors = ((x @ (one - weight).T).square().sum(0) for one in (before, after))
        sums = [float((cost * error).sum()) for error in errors]
        assert sums[1] < 0.7 * sums[0]
    for cost in (0.0, 3.0):  # that are equal
        equal = solve(x, weights, Sparsity(ratio), output_costs=[torch.full((40,), cost), None])
        assert all(map(torch.equal, plain, equal))


def lowest(score: Array, sparsity: Sparsity) -> Array:
    """Mask (out, in): the lowest of the whole matrix, or n of every m of a row."""
    mask = numpy.zeros(score.shape, bool)
    if sparsity.m:
        groups = score.reshape(len(score), -1, sparsity.m)
        order = groups.argsort(-1, kind="stable")[..., : sparsity.n]
        numpy.put_along_axis(mask.reshape(groups.shape), order, True, -1)
        return mask
    flat, mask = score.flatten(), mask.flatten()
    mask[flat.argsort(kind="stable")[: int(len(flat) * sparsity.ratio)]] = True
    return mask.reshape(score.shape)


def plain_admm(
    weight: Array, x: Array, dense: Array, sparsity: Sparsity, rescale: bool = True
) -> tuple[Array, Array]:
    """The pruned weight (out, in) and its mask, by the docstring of lib/methods/admm.py, float64.

    The numbers are those of the README: rho 1.5 and 2.5 times that, ten iterations each, five steps
    of conjugate gradients, damping 0.01 + 6 u in / tokens.
    """
    tokens, inputs = x.shape
    scale = numpy.sqrt((x**2).sum(0))
    a = (x.T @ x) / scale / scale[:, None] + 0.01 * numpy.eye(inputs)
    f = ((dense - x).T @ x) / scale / scale[:, None]
    share = 6.0 * inputs / tokens
    unexplained = (1 / numpy.diag(numpy.linalg.inv(a))).mean()
    a += share * unexplained * numpy.eye(inputs)
    rho = 1.5 * (1 + share) * unexplained
    w = weight * scale
    b = w @ (a + f)
    total, last, settled = w.copy(), numpy.zeros(w.shape, bool), False
    for stiffness, following, least in ((rho, 2.5 * rho, 6e-3), (2.5 * rho, 2.5 * rho, 5e-4)):
        if settled:
            break
        inverse = numpy.linalg.inv(a + stiffness * numpy.eye(inputs))
        for iteration in range(10):
            mask = lowest(abs(total), sparsity)
            z, u = numpy.where(mask, 0, total), numpy.where(mask, total, 0)
            settled = (mask != last).sum() <= least * mask.size
            last = mask
            v = (b + stiffness * (z - u)) @ inverse
            end = settled or iteration == 9
            if end and not settled and rescale:
                u = u * stiffness / following  # rho U is what stays
            total = v + u
            if end:
                break
    mask = lowest(abs(total), sparsity)
    q = numpy.where(mask, 0, total)
    for row in range(len(q)):
        kept = ~mask[row]
        own, value = a[numpy.ix_(kept, kept)], q[row, kept]
        residual = b[row, kept] - own @ value
        direction = residual.copy()
        for _ in range(3 if settled else 5):
            image = own @ direction
            step = (residual @ residual) / (direction @ image)
            value = value + step * direction
            following = residual - step * image
            direction = following + (following @ following) / (residual @ residual) * direction
            residual = following
        q[row, kept] = value
    return q / scale, mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
def test_masks_and_weights_are_those_of_plain_admm(sparsity: Sparsity, seed: int) -> None:
    """Conjugate gradients wash out what the iterations did: here a wrong step shows."""
    x, [weight] = alike_inputs(64, 40, tokens=700, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    dense = x + 0.2 * torch.randn(700, 64, generator=draw)
    [ours] = solve(x, [weight], sparsity, dense)
    arrays = [tensor.double().numpy() for tensor in (weight, x, dense)]
    expected, mask = plain_admm(*arrays, sparsity)
    same = (ours.numpy() == 0) == mask
    assert (~same).sum() <= 2  # float32 may turn a tie
    rows = same.all(1)
    numpy.testing.assert_allclose(ours.numpy()[rows], expected[rows], rtol=0, atol=2e-4)
    _, other = plain_admm(*arrays, sparsity, rescale=False)
    assert (other != mask).sum() > 3 * (~same).sum()
