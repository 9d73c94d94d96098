"""Divergence from the dense model: against full softmaxes in float64, whatever comes between."""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch
from support import QUICK, prune_, representative, results, runner_of, succeed, windows
from torch import Tensor, nn

from lib.eval import perplexities, perplexity
from lib.model.blocks import BlockRunner
from lib.model.reference import DenseReference, dense_states, tail_of

FIGURES = "kl", "kl_standard_error", "top1_agreement", "top1_agreement_standard_error"


def reference_of(runner: BlockRunner, *tests: Tensor) -> DenseReference:
    return DenseReference(tail_of(runner), dense_states(runner, tests))


@torch.no_grad()
def slow(dense: nn.Module, own: nn.Module, ids: Tensor) -> dict[str, float]:
    """By whole forward passes and full softmaxes in float64."""
    q, p = (model(input_ids=ids).logits[:, :-1].double() for model in (dense, own))
    log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean(1)
    same = (q.argmax(-1) == p.argmax(-1)).double().mean(1)
    errors = [(one.std() / len(one) ** 0.5).item() for one in (kl, same)]
    values = kl.mean().item(), errors[0], same.mean().item(), errors[1]
    nats, own = (-one.gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1) for one in (log_q, log_p))
    change = (own - nats).mean().item(), ((own - nats).std() / len(ids) ** 0.5).item()
    more = dict(zip(("loss_change", "loss_change_standard_error"), change, strict=True))
    return dict(zip(FIGURES, values, strict=True)) | more | {"dense_nats": nats.mean().item()}


@torch.no_grad()
def slow_quantiles(dense: nn.Module, model: nn.Module, ids: Tensor) -> dict[str, float]:
    log_q, log_p = (each(ids).logits[:, :-1].double().log_softmax(-1) for each in (dense, model))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).flatten()
    shares = {"median": 0.5, "99%": 0.99, "99.9%": 0.999, "largest": 1.0}
    return {name: kl.quantile(share).item() for name, share in shares.items()}


def assert_like(found: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


CASES = [("Llama", 1, 1), ("Gemma 2", 3, 2**24), ("Mixtral", 8, 4 * tiny.VOCAB * 5)]
OTHERS = [("GPT-2", 3, 1), ("Cohere", 1, 2**24), ("Mamba", 3, 4 * tiny.VOCAB * 5)]


@pytest.mark.parametrize(("name", "batch_size", "room"), representative(CASES + OTHERS, CASES))
def test_as_by_whole_forward_passes(
    name: str, batch_size: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches, and chunks of the head, change nothing."""
    monkeypatch.setattr("lib.model.blocks.LOGIT_BYTES", room)
    monkeypatch.setattr("lib.eval.HEAD_POSITIONS", 7)
    dense, runner = tiny.ALL[name](), runner_of(tiny.ALL[name](), batch_size)
    tests = windows(7), windows(3, tokens=17, seed=4)
    reference = reference_of(runner, *tests)
    prune_(runner)
    found = perplexities(runner, tests, reference=reference)
    for one, ids in zip(found, tests, strict=True):
        assert_like(one, slow(dense, runner.model, ids))
        assert one["kl"] > 0.01 and one["top1_agreement"] < 1
        assert one["kl_of_tokens"] == pytest.approx(slow_quantiles(dense, runner.model, ids), 1e-3)
    assert found[0]["perplexity"] == pytest.approx(perplexity(runner, tests[0]), rel=1e-9)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OLMo 2"])
def test_the_dense_tail_stays_when_the_model_gets_another(name: str) -> None:
    dense, own = tiny.ALL[name](), tiny.ALL[name]()
    runner, ids = runner_of(own), windows(4)
    reference = reference_of(runner, ids)
    blocks = {id(p) for block in runner.blocks for p in block.parameters()}
    with torch.no_grad():
        for parameter in own.parameters():
            if id(parameter) in blocks:
                continue
            if parameter.dim() == 1:
                parameter.mul_(1.5)  # as a recovery would train a norm
            else:
                parameter.data = parameter.data.bfloat16().float()  # as saving or rounding does
    (found,) = perplexities(runner, [ids], reference=reference)
    assert_like(found, slow(dense, own, ids))
    assert found["kl"] > 0


def test_the_tail_holds_no_second_copy_of_the_model() -> None:
    runner = runner_of(tiny.tiny_llama())
    model = tail_of(runner).model
    own = {p.data_ptr() for p in runner.model.parameters()}
    assert all(p.is_meta for block in model.model.layers for p in block.parameters())
    shared = [p for p in model.parameters() if not p.is_meta and p.data_ptr() in own]
    assert len(shared) == 2 and all(p.dim() == 2 for p in shared)
    assert not any(p.is_meta for p in runner.model.parameters())


def test_only_some_windows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.model.reference.COMPARED_WINDOWS", 3)
    dense, runner, ids = tiny.tiny_llama(), runner_of(tiny.tiny_llama()), windows(8)
    reference = reference_of(runner, ids)
    prune_(runner)
    (found,) = perplexities(runner, [ids], reference=reference)
    assert_like(found, slow(dense, runner.model, ids[[0, 2, 5]]))
    assert found["compared_windows"] == 3
    assert sorted(reference.states[0]) == [0, 2, 5]


@pytest.mark.usefixtures("elsewhere")
def test_runs_are_compared_with_what_a_model_was_made_of() -> None:
    """What nothing was pruned from is the dense model; and a model that was pruned before."""
    tiny.write_model("model")
    tiny.write_texts("uk", test=5)
    wanda = ["--model", "model", "--calibration_data", "uk", "--prune_method", "wanda"]
    again = ["--model", "new", "--eval_only", "--teacher", "model", "--completions", "1"]
    runs = {
        "zero": [*wanda, "--sparsity_ratio", 0],
        "pruned": [*wanda, "--save_model", "new"],
        "again": again,
    }
    figures = {}
    for name, flags in runs.items():
        succeed(*QUICK, *flags, "--eval_data", "uk", "--save", name)
        figures[name] = [results(name)["evaluation"][0][figure] for figure in FIGURES]
    assert figures["zero"] == [0, 0, 1, 0]
    assert figures["again"] == pytest.approx(figures["pruned"], rel=1e-4)
    found = results("again")
    assert found["method"] == "pruned before" and "recovery" not in found
    assert all("dense" in one for one in found["completions"])


def test_a_reference_lets_the_dense_model_go() -> None:
    model = tiny.tiny_llama().requires_grad_(False)
    reference = reference_of(runner_of(model), windows(2))
    weight = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    del model
    gc.collect()
    assert weight() is None and reference.states
