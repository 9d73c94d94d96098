"""Every tiny architecture, built once: carried block by block, pruned, saved, without neurons."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny
import torch
from support import (
    CPU,
    layout_of,
    loaded,
    patches,
    prune_,
    representative,
    runner_of,
    through,
    windows,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lib.methods.sparsity import NEURONS
from lib.model.checkpoint import Checkpoint
from lib.model.parts import find_parts, keep_parts_
from lib.model.skeleton import build_skeleton, decoder_blocks
from lib.prune import Pruner
from lib.util.errors import UserError

METHODS = ("magnitude", "sparsegpt", "admm")  # wanda takes the inputs that sparsegpt takes
# one of each: plain, biases, transposed, fused, a forward of its own, experts, states, towers
QUICK = "Llama|Gemma 2|Phi|GPT-2|Falcon|Mixtral|GPT-OSS|DeepSeek-V3|Gemma 4|Mamba|Zamba2|Qwen3-VL"
OF_EXPERTS = "Mixtral|Qwen2-MoE|Qwen3-MoE|OLMoE|GPT-OSS|GraniteMoE|JetMoE|PhiMoE|DeepSeek-V3|Jamba"
OF_EXPERTS = [*OF_EXPERTS.split("|"), "GraniteMoE hybrid", "Qwen 3.5 MoE multimodal"]
WITHOUT_NEURONS = ["BLOOM", "MPT", "Mamba", "Mamba 2", "Zamba2"]
pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=windows(5), use_cache=False).logits


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """{name: weight} of all matrices in the decoder blocks but routers: what is to be pruned."""
    name, blocks = decoder_blocks(model)
    found = {}
    for path, module in blocks.named_modules(prefix=name):
        if isinstance(module, nn.Linear | Conv1D):
            found[f"{path}.weight"] = module.weight
        elif type(module).__name__.endswith("Experts"):
            found |= {f"{path}.{n}": p for n, p in module.named_parameters() if p.dim() == 3}
    routers = ("router", "expert_gate")
    return {name: w for name, w in found.items() if not any(word in name for word in routers)}


def is_among(parameter: str, names: Iterable[str]) -> bool:
    """Whether a parameter, its linear or its first expert is among the names."""
    known = (parameter, parameter.removesuffix(".weight"), f"{parameter}.0")
    return not set(names).isdisjoint(known)


@pytest.mark.parametrize("name", representative(tiny.ALL, QUICK.split("|")))
def test_an_architecture(name: str, tmp_path: Path) -> None:
    dense = tiny.ALL[name]()
    before = logits(dense)
    assert_carried(dense, before)
    models, off = {}, {}
    for method in METHODS:
        models[method] = copy.deepcopy(dense)
        assert_halved(models[method], prune_(models[method], method), name in tiny.HYBRIDS)
        off[method] = float((logits(models[method]) - before).norm())
    # the more a method makes up for, the nearer: it mixes up no inputs, in any kind of block
    assert off["admm"] < 0.95 * off["sparsegpt"] and off["sparsegpt"] < off["magnitude"]
    assert off["magnitude"] > 0.1 * float(before.norm())
    assert_saved(models["sparsegpt"], dense, tmp_path)
    if name in (*OF_EXPERTS, *WITHOUT_NEURONS):
        with pytest.raises(UserError) as caught:
            layout_of(NEURONS, dense)
        assert "--sparsity_type neurons" in caught.value.what
        assert ("experts" in str(caught.value)) == (name in OF_EXPERTS)
    else:
        assert_neurons_go(dense)


def assert_carried(model: PreTrainedModel, expected: Tensor) -> None:
    """In batches of three and chunks of positions it computes the model's own logits."""
    runner = runner_of(model)
    runner.verify()
    found = through(runner, windows(5), torch.arange(24))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not patches(model) and torch.equal(logits(model), expected)


