"""Magnitude pruning against a sorted list: the whole matrix, or each N:M group."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import CPU, pruner_of, runner_of
from torch import Tensor

from lib.methods.magnitude import Magnitude
from lib.methods.registry import MethodSpec
from lib.methods.sparsity import Sparsity
from lib.model.pretrained import decoder_blocks


def pruned(weight: Tensor, sparsity: Sparsity) -> Tensor:
    weight = weight.clone()
    Magnitude(weight.shape[1], CPU).prune_([weight], [sparsity])
    return weight


def reference(weight: Tensor, sparsity: Sparsity) -> Tensor:
    flat = weight.flatten().tolist()
    step = sparsity.m or len(flat)
    count = sparsity.n or int(len(flat) * sparsity.ratio)
    for start in range(0, len(flat), step):
        group = range(start, start + step)
        for place in sorted(group, key=lambda i: abs(flat[i]))[: count if sparsity.ratio else 0]:
            flat[place] = 0.0
    return torch.tensor(flat).view(weight.shape)


KINDS = [("unstructured", ratio) for ratio in (0.0, 0.3, 0.5, 0.99)] + [("2:4", 0.5), ("4:8", 0.5)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_the_smallest_go(kind: str, ratio: float, ties: bool) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    weight = weight.round() if ties else weight
    sparsity = Sparsity.parse(kind, ratio)
    assert torch.equal(pruned(weight, sparsity), reference(weight, sparsity))


def test_by_hand() -> None:
    """The whole matrix is compared: the first row keeps all, where rows would lose one each."""
    weight = torch.tensor([[-5.0, 3.0], [1.0, 0.5]])
    assert pruned(weight, Sparsity(0.5)).tolist() == [[-5, 3], [0, 0]]
    assert pruned(weight, Sparsity(0.75)).tolist() == [[-5, 0], [0, 0]]


def test_ties_go_from_the_left() -> None:
    assert pruned(-torch.ones(2, 4), Sparsity(0.375)).tolist() == [[0, 0, 0, -1], [-1] * 4]
    assert pruned(torch.ones(1, 8), Sparsity(0.5, 2, 4)).tolist() == [[0, 0, 1, 1] * 2]


@pytest.mark.parametrize("kind", ["unstructured", "2:4", "4:8"])
def test_a_whole_model_without_calibration(kind: str) -> None:
    model = tiny.tiny_llama()
    _, blocks = decoder_blocks(model)
    before = {name: weight.clone() for name, weight in blocks.named_parameters()}
    sparsity = Sparsity.parse(kind, 0.5)
    pruner_of(runner_of(model), MethodSpec("magnitude"), sparsity).run(None, 2)
    for name, weight in blocks.named_parameters():
        expected = reference(before[name], sparsity) if weight.dim() == 2 else before[name]
        assert torch.equal(weight, expected), name
