"""The solver against exact least squares, row by row in numpy's float64, and against SparseGPT."""

import warnings

import numpy
import pytest
import torch
from support import CPU

from lib.methods import admm
from lib.methods.admm import Admm
from lib.methods.least_squares import FLOOR
from lib.methods.sparsegpt import SparseGPT
from lib.methods.sparsity import Sparsity
from lib.util.errors import UserError

SPARSITIES = [
    Sparsity(0.5),
    Sparsity(0.7),
    Sparsity(0.9),
    Sparsity.parse("2:4", 0.5),
    Sparsity.parse("4:8", 0.5),
]


def problem(width: int, *outputs: int, tokens: int = 600, seed: int = 0, spread: float = 1.0):
    """Inputs (tokens, in), the more alike the greater `spread`, and weights (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + spread * torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(tokens, width, generator=generator) @ mix
    x *= torch.rand(width, generator=generator) + 0.1
    return x, [torch.randn(out, width, generator=generator) for out in outputs]


def drifted(x, seed: int = 1):
    """The same tokens in another model: x, partly mixed anew, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    width = x.shape[1]
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    return x @ mix + 0.1 * torch.randn(x.shape, generator=generator)


def solve(
    x,
    weights,
    sparsity: Sparsity | list[Sparsity],
    dense=None,
    ahead=None,
    method=Admm,
    costs=None,
    **options,
):
    solver = method(x.shape[1], CPU, **options)
    if ahead is None:
        solver.observe(x, dense)
    else:  # once the linear's own outputs are added
        [weight] = weights
        solver.observe(x, residual_error=ahead + (dense - x) @ weight.T)
    pruned = [weight.clone() for weight in weights]
    sparsities = [sparsity] * len(weights) if isinstance(sparsity, Sparsity) else sparsity
    solver.prune_(pruned, sparsities, costs)
    return pruned


def output_error(x, pruned, target, weight) -> float:
    """|X Q^T - D W^T|^2 over tokens and outputs, in float64."""
    x, target = x.double(), target.double()
    return (x @ pruned.double().T - target @ weight.double().T).square().sum().item()


def objective(pruned, weight, x, dense, blend: float, damping: float, ahead=None):
    """Equation (1) of ADMM for each row (out,), in float64, and its exact minimum."""
    ahead = torch.zeros(len(x), len(weight)) if ahead is None else ahead
    q, w, x, d, ahead = (tensor.double().numpy() for tensor in (pruned, weight, x, dense, ahead))
    scale = numpy.sqrt((x**2).sum(0))
    correlation = (x.T @ x) / numpy.where(scale, scale, 1) / numpy.where(scale, scale, 1)[:, None]
    inverse = numpy.linalg.inv(correlation + FLOOR * numpy.eye(len(scale)))
    damping = FLOOR + damping * (1 / numpy.diag(inverse)).mean() * len(scale) / len(x)
    aims = x @ w.T + blend * ((d - x) @ w.T + ahead)
    values, minima = [], []
    for row, wanted, aim in zip(q, w, aims.T, strict=True):
        kept = row != 0
        # the damping is a few more rows of the least squares, which pull towards the old weight
        tall = numpy.vstack([x, numpy.diag(damping**0.5 * scale)])
        right = numpy.concatenate([aim, damping**0.5 * scale * wanted])
        best = numpy.linalg.lstsq(tall[:, kept], right, rcond=None)[0]
        values.append(((tall @ row - right) ** 2).sum())
        minima.append(((tall[:, kept] @ best - right) ** 2).sum())
    return numpy.array(values), numpy.array(minima)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: s.pattern or str(s.ratio))
def test_error_is_not_above_sparsegpts(sparsity, spread, seed):
    x, weights = problem(128, 48, 16, seed=seed, spread=spread)
    ours = solve(x, weights, sparsity, damping=0)
    theirs = solve(x, weights, sparsity, method=SparseGPT)
    for mine, other, weight in zip(ours, theirs, weights, strict=True):
        assert output_error(x, mine, x, weight) <= output_error(x, other, x, weight) * (1 + 1e-6)


