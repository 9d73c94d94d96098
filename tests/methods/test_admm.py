"""ADMM against exact least squares in float64, against SparseGPT, and against itself in numpy."""

from __future__ import annotations

import warnings

import numpy
import pytest
import torch
from support import CPU
from torch import Tensor

from lib.methods import admm
from lib.methods.admm import Admm
from lib.methods.least_squares import FLOOR
from lib.methods.sparsegpt import SparseGPT
from lib.methods.sparsity import Sparsity
from lib.util.errors import UserError

SPARSITIES = [Sparsity(0.5), Sparsity(0.7), Sparsity(0.9), Sparsity(0.5, 2, 4), Sparsity(0.5, 4, 8)]
each_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: s.pattern or s.ratio)
Array = numpy.ndarray


def problem(width: int, *outputs: int, tokens: int = 600, seed: int = 0, spread: float = 1.0):
    """Inputs (tokens, in), the more alike the greater `spread`, and weights (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + spread * torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(tokens, width, generator=generator) @ mix
    x *= torch.rand(width, generator=generator) + 0.1
    return x, [torch.randn(out, width, generator=generator) for out in outputs]


def drifted(x: Tensor, seed: int = 1) -> Tensor:
    """The same tokens in another model: x, partly mixed anew, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    width = x.shape[1]
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    return x @ mix + 0.1 * torch.randn(x.shape, generator=generator)


def solve(x, weights, sparsity, dense=None, ahead=None, method=Admm, **settings) -> list[Tensor]:
    solver = method(x.shape[1], CPU)
    for name, value in settings.items():
        setattr(solver, name, value)
    if ahead is not None:  # the error of the stream, once the linear's own outputs are added
        solver.observe(x, residual_error=ahead + (dense - x) @ weights[0].T)
    else:
        solver.observe(x, *([] if dense is None else [dense]))
    pruned = [weight.clone() for weight in weights]
    solver.prune_(pruned, [sparsity] * len(weights) if isinstance(sparsity, Sparsity) else sparsity)
    return pruned


def output_error(x: Tensor, pruned: Tensor, target: Tensor, weight: Tensor) -> float:
    """|X Q^T - D W^T|^2 over tokens and outputs, in float64."""
    x, target = x.double(), target.double()
    return (x @ pruned.double().T - target @ weight.double().T).square().sum().item()


def objective(pruned, weight, x, dense, damping: float, ahead=None) -> tuple[Array, Array]:
    """Equation (1) of LeastSquares for each row (out,), in float64, and its exact minimum."""
    ahead = torch.zeros(len(x), len(weight)) if ahead is None else ahead
    q, w, x, d, ahead = (tensor.double().numpy() for tensor in (pruned, weight, x, dense, ahead))
    scale = numpy.sqrt((x**2).sum(0))
    correlation = (x.T @ x) / numpy.where(scale, scale, 1) / numpy.where(scale, scale, 1)[:, None]
    inverse = numpy.linalg.inv(correlation + FLOOR * numpy.eye(len(scale)))
    damping = FLOOR + damping * (1 / numpy.diag(inverse)).mean() * len(scale) / len(x)
    values, minima = [], []
    for row, wanted, aim in zip(q, w, (d @ w.T + ahead).T, strict=True):
        kept = row != 0
        # the damping is a few more rows of the least squares, which pull towards the old weight
        tall = numpy.vstack([x, numpy.diag(damping**0.5 * scale)])
        right = numpy.concatenate([aim, damping**0.5 * scale * wanted])
        best = numpy.linalg.lstsq(tall[:, kept], right, rcond=None)[0]
        values.append(((tall @ row - right) ** 2).sum())
        minima.append(((tall[:, kept] @ best - right) ** 2).sum())
    return numpy.array(values), numpy.array(minima)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@each_sparsity
def test_error_is_not_above_sparsegpts(sparsity: Sparsity, spread: float) -> None:
    x, weights = problem(128, 48, 16, spread=spread)
    ours = solve(x, weights, sparsity, damping=0)
    theirs = solve(x, weights, sparsity, method=SparseGPT)
    for mine, other, weight in zip(ours, theirs, weights, strict=True):
        assert output_error(x, mine, x, weight) <= output_error(x, other, x, weight) * (1 + 1e-6)


