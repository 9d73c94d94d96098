"""ADMM's iterations written out in numpy and float64: the same masks and weights.

Only the end of the solution is judged elsewhere, by its error, and conjugate gradients wash out
what the iterations did. Here a wrong step shows: in each case one step is left out on purpose, too.
"""

from __future__ import annotations

import numpy
import pytest
import torch

from lib.methods.admm import Admm
from lib.methods.sparsity import Sparsity

CPU = torch.device("cpu")
Array = numpy.ndarray


def lowest(score: Array, sparsity: Sparsity) -> Array:
    """Mask (out, in): the lowest of the whole matrix, or n of every m of a row."""
    mask = numpy.zeros(score.shape, bool)
    if sparsity.m:
        groups = score.reshape(len(score), -1, sparsity.m)
        order = groups.argsort(-1, kind="stable")[..., : sparsity.n]
        numpy.put_along_axis(mask.reshape(groups.shape), order, True, -1)
    else:
        flat = score.T.flatten()  # inputs first: the order of ties does not matter here
        mask = mask.T.flatten()
        mask[flat.argsort(kind="stable")[: int(len(flat) * sparsity.ratio)]] = True
        mask = mask.reshape(score.T.shape).T
    return mask


def plain_admm(
    weight: Array, x: Array, dense: Array, sparsity: Sparsity, rescale: bool = True
) -> tuple[Array, Array]:
    """The pruned weight (out, in) and its mask, by the docstring of lib/methods/admm.py.

    The numbers are those of the README: rho 1.5 and 2.5 times that, ten iterations each, five steps
    of conjugate gradients, damping 0.01 + 6 u in / tokens.
    """
    tokens, inputs = x.shape
    scale = numpy.sqrt((x**2).sum(0))
    a = (x.T @ x) / scale / scale[:, None]
    f = ((dense - x).T @ x) / scale / scale[:, None]
    a += 0.01 * numpy.eye(inputs)
    share = 6.0 * inputs / tokens
    unexplained = (1 / numpy.diag(numpy.linalg.inv(a))).mean()
    a += share * unexplained * numpy.eye(inputs)
    rho = 1.5 * (1 + share) * unexplained
    w = weight * scale
    b = w @ (a + f)
    total, last = w.copy(), numpy.zeros(w.shape, bool)
    settled = False
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
    steps = 3 if settled else 5
    for row in range(len(q)):
        kept = ~mask[row]
        own, aim = a[numpy.ix_(kept, kept)], b[row, kept]
        value = q[row, kept]
        residual = aim - own @ value
        direction = residual.copy()
        for _ in range(steps):
            image = own @ direction
            step = (residual @ residual) / (direction @ image)
            value = value + step * direction
            following = residual - step * image
            direction = following + (following @ following) / (residual @ residual) * direction
            residual = following
        q[row, kept] = value
    return q / scale, mask


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of the pruned and of the dense model (tokens, in), and a weight (out, in)."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=draw) / 8 + torch.eye(64)
    x = torch.randn(700, 64, generator=draw) @ mix * (torch.rand(64, generator=draw) + 0.2)
    dense = x + 0.2 * torch.randn(700, 64, generator=draw)
    return x, dense, torch.randn(40, 64, generator=draw)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "sparsity", [Sparsity(0.5), Sparsity(0.7), Sparsity(0.5, 2, 4), Sparsity(0.5, 4, 8)], ids=str
)
def test_masks_and_weights_are_those_of_plain_admm(sparsity: Sparsity, seed: int) -> None:
    x, dense, weight = problem(seed)
    solver = Admm(64, CPU)
    solver.observe(x, dense)
    ours = weight.clone()
    solver.prune_([ours], [sparsity])
    arrays = [tensor.double().numpy() for tensor in (weight, x, dense)]
    expected, mask = plain_admm(*arrays, sparsity)
    differing = ((ours.numpy() == 0) != mask).sum()
    assert differing <= 2  # float32 may turn a tie
    same = (ours.numpy() == 0) == mask
    rows = same.all(1)
    numpy.testing.assert_allclose(ours.numpy()[rows], expected[rows], rtol=0, atol=2e-4)
    _, other = plain_admm(*arrays, sparsity, rescale=False)
    assert (other != mask).sum() > 3 * differing