@pytest.mark.parametrize("tokens", [60, 200, 600, 3000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_damping_suits_few_and_many_tokens(tokens, spread):
    both, [weight] = problem(128, 48, tokens=tokens + 3000, spread=spread)
    x, unseen = both[:tokens], both[tokens:]
    for sparsity in SPARSITIES:
        [ours] = solve(x, [weight], sparsity)
        [theirs] = solve(x, [weight], sparsity, method=SparseGPT)
        bound = output_error(unseen, theirs, unseen, weight)
        # inputs that have nothing to do with one another leave nothing to gain
        bound *= 0.95 if spread else 1.01
        assert output_error(unseen, ours, unseen, weight) < bound


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: s.pattern or str(s.ratio))
def test_weights_approach_least_squares_on_their_mask(sparsity, blend):
    x, [weight] = problem(64, 12)
    dense, ahead = drifted(x), drifted(x, seed=2)[:, :12] - x[:, :12]
    excess = {}
    for refinements in (0, 5, 100):
        options = {"blend": blend, "damping": 0.5}
        [pruned] = solve(x, [weight], sparsity, dense, ahead, refinements=refinements, **options)
        values, minima = objective(pruned, weight, x, dense, ahead=ahead, **options)
        excess[refinements] = (values.sum() - minima.sum()) / minima.sum()
    assert excess[100] < 1e-4
    assert excess[5] < 0.01
    assert excess[5] <= excess[0] + 1e-6


def test_error_to_the_dense_outputs_falls_with_the_blend():
    x, [weight] = problem(96, 32)
    dense = drifted(x)
    for sparsity in SPARSITIES:
        errors = [
            output_error(
                x, *solve(x, [weight], sparsity, dense, blend=blend, damping=0), dense, weight
            )
            for blend in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.95 * errors[0]


def test_the_error_of_the_stream_is_repaired():
    x, [weight] = problem(96, 32)
    lead = x @ torch.randn(96, 32, generator=torch.Generator().manual_seed(3))
    for sparsity in SPARSITIES:
        errors = []
        for blend in (0.0, 0.5, 1.0):
            [pruned] = solve(x, [weight], sparsity, x, lead, blend=blend, damping=0)
            ahead = x.double() @ weight.double().T + lead - x.double() @ pruned.double().T
            errors.append(ahead.square().sum().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.95 * errors[0]


def test_without_a_dense_stream_a_linear_keeps_its_own_outputs():
    x, weights = problem(64, 12)
    dense = drifted(x)
    alone = solve(x, weights, Sparsity(0.5))
    assert torch.equal(solve(x, weights, Sparsity(0.5), dense, blend=0.0)[0], alone[0])
    assert not torch.equal(solve(x, weights, Sparsity(0.5), dense, blend=1.0)[0], alone[0])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.99])
def test_unstructured_counts_are_exact_in_each_linear(ratio):
    x, weights = problem(72, 10, 25)
    for pruned in solve(x, weights, Sparsity(ratio)):
        assert (pruned == 0).sum() == int(pruned.numel() * ratio)


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8)])
def test_every_group_loses_n(n, m):
    x, weights = problem(72, 10, 25)
    for pruned in solve(x, weights, Sparsity(n / m, n, m)):
        assert ((pruned.reshape(-1, m) == 0).sum(1) == n).all()


def test_nothing_pruned_and_nothing_to_repair_leaves_the_weights():
    x, [weight] = problem(64, 12)
    [pruned] = solve(x, [weight], Sparsity(0.0))
    assert torch.allclose(pruned, weight, atol=1e-3)


def test_linears_side_by_side_equal_linears_alone(monkeypatch):
    monkeypatch.setattr(admm, "EXPLORED", -1)  # else one goes on for as long as another wants to
    monkeypatch.setattr(admm, "AGREED", -1)
    x, weights = problem(64, 12, 20)
    together = solve(x, weights, Sparsity(0.5))
    for pruned, weight in zip(together, weights, strict=True):
        [alone] = solve(x, [weight], Sparsity(0.5))
        assert torch.equal(pruned == 0, alone == 0)
        assert torch.allclose(pruned, alone, atol=1e-4)


def test_same_bytes_twice():
    x, weights = problem(64, 12, 20)
    dense = drifted(x)
    first = solve(x, weights, Sparsity(0.6), dense)
    second = solve(x, weights, Sparsity(0.6), dense)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_sums_add_up_over_batches_and_processes():
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
    whole.prune_([results[0]], [Sparsity(0.5)])
    parts[0].prune_([results[1]], [Sparsity(0.5)])
    assert torch.equal(results[0] == 0, results[1] == 0)
    assert torch.allclose(results[0], results[1], atol=1e-3)


def test_half_precision_activations_are_summed_in_float32():
    x, [weight] = problem(64, 12)
    x, dense = x.bfloat16(), drifted(x).bfloat16()
    [half] = solve(x, [weight], Sparsity(0.5), dense)
    [full] = solve(x.float(), [weight], Sparsity(0.5), dense.float())
    assert torch.allclose(half, full, atol=1e-3)


