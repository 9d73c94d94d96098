"""A pruned model quantized block by block, on linears of every kind: what is, and to what."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import PACKED, packed_weights, prune_, refused, representative, runner_of, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.calibration.changes import UNREACHED
from lib.formats.registry import FORMATS
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.packed.linear import SparseLinear
from lib.sparse import swap_linears_
from lib.stages.quantize import Quantizer

INT4 = PACKED[4]
# fused, transposed, stacked, shared, and by a forward of their own
NAMES = ["Llama", "Phi-3", "GPT-2", "OPT", "BLOOM", "Falcon", "Mixtral", "GPT-OSS", "DeepSeek-V3"]
QUICK = ["Llama", "GPT-2", "Falcon", "GPT-OSS", "Zamba2"]
NAMES += ["JetMoE", "Mamba", "RWKV", "Jamba", "Zamba2", *tiny.VISION]


def pruned(model: PreTrainedModel) -> BlockRunner:
    runner = runner_of(model.requires_grad_(False))
    prune_(runner, "wanda", Sparsity(0.5, 2, 4))
    return runner


def quantize_(runner: BlockRunner) -> Quantizer:
    quantizer = Quantizer(runner, INT4)
    quantizer.run(windows(5))
    return quantizer


def parameters(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.data.clone() for name, parameter in named}


def test_what_is_rounded_to_nearest_is_told() -> None:
    """Experts that few tokens, or none, are routed to; the others are counted apart."""
    runner = runner_of(tiny.ALL["Mixtral"](hidden_size=64).requires_grad_(False))
    quantizer = Quantizer(runner, FORMATS["q4_0"])
    quantizer.run(windows(2, 8))
    first, *more = quantizer.summary()
    [line] = [line for line in more if "to nearest, too few tokens were routed to them: " in line]
    assert "experts." in line and "wanda" not in str([notes.fallbacks for notes in quantizer.notes])
    nearest, others = (int(each.split()[1]) for each in (line, first))
    assert nearest > 0 and nearest + others == len(quantizer.pruned)


@pytest.mark.parametrize("name", representative(NAMES, QUICK))
def test_what_is_quantized_is_what_is_packed(name: str) -> None:
    runner = pruned(tiny.ALL[name]())
    before, names = parameters(runner.model), packed_weights(runner)
    if name == "Falcon":  # its linears have a forward of their own, and none is packed
        assert "smaller" in refused(quantize_, runner)
        return
    quantizer = quantize_(runner)
    after = parameters(runner.model)
    reached = {f"{linear}.weight" for linear in quantizer.pruned}
    assert reached <= names.keys() and len(reached) > len(names) / 2
    places = {key: runner.model.get_parameter(key).data_ptr() for key in before}
    rounded = {places[key] for key in names}
    for key, weight in before.items():
        assert torch.equal(after[key], weight) == (places[key] not in rounded), key
        if places[key] in rounded:
            assert bool((after[key][weight == 0] == 0).all()), key
    swap_linears_(runner, INT4)
    for key in names:
        module = runner.model.get_submodule(key.removesuffix(".weight"))
        assert isinstance(module, SparseLinear) and module.fmt.bits == 4
        dense = module.dense(torch.float32)
        assert torch.equal(dense.T if module.transposed else dense, after[key]), key


@torch.no_grad()
def test_later_linears_make_up_for_what_earlier_ones_lost() -> None:
    """The model stays nearer to what it was than with every linear rounded by itself."""
    runner = pruned(tiny.tiny_llama(num_hidden_layers=4))
    ids = windows(5)
    before = runner.model(input_ids=ids, use_cache=False).logits
    weights = parameters(runner.model)
    for key in packed_weights(runner):
        parameter = runner.model.get_parameter(key)
        parameter.copy_(INT4.round_to(parameter, INT4.fit_scales(parameter)))
    nearest = runner.model(input_ids=ids, use_cache=False).logits
    for key, weight in weights.items():
        runner.model.get_parameter(key).copy_(weight)
    quantize_(runner)
    quantized = runner.model(input_ids=ids, use_cache=False).logits
    assert (quantized - before).norm() < 0.8 * (nearest - before).norm()


class Unused(nn.Module):
    """A module with a linear that its forward never calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.never = inner, nn.Linear(64, 64)

    def forward(self, *args: object) -> Tensor:
        return self.inner(*args)


@torch.no_grad()
def test_what_is_not_rounded_on_text() -> None:
    """A linear with few zeros is left, and one that no token reaches is rounded by itself."""
    model = tiny.tiny_llama()
    few = model.model.layers[1].mlp.up_proj
    kept = few.weight.clone()
    model.model.layers[0].mlp = Unused(model.model.layers[0].mlp)
    never = model.model.layers[0].mlp.never.weight
    never[:, ::2] = 0
    unreached = never.clone()
    runner = pruned(model)
    few.weight.copy_(kept)
    quantizer = quantize_(runner)
    assert torch.equal(few.weight, kept) and torch.equal(never, INT4.nearest(unreached))
    line = f"quantized to nearest, {UNREACHED}: model.layers.0.mlp.never"
    assert quantizer.summary() == ["quantized 13 linear layers to 4 bits, column by column", line]