@pytest.mark.parametrize("tokens", [60, 200, 3000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_damping_suits_few_and_many_tokens(tokens: int, spread: float) -> None:
    both, [weight] = problem(128, 48, tokens=tokens + 3000, spread=spread)
    x, unseen = both[:tokens], both[tokens:]
    for sparsity in SPARSITIES:
        [ours] = solve(x, [weight], sparsity)
        [theirs] = solve(x, [weight], sparsity, method=SparseGPT)
        # inputs that have nothing to do with one another leave nothing to gain
        bound = output_error(unseen, theirs, unseen, weight) * (0.95 if spread else 1.01)
        assert output_error(unseen, ours, unseen, weight) < bound


@each_sparsity
def test_weights_approach_least_squares_on_their_mask(sparsity: Sparsity) -> None:
    x, [weight] = problem(64, 12)
    dense, ahead = drifted(x), drifted(x, seed=2)[:, :12] - x[:, :12]
    excess = {}
    for refinements in (0, 5, 100):
        settings = dict(refinements=refinements, damping=0.5)
        [pruned] = solve(x, [weight], sparsity, dense, ahead, **settings)
        values, minima = objective(pruned, weight, x, dense, damping=0.5, ahead=ahead)
        excess[refinements] = (values.sum() - minima.sum()) / minima.sum()
    assert excess[100] < 1e-4
    assert excess[5] < 0.01 and excess[5] <= excess[0] + 1e-6


@each_sparsity
def test_what_earlier_linears_broke_is_repaired(sparsity: Sparsity) -> None:
    """In the input and in the stream: nearer the dense outputs than a linear that keeps its own."""
    x, [weight] = problem(96, 32)
    dense, lead = drifted(x), x @ torch.randn(96, 32, generator=torch.Generator().manual_seed(3))
    [own] = solve(x, [weight], sparsity, damping=0)
    [aiming] = solve(x, [weight], sparsity, dense, damping=0)
    before, after = (output_error(x, one, dense, weight) for one in (own, aiming))
    assert after < 0.95 * before
    [repairing] = solve(x, [weight], sparsity, x, lead, damping=0)
    aim = x @ weight.T + lead
    errors = [(aim - x @ one.T).square().sum().item() for one in (own, repairing)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.99])
def test_counts_are_exact_in_each_linear(ratio: float) -> None:
    x, weights = problem(72, 10, 25)
    for pruned in solve(x, weights, Sparsity(ratio)):
        assert (pruned == 0).sum() == int(pruned.numel() * ratio)
        assert ratio or torch.allclose(pruned, weights[len(pruned) == 25], atol=1e-3)
    for n, m in ((2, 4), (4, 8)):
        for pruned in solve(x, weights, Sparsity(n / m, n, m)):
            assert ((pruned.reshape(-1, m) == 0).sum(1) == n).all()


@pytest.mark.parametrize("method", [Admm, SparseGPT])
def test_each_linear_may_have_a_sparsity_of_its_own(method: type) -> None:
    x, weights = problem(72, 10, 25)
    pruned = solve(x, weights, [Sparsity(0.5), Sparsity(0.7)], method=method)
    for one, ratio in zip(pruned, (0.5, 0.7), strict=True):
        assert (one == 0).sum() == pytest.approx(int(one.numel() * ratio), abs=1)


def test_linears_side_by_side_equal_linears_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admm, "EXPLORED", -1)  # else one goes on for as long as another wants to
    monkeypatch.setattr(admm, "AGREED", -1)
    x, weights = problem(64, 12, 20)
    together = solve(x, weights, Sparsity(0.5))
    for pruned, weight in zip(together, weights, strict=True):
        [alone] = solve(x, [weight], Sparsity(0.5))
        assert torch.equal(pruned == 0, alone == 0)
        assert torch.allclose(pruned, alone, atol=1e-4)


