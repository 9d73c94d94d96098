"""SparseGPT, ADMM and their repair of neurons against the algorithms in numpy's float64."""

from __future__ import annotations

import numpy
import pytest
import torch
from published import published_sparsegpt
from support import CPU, alike_inputs, refused
from torch import Tensor

from lib.methods import admm
from lib.methods.admm import Admm
from lib.methods.gram import PANEL, add_upper_gram_, cholesky, damped_cholesky_, mirror_, split
from lib.methods.least_squares import FLOOR
from lib.methods.sparsegpt import SparseGPT
from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda

SPARSITIES = [Sparsity(0.5), Sparsity(0.7), Sparsity(0.5, 2, 4), Sparsity(0.5, 4, 8)]
Array = numpy.ndarray
by_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
of_both = pytest.mark.parametrize("method", [SparseGPT, Admm])


def solve(method, x, weights, sparsity, dense=None, **settings) -> list[Tensor]:
    solver = method(x.shape[1], CPU)
    for name, value in settings.items():
        setattr(solver, name, value)
    for places in torch.arange(len(x)).split(150):
        solver.observe(x[places], *([] if dense is None else [dense[places]]))
    assert solver.tokens == len(x)
    pruned = [weight.clone() for weight in weights]
    solver.prune_(pruned, sparsity if isinstance(sparsity, list) else [sparsity] * len(weights))
    return pruned


# --- X^T X


def inputs(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(width)).to(dtype)


