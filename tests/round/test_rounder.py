"""A pruned model rounded block by block, on every architecture: what is rounded, and to what."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import ALONE, CPU, prune_, runner_of, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.methods.registry import ROUNDING, MethodSpec
from lib.methods.rounding import Rounding
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.packed.grid import dequantise, quantise
from lib.packed.linear import SparseLinear
from lib.prune import UNREACHED
from lib.pruning.observe import rows
from lib.round import Rounder
from lib.sparse import packed_weights, swap_linears_
from lib.util.errors import UserError

TWO_FOUR = Sparsity(0.5, 2, 4)


def pruned(model: PreTrainedModel) -> BlockRunner:
    runner = runner_of(model.requires_grad_(False))
    prune_(runner, "wanda", TWO_FOUR)
    return runner


def round_(runner: BlockRunner, bits: int = 4, batch_size: int = 3, cache: bool = True) -> Rounder:
    rounder = Rounder(runner, MethodSpec(ROUNDING, {"bits": bits}), dist=ALONE)
    rounder.run(windows(5), batch_size, cache_inputs=cache)
    return rounder


def parameters(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.data.clone() for name, parameter in named}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", tiny.ALL)
def test_what_is_rounded_is_what_is_packed(name: str, bits: int) -> None:
    runner = pruned(tiny.ALL[name]())
    before, names = parameters(runner.model), packed_weights(runner.blocks, runner.name)
    if name == "Falcon":  # its linears have a forward of their own, and none is packed
        with pytest.raises(UserError, match="no linear is smaller packed"):
            round_(runner, bits)
        return
    rounder = round_(runner, bits)
    after = parameters(runner.model)
    reached = {f"{linear}.weight" for linear in rounder.done.pruned}
    assert reached <= names.keys() and len(reached) > len(names) / 2
    shared = {after_id(runner.model, key) for key in reached}
    for key, weight in before.items():
        if after_id(runner.model, key) in shared:
            assert not torch.equal(after[key], weight), key
            assert bool((after[key][weight == 0] == 0).all()), key
        else:
            assert torch.equal(after[key], weight), key
    swap_linears_(runner.model, runner.blocks, bits=bits, scales=rounder.scales)
    for key in reached:
        module = runner.model.get_submodule(key.removesuffix(".weight"))
        assert isinstance(module, SparseLinear) and module.bits == bits
        dense = module.dense(torch.float32)
        assert torch.equal(dense.T if module.transposed else dense, after[key]), key


def after_id(model: nn.Module, name: str) -> int:
    return model.get_parameter(name).data_ptr()


def test_the_first_linears_are_rounded_by_what_they_receive() -> None:
    runner = pruned(tiny.tiny_llama())
    attention = runner.blocks[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    inputs: list[Tensor] = []
    handle = linears[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        runner.model(input_ids=windows(5), use_cache=False)
    handle.remove()
    [x] = inputs
    method = Rounding(x.shape[-1], CPU)
    method.observe(rows(x))
    expected = [linear.weight.data.clone() for linear in linears]
    method.round_(expected)
    round_(runner)
    for linear, weight in zip(linears, expected, strict=True):
        assert torch.isclose(linear.weight.data, weight).float().mean() > 0.97


@torch.no_grad()
def test_later_linears_make_up_for_what_earlier_ones_lost() -> None:
    """The model stays nearer to what it was than with every linear rounded by itself."""
    runner = pruned(tiny.tiny_llama(num_hidden_layers=4))
    ids = windows(5)
    before = runner.model(input_ids=ids, use_cache=False).logits
    weights = parameters(runner.model)
    for key in packed_weights(runner.blocks, runner.name):
        parameter = runner.model.get_parameter(key)
        parameter.copy_(dequantise(*quantise(parameter), 64))
    nearest = runner.model(input_ids=ids, use_cache=False).logits
    for key, weight in weights.items():
        runner.model.get_parameter(key).copy_(weight)
    round_(runner)
    rounded = runner.model(input_ids=ids, use_cache=False).logits
    assert (rounded - before).norm() < 0.8 * (nearest - before).norm()


@pytest.mark.parametrize("batch_size, cache", [(1, True), (5, True), (3, False)])
def test_batches_and_memory_change_rounding_alone(batch_size: int, cache: bool) -> None:
    one, two = pruned(tiny.tiny_llama()), pruned(tiny.tiny_llama())
    round_(one)
    round_(two, batch_size=batch_size, cache=cache)
    first, second = parameters(one.model), parameters(two.model)
    alike = [torch.isclose(first[key], second[key]).float().mean() for key in first]
    assert min(alike) > 0.9


def test_a_linear_with_few_zeros_stays_as_it_is() -> None:
    model = tiny.tiny_llama()
    kept = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    runner = pruned(model)
    model.model.layers[0].mlp.up_proj.weight.copy_(kept)
    rounder = round_(runner)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, kept)
    assert len(rounder.done.pruned) == 13
    assert rounder.summary() == ["rounded 13 linears to 4 bits, column by column"]


class Unused(nn.Module):
    """A module with a linear that its forward never calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.never = inner, nn.Linear(64, 64)

    def forward(self, *args: object) -> Tensor:
        return self.inner(*args)


def test_what_no_token_reaches_is_named() -> None:
    model = tiny.tiny_llama()
    model.model.layers[0].mlp = Unused(model.model.layers[0].mlp)
    never = model.model.layers[0].mlp.never
    with torch.no_grad():
        never.weight[:, ::2] = 0
    before = never.weight.detach().clone()
    rounder = round_(pruned(model))
    assert torch.equal(never.weight, before)
    line = f"rounded to nearest, {UNREACHED}: model.layers.0.mlp.never"
    assert rounder.summary() == ["rounded 14 linears to 4 bits, column by column", line]


def test_a_model_without_zeros_is_refused_before_any_text_is_read() -> None:
    runner = runner_of(tiny.tiny_llama())
    rounder = Rounder(runner, MethodSpec(ROUNDING, {"bits": 4}), dist=ALONE)
    with pytest.raises(UserError, match="no linear is smaller packed; prune with --prune_method"):
        rounder.run(None, 1)
