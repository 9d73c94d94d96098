"""Every architecture, pruned by every method: how sparse, how near the dense model, and saved."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from support import loaded, prune_, runner_of, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.model.pretrained import decoder_blocks
from lib.prune import Pruner

METHODS = ("magnitude", "sparsegpt", "admm")  # wanda takes the inputs that sparsegpt takes


@cache
def example(name: str, method: str | None) -> tuple[PreTrainedModel, Pruner | None, Tensor]:
    """A model pruned to a half, or dense; what has pruned it, and its logits. Not to be changed."""
    if method is None:
        model, done = tiny.ALL[name](), None
        runner_of(model).verify()
    else:
        model = copy.deepcopy(example(name, None)[0])
        done = prune_(model, method)
    return model, done, logits(model)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=windows(5), use_cache=False).logits


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """{name: weight} of all matrices in the decoder blocks but routers: what is to be pruned."""
    name, blocks = decoder_blocks(model)
    found = {}
    for path, module in blocks.named_modules(prefix=name):
        kind = type(module).__name__
        if isinstance(module, nn.Linear) or kind == "Conv1D":
            found[f"{path}.weight"] = module.weight
        elif kind.endswith("Experts"):
            found |= {f"{path}.{n}": p for n, p in module.named_parameters() if p.dim() == 3}
    routers = ("router", "expert_gate")
    return {name: w for name, w in found.items() if not any(word in name for word in routers)}


def is_among(parameter: str, names: Iterable[str]) -> bool:
    """Whether a parameter, its linear or its first expert is among the names."""
    known = (parameter, parameter.removesuffix(".weight"), f"{parameter}.0")
    return not set(names).isdisjoint(known)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", tiny.ALL)
def test_half_of_every_matrix_goes_or_it_is_reported(name: str, method: str) -> None:
    model, done, _ = example(name, method)
    found = matrices(model)
    left = {parameter for parameter in found if is_among(parameter, done.left_dense)}
    assert len(left) < len(found) / 3 if name in tiny.HYBRIDS else not left
    for parameter in found.keys() - left:
        assert (found[parameter] == 0).sum() * 2 == found[parameter].numel(), parameter
    assert all(reason for _, reason in done.left_dense.values())
    for part in model.modules():
        assert "forward" not in vars(part), part
    blocks_name, blocks = decoder_blocks(model)
    for parameter, weight in blocks.named_parameters(prefix=blocks_name):
        if weight.dim() > 1 and not parameter.endswith("bias"):
            assert is_among(parameter, [*done.pruned, *done.left_dense]), parameter


@pytest.mark.parametrize("name", tiny.ALL)
def test_the_more_a_method_makes_up_for_the_nearer_the_dense_model(name: str) -> None:
    """SparseGPT corrects the weights that stay; ADMM solves for them, in order, beside the dense
    model. So neither mixes up inputs, in any kind of block."""
    before = example(name, None)[2]
    off = {method: float((example(name, method)[2] - before).norm()) for method in METHODS}
    assert off["admm"] < 0.95 * off["sparsegpt"] and off["sparsegpt"] < off["magnitude"]
    assert off["magnitude"] > 0.1 * float(before.norm())


@pytest.mark.parametrize("name", tiny.ALL)
def test_a_pruned_model_survives_a_reload(name: str, tmp_path: Path) -> None:
    pruned, _, expected = example(name, "sparsegpt")
    pruned.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again) is type(pruned)
    torch.testing.assert_close(logits(again), expected, rtol=1e-6, atol=1e-6)
    original, saved = (model.state_dict() for model in (example(name, None)[0], pruned))
    touched = matrices(again)
    for parameter, tensor in again.state_dict().items():
        assert torch.equal(tensor, (saved if parameter in touched else original)[parameter])


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "GPT-OSS"])
def test_each_expert_is_pruned_by_the_tokens_routed_to_it(name: str) -> None:
    model, pruned = example(name, None)[0], example(name, "wanda")[0]
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