@pytest.mark.parametrize("sparsity", SPARSITIES[:4], ids=lambda s: s.pattern or str(s.ratio))
def test_dead_inputs_lose_their_weights(sparsity):
    x, [weight] = problem(64, 12)
    dense = drifted(x)
    dead = [3, 4, 40]
    x[:, dead] = 0
    options = {"blend": 0.7, "damping": 0.5}
    [pruned] = solve(x, [weight], sparsity, dense, **options)
    assert (pruned[:, dead] == 0).all() and pruned.isfinite().all()
    values, minima = objective(pruned, weight, x, dense, **options)
    assert values.sum() < 1.02 * minima.sum()


@pytest.mark.parametrize("tokens", [1, 8, 30])
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: s.pattern or str(s.ratio))
def test_fewer_tokens_than_inputs(sparsity, tokens):
    x, [weight] = problem(64, 12, tokens=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [pruned] = solve(x, [weight], sparsity)
    assert pruned.isfinite().all()
    assert output_error(x, pruned, x, weight) < output_error(x, 0 * weight, x, weight)


@pytest.mark.filterwarnings("ignore:X")  # a second time
def test_damping_rises_where_the_factorisation_fails():
    x, [weight] = problem(64, 12, spread=0.0)
    solver = Admm(64, CPU, damping=0.01)
    solver.observe(x)
    solver.hessian[0, 1] = 1.05 * (solver.hessian[0, 0] * solver.hessian[1, 1]).sqrt()
    with pytest.warns(UserWarning, match="not positive definite with damping 0.01"):
        solver.prune_([weight], [Sparsity(0.5)])
    assert weight.isfinite().all()


def test_damping_does_not_rise_for_ever():
    _, [weight] = problem(64, 12)
    solver = Admm(64, CPU)
    solver.tokens = 100
    solver.hessian.copy_(torch.eye(64)).fill_diagonal_(1)[0, 1] = 1e6
    with pytest.warns(UserWarning), pytest.raises(UserError, match="not positive definite"):
        solver.prune_([weight], [Sparsity(0.5)])


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: s.pattern or str(s.ratio))
def test_choosing_quickly_is_choosing_exactly(sparsity):
    """Z of every iteration has its zeros where the mask that stays would have them."""
    total = torch.randn(72, 35, generator=torch.Generator().manual_seed(2))
    choice = admm.MaskChoice([10, 25], [sparsity, sparsity])
    kept = torch.empty_like(total)
    for one, part, out in choice.parts(total, kept):
        out.copy_(choice.masked(part, one))
    assert torch.equal(kept == 0, choice.final(total))
    assert torch.equal(kept[kept != 0], total[kept != 0])


def test_each_linear_may_have_a_sparsity_of_its_own():
    x, weights = problem(72, 10, 25)
    for method in (Admm, SparseGPT):
        pruned = solve(x, weights, [Sparsity(0.5), Sparsity(0.7)], method=method)
        for one, ratio in zip(pruned, (0.5, 0.7), strict=True):
            assert (one == 0).sum() == pytest.approx(int(one.numel() * ratio), abs=1)


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_outputs_whose_errors_cost_more_are_kept_better(ratio):
    x, weights = problem(72, 40, 25)
    costs = [10.0 ** torch.linspace(-3, 2, len(weight)) for weight in weights]
    plain = solve(x, weights, Sparsity(ratio))
    weighed = solve(x, weights, Sparsity(ratio), costs=costs)
    for before, after, weight, cost in zip(plain, weighed, weights, costs, strict=True):
        assert (after == 0).sum() == (before == 0).sum()
        kept = (after != 0).sum(1)
        assert kept[-1] > kept[0]
        sums = [
            float((cost * (x @ (pruned - weight).T).square().sum(0)).sum())
            for pruned in (before, after)
        ]
        assert sums[1] < 0.7 * sums[0]


@pytest.mark.parametrize("cost", [0.0, 3.0])
def test_outputs_whose_errors_cost_as_much_are_as_before(cost):
    x, weights = problem(72, 10, 25)
    plain = solve(x, weights, Sparsity(0.6))
    costs = [torch.full((10,), cost), None]
    for before, after in zip(plain, solve(x, weights, Sparsity(0.6), costs=costs), strict=True):
        assert torch.equal(before, after)


def test_what_is_not_finite_is_told():
    with pytest.raises(UserError, match="can't be factored"):
        admm.stiff_inverse(-torch.eye(4), 0.5)
