"""`--depth`: after each block, the model is the pruned one up to there and the dense one beyond."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from support import ALONE, CPU, QUICK, call, results, runner_of, windows

from lib.run.depth import WINDOWS, Depth

pytestmark = pytest.mark.usefixtures("elsewhere")


@torch.no_grad()
def test_each_figure_is_of_the_blocks_pruned_so_far() -> None:
    model = tiny.tiny_llama(num_hidden_layers=3)
    dense, runner, ids = copy.deepcopy(model).double(), runner_of(model), windows(6)
    test = SimpleNamespace(windows=ids, facts={"name": "uk"})
    job = SimpleNamespace(
        texts=SimpleNamespace(tests=[test]),
        batch_size=3,
        dist=ALONE,
        timed=lambda step: nullcontext(),
    )
    depth = Depth(job, SimpleNamespace(runner=runner, state_device=CPU), runner)
    expected = []
    log_q = dense(ids[:WINDOWS]).logits[:, :-1].log_softmax(-1)
    for block, untouched in zip(model.model.layers, dense.model.layers, strict=True):
        for own, other in ((block.mlp, untouched.mlp), (block.self_attn, untouched.self_attn)):
            for linear, copied in zip(own.children(), other.children(), strict=False):
                if isinstance(linear, torch.nn.Linear):
                    linear.weight[:, ::2] = 0
                    copied.weight[:, ::2] = 0
        depth.after_block()
        log_p = dense(ids[:WINDOWS]).logits[:, :-1].log_softmax(-1)
        expected.append((log_q.exp() * (log_q - log_p)).sum(-1).mean().item())
    [record] = depth.records()
    assert record["kl"] == pytest.approx(expected, rel=1e-3) and len(set(expected)) == 3
    assert record["windows"] == WINDOWS and all(0 <= x <= 1 for x in record["top1_agreement"])


@pytest.mark.parametrize("kind", ["unstructured", "neurons"])
def test_a_run_ends_where_its_evaluation_does(kind: str) -> None:
    model = tiny.write_model("model", tiny.tiny_llama(num_hidden_layers=3, intermediate_size=128))
    uk = tiny.write_texts("uk", 40, tiny.sentences(1, words=30))
    flags = ["--prune_method", "wanda", "--sparsity_type", kind, "--calibration_data", uk]
    done = call("--model", model, *QUICK, *flags, "--depth", "--batch_size", "2")
    assert done.status == 0, done.err
    [record], [evaluation] = results()["depth"], results()["evaluation"]
    assert evaluation["compared_windows"] == record["windows"] <= WINDOWS
    assert len(record["kl"]) == 3 and record["kl"][0] < record["kl"][-1]
    assert record["kl"][-1] == pytest.approx(evaluation["kl"], rel=1e-6)


def test_it_is_refused_where_nothing_is_pruned() -> None:
    done = call("--model", "model", *QUICK, "--eval_only", "--depth")
    assert done.status == 2
    assert "--depth: is for --prune_method, which is not given" in done.complaints[-1]
