"""Magnitude pruning against a sorted list: the whole matrix, or each N:M group."""

from __future__ import annotations

import pytest
import torch
from support import CPU
from torch import Tensor

from lib.methods.magnitude import Magnitude
from lib.methods.sparsity import Sparsity

KINDS = [("unstructured", ratio) for ratio in (0.0, 0.3, 0.5, 0.99)] + [("2:4", 0.5), ("4:8", 0.5)]


def reference(weight: Tensor, sparsity: Sparsity) -> Tensor:
    flat = weight.flatten().tolist()
    step = sparsity.m or len(flat)
    count = sparsity.n or int(len(flat) * sparsity.ratio)
    for start in range(0, len(flat), step):
        group = range(start, start + step)
        for place in sorted(group, key=lambda i: abs(flat[i]))[:count]:
            flat[place] = 0.0
    return torch.tensor(flat).view(weight.shape)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_the_smallest_go_from_the_left(kind: str, ratio: float, ties: bool) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    weight = weight.round() if ties else weight
    sparsity, pruned = Sparsity.parse(kind, ratio), weight.clone()
    Magnitude(40, CPU).prune_([pruned], [sparsity])
    assert torch.equal(pruned, reference(weight, sparsity))
