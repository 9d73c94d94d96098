"""What pruning reports and keeps: warnings name their linears, and nothing is lost when resumed."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from support import CPU, HALF, prune_, runner_of, windows
from torch import Tensor, nn

from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda
from lib.model.blocks import BlockRunner
from lib.model.run_folder import RunFolder
from lib.model.store import BlockStore
from lib.pruning.check import SparsityCheck
from lib.util.errors import RunWarning, UserError


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_finished_blocks_keep_what_they_reported(method: str, tmp_path: Path) -> None:
    folder = RunFolder("--resume", tmp_path / "blocks")
    folder.begin({})
    found = []
    for _ in range(2):  # the second run finds the first block finished
        model = tiny.ARCHITECTURES["Mixtral"]()
        store = BlockStore(model, CPU, finished=folder)
        runner = BlockRunner(model, CPU, store)
        done = prune_(runner, method, ids=windows(2, 8))
        found.append((done.summary(), model.state_dict()))
        (tmp_path / "blocks" / "block-00001.safetensors").unlink()
    folder.close()
    assert any("too few tokens were routed" in line for line in found[0][0])
    for summary, state in found[1:]:
        assert summary == found[0][0]
        assert all(torch.equal(tensor, state[name]) for name, tensor in found[0][1].items())


def test_whose_a_warning_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Wanda.prune_

    def warning(self, weights, *rest) -> None:
        if len(weights) == 3:  # q, k and v
            warnings.warn("a kernel is missing", RunWarning, stacklevel=2)
            warnings.warn("is singular", stacklevel=2)
        own(self, weights, *rest)

    monkeypatch.setattr(Wanda, "prune_", warning)
    done = prune_(tiny.tiny_llama(num_hidden_layers=1), "wanda", HALF)
    names = ", ".join(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert done.summary()[1:] == ["a kernel is missing", f"{names}: is singular"]


def test_what_falls_short_is_named() -> None:
    runner = runner_of(tiny.tiny_llama())
    done = prune_(runner, "magnitude", Sparsity(0.5, 2, 4))
    name = "model.layers.1.mlp.up_proj"
    target = dict.fromkeys(done.pruned, Sparsity(0.5, 2, 4))
    assert SparsityCheck(runner, target).overall == 0.5
    weight = runner.model.get_submodule(name).weight.data
    weight[0, :4] = 1
    with pytest.raises(UserError, match=f"{name}: 1 of 512 groups are not 2:4"):
        SparsityCheck(runner, target)
    weight[:8] = 1
    with pytest.raises(
        UserError, match=f"{name}: only 0.4375 of its weights are zero, but 0.5 was"
    ):
        SparsityCheck(runner, dict.fromkeys(done.pruned, HALF))
    SparsityCheck(runner, target, [name])  # left dense: only counted
    measured = SparsityCheck(runner, target, done.pruned)
    runner.model.get_submodule("model.layers.0.mlp.up_proj").weight.data.fill_(1)
    with pytest.raises(UserError, match="it has lost 1024 zeros"):
        measured.recheck(runner)


# --- experts that few tokens, or none, are routed to

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