def assert_halved(model: PreTrainedModel, done: Pruner, some_left: bool) -> None:
    """Half of every matrix goes, or it is reported."""
    found = matrices(model)
    left = {parameter for parameter in found if is_among(parameter, done.left_dense)}
    assert len(left) < len(found) / 3 if some_left else not left
    for parameter in found.keys() - left:
        assert (found[parameter] == 0).sum() * 2 == found[parameter].numel(), parameter
    assert all(reason for _, reason in done.left_dense.values()) and not patches(model)
    name, blocks = decoder_blocks(model)
    for parameter, weight in blocks.named_parameters(prefix=name):
        if weight.dim() > 1 and not parameter.endswith("bias"):
            assert is_among(parameter, [*done.pruned, *done.left_dense]), parameter


def assert_saved(pruned: PreTrainedModel, dense: PreTrainedModel, folder: Path) -> None:
    """transformers loads it with the same class, weights and logits."""
    pruned.save_pretrained(folder)
    again = loaded(folder)
    assert type(again) is type(pruned)
    torch.testing.assert_close(logits(again), logits(pruned), rtol=1e-6, atol=1e-6)
    original, saved, touched = dense.state_dict(), pruned.state_dict(), matrices(again)
    for parameter, tensor in again.state_dict().items():
        assert torch.equal(tensor, (saved if parameter in touched else original)[parameter])


@torch.no_grad()
def assert_neurons_go(model: PreTrainedModel) -> None:
    """A model without some is one that ignores them, and one made by its config."""
    before = model.config.to_dict()
    layout = layout_of(NEURONS, model)
    assert model.config.to_dict() == before
    name, blocks = decoder_blocks(model)
    assert len(layout.modules) == len(blocks)
    for parameter in model.parameters():  # biases that are zeros would hide a wrong one
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator(CPU)))
    kept = torch.tensor([0, 3, 4, *range(9, layout.count - 1, 2)])
    ignored = sorted(set(range(layout.count)) - set(kept.tolist()))
    ignoring = copy.deepcopy(model)
    for block, path in zip(decoder_blocks(ignoring)[1], layout.modules, strict=True):
        down = block.get_submodule(path)
        (down.weight if isinstance(down, Conv1D) else down.weight.T)[ignored] = 0
    for index, block in enumerate(blocks):
        keep_parts_(block, layout, index, f"{name}.{index}", kept)
    setattr(model.config.get_text_config(decoder=True), layout.field, len(kept))
    anew = type(model)(model.config).eval()
    anew.load_state_dict(model.state_dict())
    expected = logits(ignoring)
    for smaller in (model, anew):
        assert (logits(smaller) - expected).norm() < 1e-4 * expected.norm()


def test_quantized_models_lose_no_neurons() -> None:
    model = tiny.tiny_llama()
    bare, config = build_skeleton(model.config, Checkpoint("model")), copy.deepcopy(model.config)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="quantized"):
        find_parts(NEURONS, config, Checkpoint("model"), bare, decoder_blocks(bare)[0])


@pytest.mark.parametrize("name", representative(["Mixtral", "Qwen2-MoE", "GPT-OSS"], ["GPT-OSS"]))
def test_each_expert_is_pruned_by_the_tokens_routed_to_it(name: str) -> None:
    model, pruned = tiny.ALL[name](), tiny.ALL[name]()
    prune_(pruned)
    path = next(path for path, _ in model.named_modules() if path.endswith("experts"))
    experts, calls = model.get_submodule(path), []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    logits(model)
    handle.remove()
    hidden, chosen, *_ = calls[0]  # (tokens, hidden), (tokens, experts per token)
    for expert in range(4):
        x = hidden[(chosen == expert).any(-1)]
        before = experts.gate_up_proj[expert]
        after = pruned.get_submodule(path).gate_up_proj[expert]
        if name == "GPT-OSS":  # keeps (in, out)
            before, after = before.T, after.T
        lowest = (before.abs() * x.norm(dim=0)).argsort()[:, : x.shape[1] // 2]
        assert torch.equal(after, before.scatter(1, lowest, 0))
