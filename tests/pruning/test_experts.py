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

    def route(_, args: tuple) -> tuple:
        hidden, index, weights = args
        pair = torch.tensor(chosen)[torch.arange(2 * len(index)).view(-1, 2) % len(chosen)]
        return hidden, pair.to(index.dtype), weights

    model.get_submodule(FIRST).register_forward_pre_hook(route)
    return model


def pruned(model: nn.Module, method: str, ids: Tensor) -> tuple[Tensor, list[str]]:
    """The first block's gate and up matrices (experts, ., .), and the summary's lines.

    Their inputs are those of all methods: what comes before is dense.
    """
    model = copy.deepcopy(model)
    done = prune_(model, method, ids=ids)
    return model.get_submodule(FIRST).gate_up_proj, done.summary()


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_few_tokens_fall_back_to_wanda_and_none_to_magnitude(method: str) -> None:
    model = mixtral([0, 1, 2])
    ids = windows(3, 8)  # 24 tokens, 16 for each of three experts: fewer than their 32 inputs
    ours, lines = pruned(model, method, ids)
    wanda, _ = pruned(model, "wanda", ids)
    magnitude, _ = pruned(model, "magnitude", ids)
    if method == "sparsegpt":  # admm observes after it has pruned the attention
        assert torch.equal(ours[:3], wanda[:3])
    assert torch.equal(ours[3], magnitude[3])
    assert not torch.equal(wanda[0], magnitude[0])
    for fallback, expert in (("wanda", 0), ("magnitude", 3)):
        [line] = [one for one in lines if one.startswith(f"pruned by {fallback}, too few tokens")]
        assert f"{FIRST}.gate_up_proj.{expert}" in line


def test_experts_with_enough_tokens_are_pruned_by_the_method_itself() -> None:
    model, ids = mixtral([0, 1, 2, 3]), windows(12, 24)  # 144 tokens for each expert
    ours, lines = pruned(model, "sparsegpt", ids)
    wanda, _ = pruned(model, "wanda", ids)
    assert not torch.equal(ours[0], wanda[0])
    assert not any("too few tokens" in line and f"{FIRST}." in line for line in lines)


def test_experts_that_no_token_reaches_at_all_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a router's weights are broken: nothing is known of their inputs."""
    model = tiny.ARCHITECTURES["Mixtral"]()
    experts = model.get_submodule(FIRST)
    monkeypatch.setattr(experts, "forward", lambda hidden, *_: torch.zeros_like(hidden))
    with pytest.raises(UserError, match="no calibration token was routed to them.*--nsamples"):
        prune_(model, "wanda", ids=windows(2, 8))
