"""What pruning reports and keeps: warnings name their linears, and nothing is lost when resumed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
import torch
from support import CPU, HALF, prune_, runner_of, windows

from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda
from lib.model.blocks import BlockRunner
from lib.model.pretrained import decoder_blocks
from lib.model.run_folder import RunFolder
from lib.model.store import BlockStore
from lib.pruning.check import measure
from lib.util.errors import RunWarning, UserError


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_finished_blocks_keep_what_they_reported(method: str, tmp_path: Path) -> None:
    folder = RunFolder("--resume", tmp_path / "blocks")
    folder.begin({})
    found = []
    for _ in range(2):  # the second run finds the first block finished
        model = tiny.ARCHITECTURES["Mixtral"]()
        store = BlockStore(decoder_blocks(model)[1], CPU, finished=folder, resumes=True)
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
    assert measure(runner, target).overall == 0.5
    weight = runner.model.get_submodule(name).weight.data
    weight[0, :4] = 1
    with pytest.raises(UserError, match=f"{name}: 1 of 512 groups are not 2:4"):
        measure(runner, target)
    weight[:8] = 1
    with pytest.raises(UserError, match=f"{name}: only 0.4375 of its weights are zero, 0.5 was"):
        measure(runner, dict.fromkeys(done.pruned, HALF))
    measure(runner, target, frozenset([name]))  # left dense: only counted