def test_sums_add_up_over_batches_and_processes() -> None:
    x, [weight] = problem(64, 12)
    dense = drifted(x)
    whole = Admm(64, CPU)
    whole.observe(x, dense)
    parts = [Admm(64, CPU) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 250), slice(250, 600)), strict=True):
        for batch, other in zip(x[rows].split(70), dense[rows].split(70), strict=True):
            part.observe(batch, other)
    for total, other in zip(parts[0].statistics(), parts[1].statistics(), strict=True):
        total += other
    assert parts[0].tokens + parts[1].tokens == whole.tokens == 600
    parts[0].tokens = 600
    results = [weight.clone(), weight.clone()]
    for method, result in zip((whole, parts[0]), results, strict=True):
        method.prune_([result], [Sparsity(0.5)])
    assert torch.equal(results[0] == 0, results[1] == 0)
    assert torch.allclose(results[0], results[1], atol=1e-3)


def test_half_precision_activations_are_summed_in_float32() -> None:
    x, [weight] = problem(64, 12)
    x, dense = x.bfloat16(), drifted(x).bfloat16()
    [half] = solve(x, [weight], Sparsity(0.5), dense)
    [full] = solve(x.float(), [weight], Sparsity(0.5), dense.float())
    assert torch.allclose(half, full, atol=1e-3)


@pytest.mark.parametrize("sparsity", SPARSITIES[:4], ids=str)
def test_dead_inputs_lose_their_weights(sparsity: Sparsity) -> None:
    x, [weight] = problem(64, 12)
    dense = drifted(x)
    dead = [3, 4, 40]
    x[:, dead] = 0
    [pruned] = solve(x, [weight], sparsity, dense, damping=0.5)
    assert (pruned[:, dead] == 0).all() and pruned.isfinite().all()
    values, minima = objective(pruned, weight, x, dense, damping=0.5)
    assert values.sum() < 1.02 * minima.sum()


@pytest.mark.parametrize("tokens", [1, 30])
@each_sparsity
def test_fewer_tokens_than_inputs(sparsity: Sparsity, tokens: int) -> None:
    x, [weight] = problem(64, 12, tokens=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [pruned] = solve(x, [weight], sparsity)
    assert pruned.isfinite().all()
    assert output_error(x, pruned, x, weight) < output_error(x, 0 * weight, x, weight)


@pytest.mark.filterwarnings("ignore:X")  # a second time
def test_damping_rises_where_the_factorisation_fails_but_not_for_ever() -> None:
    x, [weight] = problem(64, 12, spread=0.0)
    solver = Admm(64, CPU)
    solver.observe(x)
    solver.hessian[0, 1] = 1.05 * (solver.hessian[0, 0] * solver.hessian[1, 1]).sqrt()
    with pytest.warns(UserWarning, match="not positive definite with damping 0.01"):
        solver.prune_([weight], [Sparsity(0.5)])
    assert weight.isfinite().all()
    solver.hessian.copy_(torch.eye(64)).fill_diagonal_(1)[0, 1] = 1e6
    with pytest.warns(UserWarning), pytest.raises(UserError, match="not positive definite"):
        solver.prune_([weight], [Sparsity(0.5)])
    with pytest.raises(UserError, match="can't be factored"):
        admm.stiff_inverse(-torch.eye(4), 0.5)


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_outputs_whose_errors_cost_more_are_kept_better(ratio: float) -> None:
    x, weights = problem(72, 40, 25)
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
@pytest.mark.parametrize(
    "sparsity", [Sparsity(0.5), Sparsity(0.7), Sparsity(0.5, 2, 4), Sparsity(0.5, 4, 8)], ids=str
)
def test_masks_and_weights_are_those_of_plain_admm(sparsity: Sparsity, seed: int) -> None:
    """Conjugate gradients wash out what the iterations did: here a wrong step shows."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=draw) / 8 + torch.eye(64)
    x = torch.randn(700, 64, generator=draw) @ mix * (torch.rand(64, generator=draw) + 0.2)
    dense = x + 0.2 * torch.randn(700, 64, generator=draw)
    weight = torch.randn(40, 64, generator=draw)
    [ours] = solve(x, [weight], sparsity, dense)
    arrays = [tensor.double().numpy() for tensor in (weight, x, dense)]
    expected, mask = plain_admm(*arrays, sparsity)
    same = (ours.numpy() == 0) == mask
    assert (~same).sum() <= 2  # float32 may turn a tie
    rows = same.all(1)
    numpy.testing.assert_allclose(ours.numpy()[rows], expected[rows], rtol=0, atol=2e-4)
    _, other = plain_admm(*arrays, sparsity, rescale=False)
    assert (other != mask).sum() > 3 * (~same).sum()
