"""Masks against a stable sort, row by row; the cases where comparison groups disagree."""

import pytest
import torch

from lib.methods import sparsity as module
from lib.methods.sparsity import Sparsity, lowest_per_row, n_of_first


def by_sorting(row: list[float], count: int) -> list[bool]:
    """Python's sort is stable: of equal scores the first goes."""
    pruned = sorted(range(len(row)), key=row.__getitem__)[:count]
    return [i in pruned for i in range(len(row))]


def scores(rows: int, columns: int, ties: bool, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    score = torch.rand(rows, columns, generator=generator)
    return (score * 4).floor().to(dtype) if ties else score.to(dtype)


with_ties = pytest.mark.parametrize("ties", [False, True])
counts = pytest.mark.parametrize("count", [0, 1, 7, 12, 23, 24])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@with_ties
@counts
def test_lowest_per_row(count, ties, dtype):
    score = scores(9, 24, ties, dtype)
    expected = [by_sorting(row, count) for row in score.tolist()]
    assert lowest_per_row(score, count).tolist() == expected


@with_ties
@pytest.mark.parametrize("ratio", [0.0, 0.005, 0.463, 0.996, 1.0])
def test_lowest_overall(ratio, ties):
    score = scores(9, 40, ties)[:, 8:32]  # not contiguous
    count = int(9 * 24 * ratio)
    expected = torch.tensor(by_sorting(score.flatten().tolist(), count)).view(9, 24)
    assert torch.equal(Sparsity(ratio).mask(score, overall=True), expected)


@with_ties
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4), (3, 4), (0, 4), (1, 1)])
def test_n_of_m(n, m, ties):
    score = scores(9, 24, ties)
    groups = score.view(-1, m).tolist()
    expected = torch.tensor([by_sorting(group, n) for group in groups]).view(9, 24)
    assert torch.equal(Sparsity(n / m, n, m).mask(score), expected)
    first = score.view(-1, m).T  # (m, groups)
    assert torch.equal(n_of_first(first, n), expected.view(-1, m).T)


@pytest.mark.parametrize("shape", ["spread", "ties", "sorted", "one"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.7, 1.0])
def test_a_threshold_among_few_is_that_of_all(shape, share):
    """Of many scores, selected near where a sample has it, against sorting them."""
    score = torch.rand(400, 300, generator=torch.Generator().manual_seed(0))
    if shape == "ties":
        score = (score * 5).floor()
    elif shape == "sorted":  # the sample tells little of where the others are
        score = score.flatten().sort().values.view(400, 300) ** 8
    elif shape == "one":
        score = torch.full_like(score, 0.3)
    count = int(share * score.numel())
    ordered = score.flatten().sort().values
    assert module.threshold(score, count) == (ordered[count - 1].item() if count else -1)
    first = score.flatten().sort(stable=True).indices[:count]
    expected = torch.zeros(120000, dtype=torch.bool).scatter_(0, first, True)
    assert torch.equal(Sparsity(share).mask(score, overall=True).flatten(), expected)
