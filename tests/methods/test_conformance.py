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
calibrated = pytest.mark.parametrize("name", [one for one in METHODS if one not in COMPARISON])
by_method = pytest.mark.parametrize("name", METHODS)
by_kind = pytest.mark.parametrize("kind", KINDS)


class Noise(PruningMethod):
    """What must not pass."""

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        draw = torch.Generator().manual_seed(0)
        for weight, sparsity in zip(weights, sparsities, strict=True):
            weight[sparsity.mask(torch.rand(weight.shape, generator=draw))] = 0


@pytest.fixture(scope="module")
def layers(trained: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight (out, in) and inputs (tokens, in) of layers of a trained model, on text."""
    model, tokenizer = loaded(trained), tiny.tiny_tokenizer()
    ids = torch.cat(
        [tokenizer(text, return_tensors="pt").input_ids[0] for text in tiny.sentences(40)]
    )
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    found = []
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        linear, seen = model.get_submodule(f"model.layers.1.{path}"), []
        handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        found.append((linear.weight.data.clone(), seen[0].flatten(0, 1)))
    return found


def pruned(
    method: type[PruningMethod], weight: Tensor, x: Tensor, sparsity: Sparsity, batch: int = 0
) -> Tensor:
    solver, weight = method(weight.shape[1], CPU), weight.clone()
    for part in x.split(batch or len(x)):
        solver.observe(part, **{"dense": part} if method.dense_stream else {})
    with torch.no_grad():
        solver.prune_([weight], [sparsity])
    return weight


def error(weight: Tensor, changed: Tensor, x: Tensor) -> float:
    x = x.double()
    return float((x @ (weight - changed).double().T).norm() / (x @ weight.double().T).norm()) ** 2


def beats_random(method: type[PruningMethod], layers: list, sparsity: Sparsity) -> None:
    for weight, x in layers:
        ours, random = (
            error(weight, pruned(each, weight, x, sparsity), x) for each in (method, Noise)
        )
        assert ours < MARGIN * random


@calibrated
@by_kind
def test_outputs_are_nearer_than_by_random_masks(name: str, kind: str, layers: list) -> None:
    beats_random(method_of(name), layers, KINDS[kind])


@by_kind
def test_random_masks_fail(kind: str, layers: list) -> None:
    with pytest.raises(AssertionError):
        beats_random(Noise, layers, KINDS[kind])


@by_method
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.99])
def test_as_many_go_as_are_asked(name: str, ratio: float, layers: list) -> None:
    """Rounded down: once for a matrix, a row or a block of columns."""
    for weight, x in layers:
        zeros = int((pruned(method_of(name), weight, x, Sparsity(ratio)) == 0).sum())
        assert 0 <= ratio * weight.numel() - zeros < max(weight.shape)


@by_method
@pytest.mark.parametrize("kind", ["2:4", "4:8"])
def test_every_group_loses_as_many(name: str, kind: str, layers: list) -> None:
    sparsity = KINDS[kind]
    for weight, x in layers:
        zero = pruned(method_of(name), weight, x, sparsity) == 0
        assert (zero.unflatten(1, (-1, sparsity.m)).sum(-1) == sparsity.n).all()


@by_method
@by_kind
def test_ties(name: str, kind: str) -> None:
    """All weights and all inputs are alike: as many go all the same."""
    weight, sparsity = torch.ones(16, 32), KINDS[kind]
    zero = pruned(method_of(name), weight, torch.eye(32).repeat(8, 1), sparsity) == 0
    if sparsity.m:
        assert (zero.unflatten(1, (-1, sparsity.m)).sum(-1) == sparsity.n).all()
    else:
        assert zero.float().mean() == 0.5 or (name in TIES_GO and zero.float().mean() >= 0.5)


@by_method
@by_kind
def test_inputs_and_outputs_in_another_order(name: str, kind: str, layers: list) -> None:
    """Masks follow: of N:M whole groups change places."""
    draw, sparsity = torch.Generator().manual_seed(1), KINDS[kind]
    for weight, x in layers:
        m = sparsity.m or 1
        groups = torch.randperm(weight.shape[1] // m, generator=draw)
        columns = (groups[:, None] * m + torch.arange(m)).flatten()
        rows = torch.randperm(len(weight), generator=draw)
        if name in IN_ORDER:
            columns = torch.arange(weight.shape[1])
        mask = pruned(method_of(name), weight, x, sparsity) == 0
        moved = pruned(method_of(name), weight[rows][:, columns], x[:, columns], sparsity) == 0
        assert (moved != mask[rows][:, columns]).float().mean() < 2e-3  # by rounding


@calibrated
@by_kind
def test_weights_of_dead_inputs_go_first(name: str, kind: str, layers: list) -> None:
    for weight, x in layers:
        x = x.clone()
        x[:, ::8] = 0
        assert not pruned(method_of(name), weight, x, KINDS[kind])[:, ::8].any()


@by_method
@by_kind
def test_the_batch_size_changes_nothing(name: str, kind: str, layers: list) -> None:
    for weight, x in layers:
        x = x[: len(x) // 192 * 192]
        one, many = (
            pruned(method_of(name), weight, x, KINDS[kind], batch) == 0 for batch in (0, 192)
        )
        assert (one != many).float().mean() < 2e-3  # by rounding
