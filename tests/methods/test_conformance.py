"""What every method of METHODS does, and random scores do not: a new one is tested by its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from support import CPU, loaded
from torch import Tensor

from lib.methods.base import PruningMethod
from lib.methods.registry import METHODS, method_of
from lib.methods.sparsity import Sparsity

COMPARISON = {"magnitude"}  # looks at no text: only as good as weights are telling
IN_ORDER = {"sparsegpt"}  # takes one input after another: another order is another mask
TIES_GO = {"admm"}  # unstructured, weights that tie with the last that goes go too
MARGIN = 0.6  # of random's error; Wanda has about 0.4 of it
KINDS = {"50%": Sparsity(0.5), "2:4": Sparsity(0.5, 2, 4), "4:8": Sparsity(0.5, 4, 8)}
by_method = pytest.mark.parametrize("name", METHODS)
by_kind = pytest.mark.parametrize("sparsity", KINDS.values(), ids=KINDS)
Layers = list[tuple[Tensor, Tensor]]


class Noise(PruningMethod):
    """What must not pass."""

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        draw = torch.Generator().manual_seed(0)
        for weight, sparsity in zip(weights, sparsities, strict=True):
            weight[sparsity.mask(torch.rand(weight.shape, generator=draw))] = 0


@pytest.fixture(scope="module")
def layers(trained: Path) -> Layers:
    """Weight (out, in) and inputs (tokens, in) of layers of a trained model, on text."""
    model, tokenizer = loaded(trained), tiny.tiny_tokenizer()
    texts = (tokenizer(text, return_tensors="pt").input_ids[0] for text in tiny.sentences(40))
    ids = torch.cat([*texts])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    found = []
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        linear, seen = model.get_submodule(f"model.layers.1.{path}"), []
        handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        x = seen[0].flatten(0, 1)
        found.append((linear.weight.data.clone(), x[: len(x) // 192 * 192]))
    return found


@torch.no_grad()
def pruned(
    method: type[PruningMethod], weight: Tensor, x: Tensor, sparsity: Sparsity, batch: int = 0
) -> Tensor:
    solver, weight = method(weight.shape[1], CPU), weight.clone()
    for part in x.split(batch or len(x)):
        solver.observe(part, **{"dense": part} if method.dense_stream else {})
    solver.prune_([weight], [sparsity])
    return weight


def assert_better_than_random(method: type[PruningMethod], layers: Layers, sparsity: Sparsity):
    for weight, x in layers:
        exact = x.double() @ weight.double().T
        ours, random = (
            float((exact - x.double() @ pruned(each, weight, x, sparsity).double().T).norm()) ** 2
            for each in (method, Noise)
        )
        assert ours < MARGIN * random


@by_kind
def test_random_masks_fail(sparsity: Sparsity, layers: Layers) -> None:
    with pytest.raises(AssertionError):
        assert_better_than_random(Noise, layers, sparsity)


@by_method
@by_kind
def test_a_method(name: str, sparsity: Sparsity, layers: Layers) -> None:
    """Its errors are small; dead inputs go first; masks follow another order of inputs (of N:M of
    whole groups) and outputs, and depend on no batch."""
    method, draw = method_of(name), torch.Generator().manual_seed(1)
    if name not in COMPARISON:
        assert_better_than_random(method, layers, sparsity)
    for weight, x in layers:
        mask = pruned(method, weight, x, sparsity) == 0
        other = pruned(method, weight, x, sparsity, batch=192) == 0
        assert (mask != other).float().mean() < 2e-3  # by rounding
        m = sparsity.m or 1
        groups = torch.randperm(weight.shape[1] // m, generator=draw)
        columns = (groups[:, None] * m + torch.arange(m)).flatten()
        rows = torch.randperm(len(weight), generator=draw)
        if name in IN_ORDER:
            columns = torch.arange(weight.shape[1])
        moved = pruned(method, weight[rows][:, columns], x[:, columns], sparsity) == 0
        assert (moved != mask[rows][:, columns]).float().mean() < 2e-3
        if name not in COMPARISON:
            dead = x.clone()
            dead[:, ::8] = 0
            assert not pruned(method, weight, dead, sparsity)[:, ::8].any()


@by_method
def test_as_many_go_as_are_asked(name: str, layers: Layers) -> None:
    """Rounded down: once for a matrix, a row or a block of columns. Also where all are alike."""
    method, alike = method_of(name), (torch.ones(16, 32), torch.eye(32).repeat(8, 1))
    for weight, x in [*layers, alike]:
        for ratio in (0.0, 0.3, 0.5, 0.99) if weight is not alike[0] else (0.5,):
            zeros = int((pruned(method, weight, x, Sparsity(ratio)) == 0).sum())
            missing = ratio * weight.numel() - zeros
            assert 0 <= missing < max(weight.shape) or name in TIES_GO and weight is alike[0]
        for n, m in ((2, 4), (4, 8)):
            zero = pruned(method, weight, x, Sparsity(0.5, n, m)) == 0
            assert (zero.unflatten(1, (-1, m)).sum(-1) == n).all()
