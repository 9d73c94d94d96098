"""What pruning reports: warnings name their linears, and nothing is lost by an interruption."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
from support import ALONE, CPU, HALF, prune_, windows

from lib.methods.registry import MethodSpec
from lib.methods.wanda import Wanda
from lib.model.blocks import BlockRunner
from lib.model.pretrained import decoder_blocks
from lib.model.weights import BlockWeights
from lib.model.work_folder import WorkFolder
from lib.prune import Pruner
from lib.pruning.allocation import uniform
from lib.util.errors import RunWarning


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


def test_finished_blocks_keep_what_they_reported(tmp_path: Path) -> None:
    folder = WorkFolder("--resume", tmp_path / "blocks")
    folder.begin({})
    summaries = []
    for _ in range(2):  # the second run finds all blocks finished
        model = tiny.ARCHITECTURES["Mixtral"]()
        blocks = decoder_blocks(model)[1]
        weights = BlockWeights(blocks, CPU, finished=folder, resumes=True)
        runner = BlockRunner(model, CPU, weights)
        pruner = Pruner(runner, MethodSpec("sparsegpt"), uniform(runner, HALF), dist=ALONE)
        summaries.append(pruner.run(windows(2, 8), 2).summary())
    folder.close()
    assert any("too few tokens were routed" in line for line in summaries[0])
    assert summaries[0] == summaries[1]
