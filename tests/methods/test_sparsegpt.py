"""The solver against the published algorithm, column by column, dense, in numpy's float64."""

import pytest
import torch
from published import published_sparsegpt
from support import CPU, alike_inputs

from lib.methods.sparsegpt import SparseGPT
from lib.methods.sparsity import Sparsity

KINDS = pytest.mark.parametrize("kind", ["unstructured", "2:4", "4:8"])


def solve(x, weights, sparsity: Sparsity, **settings):
    method = SparseGPT(x.shape[1], CPU)
    for name, value in settings.items():
        setattr(method, name, value)
    for batch in x.split(150):
        method.observe(batch)
    assert method.tokens == len(x)
    pruned = [weight.clone() for weight in weights]
    method.prune_(pruned, [sparsity] * len(pruned))
    return pruned


def assert_as_published_sparsegpt(weight, x, sparsity: Sparsity, **settings):
    [pruned] = solve(x, [weight], sparsity, **settings)
    expected, mask = published_sparsegpt(weight, x.double().T @ x.double(), sparsity, **settings)
    assert torch.equal(pruned == 0, torch.from_numpy(mask))
    assert torch.allclose(pruned.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)
    return pruned


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("width", [16, 128, 129, 300])
def test_unstructured(width, ratio):
    x, [weight] = alike_inputs(width, 24)
    pruned = assert_as_published_sparsegpt(weight, x, Sparsity(ratio))
    for block in pruned.split(128, dim=1):
        assert (block == 0).sum() == int(block.numel() * ratio)


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8)])
@pytest.mark.parametrize("width", [8, 128, 136, 304])
def test_n_of_m(width, n, m):
    x, [weight] = alike_inputs(width, 24)
    pruned = assert_as_published_sparsegpt(weight, x, Sparsity(0.5, n, m))
    assert ((pruned.view(24, -1, m) == 0).sum(-1) == n).all()


@KINDS
def test_dead_inputs_lose_their_weights_and_change_no_others(kind):
    x, [weight] = alike_inputs(160, 24)
    x[:, [3, 50, 131]] = 0
    pruned = assert_as_published_sparsegpt(weight, x, Sparsity.parse(kind, 0.5))
    assert (pruned[:, [3, 50, 131]] == 0).all()
    [nothing] = solve(torch.zeros(10, 160), [weight], Sparsity(0.5))
    assert (nothing == 0).all()


@KINDS
def test_linears_with_a_shared_input_are_as_each_alone(kind):
    x, weights = alike_inputs(200, 24, 8, 40)
    sparsity = Sparsity.parse(kind, 0.5)
    for weight, pruned in zip(weights, solve(x, weights, sparsity), strict=True):
        [alone] = solve(x, [weight], sparsity)
        assert torch.equal(alone == 0, pruned == 0)
        assert torch.allclose(alone, pruned, rtol=1e-4, atol=1e-5)


def test_equal_scores_go_from_the_left():
    # uncorrelated inputs of one size: the score is the square of the weight
    x, weight = torch.eye(16), torch.ones(2, 16)
    [rows] = solve(x, [weight], Sparsity(0.25))
    assert (rows == 0).int().tolist() == [[1] * 4 + [0] * 12] * 2
    [groups] = solve(x, [weight], Sparsity.parse("2:4", 0.5))
    assert (groups == 0).int().tolist() == [[1, 1, 0, 0] * 4] * 2


@KINDS
def test_ill_conditioned_inputs(kind):
    """Fewer tokens than inputs, of sizes far apart: the loss is as small as the reference's."""
    x, [weight] = alike_inputs(160, 24, tokens=40)
    x *= torch.logspace(-3, 3, 160)
    sparsity = Sparsity.parse(kind, 0.5)
    [pruned] = solve(x, [weight], sparsity)
    expected, _ = published_sparsegpt(weight, x.double().T @ x.double(), sparsity)

    def loss(matrix):
        return ((matrix.double() - weight.double()) @ x.double().T).square().sum().item()

    assert loss(pruned) == pytest.approx(loss(torch.from_numpy(expected)), rel=0.01)
