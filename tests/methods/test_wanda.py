"""Wanda and magnitude against their rules, written out slowly."""

from __future__ import annotations

import pytest
import torch
from published import published_mask
from support import CPU
from torch import Tensor

from lib.methods.magnitude import Magnitude
from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda, WandaVariant

KINDS = [("unstructured", ratio) for ratio in (0.0, 0.3, 0.5, 0.99)] + [("2:4", 0.5), ("4:8", 0.5)]


def published_variant(weight: Tensor, norms: Tensor, ratio: float) -> Tensor:
    """The authors' bisection: rows drop their smallest scores up to a share alpha of their sum."""
    score = (weight.double().abs() * norms.double()).tolist()

    def masked(alpha: float) -> Tensor:
        mask = torch.zeros_like(weight, dtype=torch.bool)
        for i, row in enumerate(score):
            spent = 0.0
            for j in sorted(range(len(row)), key=row.__getitem__):
                spent += row[j]
                if spent > alpha * sum(row):
                    break
                mask[i, j] = True
        return mask

    alpha, low, high = 0.4, 0.0, 0.8
    mask = masked(alpha)
    while abs(mask.double().mean().item() - ratio) > 0.001 and high - low >= 0.001:
        if mask.double().mean().item() > ratio:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask = masked(alpha)
    return mask


def layer(rows: int = 24, width: int = 40, tokens: int = 50) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and inputs (tokens, in) whose channels differ much in size."""
    generator = torch.Generator().manual_seed(rows)
    scales = torch.logspace(-2, 2, width)[torch.randperm(width, generator=generator)]
    weight = torch.randn(rows, width, generator=generator)
    return weight, torch.randn(tokens, width, generator=generator) * scales


def pruned(weight: Tensor, x: Tensor, sparsity: Sparsity, method: type[Wanda] = Wanda) -> Tensor:
    solver, weight = method(weight.shape[1], CPU), weight.clone()
    solver.observe(x)
    solver.prune_([weight], [sparsity])
    return weight


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_published_masks(kind: str, ratio: float) -> None:
    weight, x = layer()
    x[:, 7] = 0
    sparsity = Sparsity.parse(kind, ratio)
    mask = published_mask(weight, x.double().norm(dim=0), sparsity)
    assert torch.equal(pruned(weight, x, sparsity), weight.masked_fill(mask, 0))
    assert mask.sum() == 24 * int(40 * ratio)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.99])
def test_published_variant(ratio: float) -> None:
    weight, x = layer()
    mask = published_variant(weight, x.double().norm(dim=0), ratio)
    found = pruned(weight, x, Sparsity(ratio), WandaVariant)
    assert torch.equal(found, weight.masked_fill(mask, 0))
    if ratio in (0.3, 0.5):
        assert abs(mask.double().mean() - ratio) < 0.02
        assert len(set(mask.sum(1).tolist())) > 1  # rows have shares of their own


def test_by_hand() -> None:
    """Norms 2 and 3, not their squares 4 and 9; each row by itself, not the layer."""
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # (tokens, in)
    weight = torch.tensor([[-5.0, 3.0], [1.0, 0.5]])
    # scores are [[10, 9], [2, 1.5]]: each row loses its second weight; by squares
    # [[20, 27], [4, 4.5]] each would lose its first, and the whole layer its second row
    assert pruned(weight, x, Sparsity(0.5)).tolist() == [[-5, 0], [1, 0]]
    x = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    weight = torch.tensor([[5.0, 3.0, 9.5, 0.0]])  # scores 10, 9, 9.5, 0; by squares 20, 27, 9.5, 0
    assert pruned(weight, x, Sparsity(0.5, 2, 4)).tolist() == [[5, 0, 9.5, 0]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_sums_are_the_same_whatever_the_batch(count: int) -> None:
    """Bit by bit, for windows of a multiple of 64 tokens, and exact to a few roundings."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6 * 128, 40, generator=generator) * torch.logspace(0, 3, 40)
    one, many = Wanda(40, CPU), Wanda(40, CPU)
    one.observe(x)
    for batch in x.split(count * 128):
        many.observe(batch)
    many.observe(torch.ones(0, 40))
    assert torch.equal(one.square_sum, many.square_sum) and one.tokens == many.tokens == 768
    torch.testing.assert_close(one.square_sum, x.double().square().sum(0), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 64, 70])
def test_squares_of_halves_do_not_overflow(dtype: torch.dtype, tokens: int) -> None:
    x = (torch.randn(tokens, 40) * 400).to(dtype)
    wanda = Wanda(40, CPU)
    wanda.observe(x)
    torch.testing.assert_close(wanda.square_sum, x.double().square().sum(0), rtol=1e-6, atol=0)


def test_magnitude_by_hand() -> None:
    """The whole matrix is compared, or each group; of equal ones the first go."""
    weight = torch.tensor([[5.0, -1.0, 4.0, 3.0], [-1.0, 2.0, 6.0, -1.0]])
    for sparsity, expected in (
        (Sparsity(0.25), [[5, 0, 4, 3], [0, 2, 6, -1]]),
        (Sparsity(0.5, 2, 4), [[5, 0, 4, 0], [0, 2, 6, 0]]),
    ):
        found = weight.clone()
        Magnitude(4, CPU).prune_([found], [sparsity])
        assert found.tolist() == expected
