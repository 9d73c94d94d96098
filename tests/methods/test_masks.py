"""Masks by scores, against slow rules: patterns, Wanda and its variant, RIA, magnitude."""

from __future__ import annotations

import pytest
import torch
from published import published_mask
from support import CPU
from torch import Tensor

from lib.methods import sparsity as module
from lib.methods.magnitude import Magnitude
from lib.methods.registry import method_of
from lib.methods.ria import Ria, relative_importance
from lib.methods.sparsity import Sparsity, lowest_per_row, n_of_first
from lib.methods.wanda import Wanda, WandaVariant

RATIOS = 0.0, 0.3, 0.5, 0.99


def by_sorting(row: list[float], count: int) -> list[bool]:
    """Python's sort is stable: of equal scores the first goes."""
    pruned = sorted(range(len(row)), key=row.__getitem__)[:count]
    return [i in pruned for i in range(len(row))]


def scores(columns: int, ties: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    score = torch.rand(9, columns, generator=torch.Generator().manual_seed(columns))
    return (score * 4).floor().to(dtype) if ties else score.to(dtype)


@pytest.mark.parametrize("ties", [False, True])
def test_the_lowest_go_by_a_stable_sort(ties: bool) -> None:
    """Of each row, of the whole matrix, of groups."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        score = scores(24, ties, dtype)
        for count in (0, 1, 7, 12, 23, 24):
            expected = [by_sorting(row, count) for row in score.tolist()]
            assert lowest_per_row(score, count).tolist() == expected
    score = scores(40, ties)[:, 8:32]  # not contiguous
    for ratio in (0.0, 0.005, 0.463, 0.996, 1.0):
        expected = by_sorting(score.flatten().tolist(), int(9 * 24 * ratio))
        assert Sparsity(ratio).mask(score, overall=True).flatten().tolist() == expected
    score = scores(24, ties)
    for n, m in ((2, 4), (4, 8), (1, 4), (3, 4), (0, 4), (1, 1)):
        expected = torch.tensor([by_sorting(group, n) for group in score.view(-1, m).tolist()])
        assert torch.equal(Sparsity(n / m, n, m).mask(score), expected.view(9, 24))
        assert torch.equal(n_of_first(score.view(-1, m).T, n), expected.T)  # (m, groups)


@pytest.mark.parametrize("shape", ["spread", "ties", "sorted", "one"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.7, 1.0])
def test_a_threshold_among_few_is_that_of_all(shape: str, share: float) -> None:
    """Of many scores, selected near where a sample has it, against sorting them."""
    score = torch.rand(400, 300, generator=torch.Generator().manual_seed(0))
    if shape == "ties":
        score = (score * 5).floor()
    elif shape == "sorted":  # the sample tells little of where the others are
        score = score.flatten().sort().values.view(400, 300) ** 8
    elif shape == "one":
        score = torch.full_like(score, 0.3)
    count = int(share * score.numel())
    ordered = score.flatten().sort(stable=True)
    assert module.threshold(score, count) == (ordered.values[count - 1].item() if count else -1)
    expected = torch.zeros(120000, dtype=torch.bool).scatter_(0, ordered.indices[:count], True)
    assert torch.equal(Sparsity(share).mask(score, overall=True).flatten(), expected)


# --- Wanda


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


def pruned(weight: Tensor, x: Tensor, sparsity: Sparsity, method: type = Wanda) -> Tensor:
    solver, weight = method(weight.shape[1], CPU), weight.clone()
    solver.observe(x)
    solver.prune_([weight], [sparsity])
    return weight


def test_masks_are_the_published_ones() -> None:
    weight, x = layer()
    x[:, 7] = 0
    norms = x.double().norm(dim=0)
    patterns = [Sparsity.parse(kind, 0.5) for kind in ("2:4", "4:8")]
    for sparsity in (*map(Sparsity, RATIOS), *patterns):
        mask = published_mask(weight, norms, sparsity)
        assert torch.equal(pruned(weight, x, sparsity), weight.masked_fill(mask, 0))
        assert mask.sum() == 24 * int(40 * sparsity.ratio)
    weight, x = layer()
    for ratio in RATIOS:
        mask = published_variant(weight, x.double().norm(dim=0), ratio)
        found = pruned(weight, x, Sparsity(ratio), WandaVariant)
        assert torch.equal(found, weight.masked_fill(mask, 0))
        if ratio in (0.3, 0.5):
            assert abs(mask.double().mean() - ratio) < 0.02
            assert len(set(mask.sum(1).tolist())) > 1  # rows have shares of their own


def test_wanda_by_hand() -> None:
    """Norms 2 and 3, not their squares 4 and 9; each row by itself, not the layer."""
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # (tokens, in)
    weight = torch.tensor([[-5.0, 3.0], [1.0, 0.5]])
    # scores are [[10, 9], [2, 1.5]]: each row loses its second weight; by squares
    # [[20, 27], [4, 4.5]] each would lose its first, and the whole layer its second row
    assert pruned(weight, x, Sparsity(0.5)).tolist() == [[-5, 0], [1, 0]]
    x = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    weight = torch.tensor([[5.0, 3.0, 9.5, 0.0]])  # scores 10, 9, 9.5, 0; by squares 20, 27, 9.5, 0
    assert pruned(weight, x, Sparsity(0.5, 2, 4)).tolist() == [[5, 0, 9.5, 0]]


def test_sums_of_squares() -> None:
    """The same bits whatever the batch, for windows of a multiple of 64 tokens; none overflows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6 * 128, 40, generator=generator) * torch.logspace(0, 3, 40)
    one = Wanda(40, CPU)
    one.observe(x)
    torch.testing.assert_close(one.square_sum, x.double().square().sum(0), rtol=2e-7, atol=0)
    for count in (1, 2, 3):
        many = Wanda(40, CPU)
        for batch in (*x.split(count * 128), torch.ones(0, 40)):
            many.observe(batch)
        assert torch.equal(one.square_sum, many.square_sum) and one.tokens == many.tokens == 768
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens in (0, 1, 64, 70):
            x = (torch.randn(tokens, 40) * 400).to(dtype)
            wanda = Wanda(40, CPU)
            wanda.observe(x)
            expected = x.double().square().sum(0)
            torch.testing.assert_close(wanda.square_sum, expected, rtol=1e-6, atol=0)


