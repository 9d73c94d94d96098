"""Experts that few tokens, or none, are routed to are pruned by a simpler method, and named."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from support import prune_, windows
from torch import Tensor, nn

from lib.util.errors import UserError

FIRST = "model.layers.0.mlp.experts"


def mixtral(chosen: list[int]) -> nn.Module:
    """A Mixtral in whose first block every token is routed to two of the experts `chosen`."""
    model = tiny.ARCHITECTURES["Mixtral"]()
    experts = model.get_submodule(FIRST)

    def route(_, args: tuple) -> tuple:
        hidden, index, weights = args
        pair = torch.tensor(chosen)[torch.arange(2 * len(index)).view(-1, 2) % len(chosen)]
        return hidden, pair.to(index.dtype), weights

    experts.register_forward_pre_hook(route)
    return model


def pruned(model: nn.Module, method: str, ids: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """The first block's expert matrices by name (experts, ., .), and the summary's lines."""
    model = copy.deepcopy(model)
    done = prune_(model, method, ids=ids)
    experts = model.get_submodule(FIRST)
    return dict(experts.named_parameters()), done.summary()


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_few_tokens_fall_back_to_wanda_and_none_to_magnitude(method: str) -> None:
    model = mixtral([0, 1, 2])
    ids = windows(3, 8)  # 24 tokens, 16 for each of three experts: fewer than their 32 inputs
    ours, lines = pruned(model, method, ids)
    wanda, _ = pruned(model, "wanda", ids)
    magnitude, _ = pruned(model, "magnitude", ids)
    name = "gate_up_proj"  # its inputs are those of all methods: what comes before is dense
    if method == "sparsegpt":  # admm observes after it has pruned the attention
        for expert in (0, 1, 2):
            assert torch.equal(ours[name][expert], wanda[name][expert])
    assert torch.equal(ours[name][3], magnitude[name][3])
    assert not torch.equal(wanda[name][0], magnitude[name][0])
    [few] = [line for line in lines if line.startswith("pruned by wanda, too few tokens")]
    [none] = [line for line in lines if line.startswith("pruned by magnitude, too few tokens")]
    assert f"{FIRST}.gate_up_proj.0" in few.replace("[", ".").replace("]", "")
    assert f"{FIRST}.gate_up_proj.3" in none.replace("[", ".").replace("]", "")


def test_experts_with_enough_tokens_are_pruned_by_the_method_itself() -> None:
    model = mixtral([0, 1, 2, 3])
    ids = windows(12, 24)  # 144 tokens for each expert
    ours, lines = pruned(model, "sparsegpt", ids)
    wanda, _ = pruned(model, "wanda", ids)
    assert not torch.equal(ours["gate_up_proj"][0], wanda["gate_up_proj"][0])
    assert not any("too few tokens" in line and f"{FIRST}." in line for line in lines)


def test_experts_that_no_token_reaches_at_all_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a router's weights are broken: nothing is known of their inputs."""
    model = tiny.ARCHITECTURES["Mixtral"]()
    experts = model.get_submodule(FIRST)
    with pytest.raises(UserError, match="no calibration token was routed to them.*--nsamples"):
        monkeypatch.setattr(experts, "forward", lambda hidden, *_: torch.zeros_like(hidden))
        prune_(model, "wanda", ids=windows(2, 8))