@pytest.mark.parametrize("width", [1, 7, PANEL, PANEL + 1, 3 * PANEL - 5])
def test_gram_adds_up_over_batches(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, hessian = inputs(90, width, dtype), torch.ones(width, width)
        for batch in (*x.split(40), x[:0]):
            add_upper_gram_(hessian, batch)
        exact = 1 + x.double().T @ x.double()
        assert torch.allclose(hessian.triu().double(), exact.triu(), rtol=1e-5, atol=1e-4)
        mirror_(hessian)
        assert torch.equal(hessian, hessian.T)


def test_two_halves_are_as_good_as_float32() -> None:
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


def test_damping_rises_tenfold_with_a_warning_and_not_for_ever() -> None:
    with pytest.warns(UserWarning, match="damping 0.01"):
        factor = damped_cholesky_(-0.05 * torch.eye(3), 0.01, torch.tensor(1.0))
    assert torch.allclose(factor @ factor.T, 0.05 * torch.eye(3))
    with pytest.warns(UserWarning):
        assert "damping 10" in refused(damped_cholesky_, -11 * torch.eye(3), 0.01)
    for place in ((3, 3), (4, 1)):
        for wrong in (-1.0, 0.0, float("nan"), float("inf")):
            hessian = torch.eye(5)
            hessian[place] = wrong if wrong or place == (3, 3) else 2.0
            refused(cholesky, hessian)


# --- SparseGPT


def assert_published(weight: Tensor, x: Tensor, sparsity: Sparsity) -> Tensor:
    [pruned] = solve(SparseGPT, x, [weight], sparsity)
    expected, mask = published_sparsegpt(weight, x.double().T @ x.double(), sparsity)
    assert torch.equal(pruned == 0, torch.from_numpy(mask))
    assert torch.allclose(pruned.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)
    return pruned


@pytest.mark.parametrize("width", [16, 128, 136, 304])
def test_sparsegpt_is_the_published_algorithm(width: int) -> None:
    x, [weight] = alike_inputs(width, 24)
    for ratio in (0.0, 0.3, 0.5, 0.99):
        for block in assert_published(weight, x, Sparsity(ratio)).split(128, dim=1):
            assert (block == 0).sum() == int(block.numel() * ratio)
    for n, m in ((2, 4), (4, 8)):
        pruned = assert_published(weight, x, Sparsity(0.5, n, m))
        assert ((pruned.view(24, -1, m) == 0).sum(-1) == n).all()
    x, [weight] = alike_inputs(width + 1, 24)
    assert_published(weight, x, Sparsity(0.5))


def test_equal_scores_go_from_the_left() -> None:
    # uncorrelated inputs of one size: the score is the square of the weight
    x, weight = torch.eye(16), torch.ones(2, 16)
    [rows] = solve(SparseGPT, x, [weight], Sparsity(0.25))
    assert (rows == 0).int().tolist() == [[1] * 4 + [0] * 12] * 2
    [groups] = solve(SparseGPT, x, [weight], Sparsity(0.5, 2, 4))
    assert (groups == 0).int().tolist() == [[1, 1, 0, 0] * 4] * 2


@by_sparsity
def test_ill_conditioned_inputs(sparsity: Sparsity) -> None:
    """Fewer tokens than inputs, of sizes far apart: the loss is as small as the reference's."""
    x, [weight] = alike_inputs(160, 24, tokens=40)
    x *= torch.logspace(-3, 3, 160)
    [pruned] = solve(SparseGPT, x, [weight], sparsity)
    expected, _ = published_sparsegpt(weight, x.double().T @ x.double(), sparsity)

    def loss(matrix: Tensor) -> float:
        return ((matrix.double() - weight.double()) @ x.double().T).square().sum().item()

    assert loss(pruned) == pytest.approx(loss(torch.from_numpy(expected)), rel=0.01)


# --- both


@of_both
@by_sparsity
def test_dead_inputs_lose_their_weights(method: type, sparsity: Sparsity) -> None:
    x, [weight] = alike_inputs(160, 24)
    dense = x + 0.2 * inputs(*x.shape)
    dead = [3, 50, 131]
    x[:, dead] = 0
    if method is SparseGPT:
        pruned = assert_published(weight, x, sparsity)
        [nothing] = solve(SparseGPT, torch.zeros(10, 160), [weight], Sparsity(0.5))
        assert (nothing == 0).all()
    else:
        [pruned] = solve(Admm, x, [weight], sparsity, dense, damping=0.5)
    assert (pruned[:, dead] == 0).all() and pruned.isfinite().all()


@of_both
@by_sparsity
def test_linears_with_a_shared_input_are_as_each_alone(
    method: type, sparsity: Sparsity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admm, "EXPLORED", -1)  # else one goes on for as long as another wants to
    monkeypatch.setattr(admm, "AGREED", -1)
    x, weights = alike_inputs(64 if method is Admm else 200, 12, 8, 20)
    for weight, pruned in zip(weights, solve(method, x, weights, sparsity), strict=True):
        [alone] = solve(method, x, [weight], sparsity)
        assert torch.equal(alone == 0, pruned == 0)
        assert torch.allclose(alone, pruned, rtol=1e-4, atol=1e-4)


@of_both
def test_each_linear_may_have_a_sparsity_of_its_own(method: type) -> None:
    x, weights = alike_inputs(72, 10, 25)
    pruned = solve(method, x, weights, [Sparsity(0.5), Sparsity(0.7)])
    for one, ratio in zip(pruned, (0.5, 0.7), strict=True):
        assert (one == 0).sum() == pytest.approx(int(one.numel() * ratio), abs=1)


# --- ADMM


def test_counts_are_exact_in_each_linear() -> None:
    x, weights = alike_inputs(72, 10, 25)
    for ratio in (0.0, 0.3, 0.99):
        for weight, pruned in zip(weights, solve(Admm, x, weights, Sparsity(ratio)), strict=True):
            assert (pruned == 0).sum() == int(pruned.numel() * ratio)
            assert ratio or torch.allclose(pruned, weight, atol=1e-3)


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_outputs_whose_errors_cost_more_are_kept_better(ratio: float) -> None:
    x, weights = alike_inputs(72, 40, 25)
    costs = [10.0 ** torch.linspace(-3, 2, len(weight)) for weight in weights]
    plain = solve(Admm, x, weights, Sparsity(ratio))
    weighed = solve(Admm, x, weights, Sparsity(ratio), output_costs=costs)
    for before, after, weight, cost in zip(plain, weighed, weights, costs, strict=True):
        assert (after == 0).sum() == (before == 0).sum()
        kept = (after != 0).sum(1)
        assert kept[-1] > kept[0]
        errors = ((x @ (one - weight).T).square().sum(0) for one in (before, after))
        sums = [float((cost * error).sum()) for error in errors]
        assert sums[1] < 0.7 * sums[0]
    for cost in (0.0, 3.0):  # that are equal
        equal = [torch.full((40,), cost), None]
        found = solve(Admm, x, weights, Sparsity(ratio), output_costs=equal)
        assert all(map(torch.equal, plain, found))


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


@pytest.mark.parametrize("seed", range(2))
@by_sparsity
def test_masks_and_weights_are_those_of_plain_admm(sparsity: Sparsity, seed: int) -> None:
    """Conjugate gradients wash out what the iterations did: here a wrong step shows."""
    x, [weight] = alike_inputs(64, 40, tokens=700, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    dense = x + 0.2 * torch.randn(700, 64, generator=draw)
    [ours] = solve(Admm, x, [weight], sparsity, dense)
    arrays = [tensor.double().numpy() for tensor in (weight, x, dense)]
    expected, mask = plain_admm(*arrays, sparsity)
    same = (ours.numpy() == 0) == mask
    assert (~same).sum() <= 2  # float32 may turn a tie
    rows = same.all(1)
    numpy.testing.assert_allclose(ours.numpy()[rows], expected[rows], rtol=0, atol=2e-4)
    _, other = plain_admm(*arrays, sparsity, rescale=False)
    assert (other != mask).sum() > 3 * (~same).sum()


# --- neurons chosen and repaired, against one at a time with every inverse computed anew


def by_brute_force(hessian: Array, target: Array, count: int) -> list[int]:
    """Float64: the neuron whose loss is least goes, all others solved again, until `count` stay.

    tr(Q^T A Q) - 2 tr(B^T Q) is computed for every set that lacks one more.
    """

    def loss(rows: list[int]) -> float:
        solution = numpy.linalg.solve(hessian[numpy.ix_(rows, rows)], target[rows])
        return float(-(target[rows] * solution).sum())

    rows = list(range(len(hessian)))
    while len(rows) > count:
        rows = min(([r for r in rows if r != gone] for gone in rows), key=loss)
    return rows


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
    rows = by_brute_force((scaled.T @ scaled).numpy(), (scaled.T @ right).numpy(), 25)
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