# --- RIA and magnitude


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_ria_is_the_formula_of_the_paper(alpha: float) -> None:
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
    ria = method_of("ria", arguments=[f"alpha={alpha}"])
    lowest = score.view(6, 2, 4).argsort(-1)[..., :2]
    of_groups = torch.zeros(6, 2, 4).scatter_(-1, lowest, 1).view(6, 8).bool()
    overall = score <= score.flatten().sort().values[23]
    for sparsity, mask in ((Sparsity(0.5), overall), (Sparsity(0.5, 2, 4), of_groups)):
        assert torch.equal(pruned(weight, x, sparsity, ria), weight.masked_fill(mask, 0))


def test_ria_and_magnitude_by_hand() -> None:
    """Column sums are 4 and 4, row sums 4 and 4; then rows and columns of zeros."""
    weight = torch.tensor([[3.0, -1.0], [1.0, 3.0]])
    assert relative_importance(weight).tolist() == [[1.5, 0.5], [0.5, 1.5]]
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert relative_importance(weight).tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert Ria.alpha == 0.5
    weight = torch.tensor([[5.0, -1.0, 4.0, 3.0], [-1.0, 2.0, 6.0, -1.0]])
    for sparsity, expected in (  # the whole matrix is compared; of equal ones the first go
        (Sparsity(0.25), [[5, 0, 4, 3], [0, 2, 6, -1]]),
        (Sparsity(0.375), [[5, 0, 4, 3], [0, 2, 6, 0]]),
        (Sparsity(0.5, 2, 4), [[5, 0, 4, 0], [0, 2, 6, 0]]),
    ):
        found = weight.clone()
        Magnitude(4, CPU).prune_([found], [sparsity])
        assert found.tolist() == expected
