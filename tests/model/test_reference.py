"""Divergence from the dense model: against full softmaxes in float64, whatever comes between."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, prune_, results, runner_of, succeed, windows
from torch import Tensor, nn

from lib.eval import perplexities, perplexity
from lib.model.blocks import BlockRunner
from lib.model.reference import DenseReference, dense_states, tail_of

FIGURES = "kl", "kl_standard_error", "top1_agreement", "top1_agreement_standard_error"
CALIBRATED = ["--calibration_data", "uk", "--eval_data", "uk", "en"]


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


def assert_like(found: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-2", "Mixtral", "Cohere", "Mamba"])
def test_as_by_whole_forward_passes(name: str) -> None:
    dense, pruned = tiny.ALL[name](), tiny.ALL[name]()
    tests = windows(5), windows(3, tokens=17, seed=4)
    runner = runner_of(pruned)
    reference = reference_of(runner, *tests)
    prune_(runner)
    found = perplexities(runner, tests, reference=reference)
    for one, ids in zip(found, tests, strict=True):
        assert_like(one, slow(dense, pruned, ids))
        assert one["kl"] > 0.01 and one["top1_agreement"] < 1


@pytest.mark.parametrize("room", [1, 4 * tiny.VOCAB * 5, 2**24])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_and_chunks_change_nothing(
    batch_size: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.model.blocks.LOGIT_BYTES", room)
    monkeypatch.setattr("lib.eval.HEAD_POSITIONS", 7)
    dense, runner = tiny.tiny_llama(), runner_of(tiny.tiny_llama(), batch_size)
    ids = windows(7)
    reference = reference_of(runner, ids)
    prune_(runner)
    (found,) = perplexities(runner, [ids], reference=reference)
    assert_like(found, slow(dense, runner.model, ids))
    assert found["perplexity"] == perplexity(runner, ids)


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


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_model(tmp_path / "model")
    tiny.write_texts(tmp_path / "uk")
    tiny.write_texts(tmp_path / "en", test=tiny.sentences(5, seed=7))
    return tmp_path


def figures(folder: Path | str) -> list[list[float]]:
    return [[one[name] for name in FIGURES] for one in results(folder)["evaluation"]]


def test_what_nothing_was_pruned_from_is_the_dense_model(place: Path) -> None:
    flags = ["--model", "model", *QUICK, *CALIBRATED, "--prune_method", "wanda"]
    succeed(*flags, "--sparsity_ratio", 0, "--save", "zero")
    assert figures("zero") == [[0, 0, 1, 0]] * 2


def test_a_model_pruned_before_is_compared_with_what_it_was_made_of(place: Path) -> None:
    base = ["--model", "model", *QUICK, *CALIBRATED, "--trim_vocabulary"]
    prune = [*base, "--prune_method", "wanda", "--save", "one", "--save_model", "new"]
    succeed(*prune)
    again = ["--model", "new", *QUICK, *CALIBRATED, "--eval_only", "--teacher", "model"]
    again += ["--completions", "1"]
    done = succeed(*again, "--save", "two")
    for before, after in zip(figures("one"), figures("two"), strict=True):
        assert after == pytest.approx(before, rel=1e-4)
    assert results("two")["method"] == "pruned before"
    assert "recovery" not in results("two")
    assert all("dense" in one for one in results("two")["completions"])
    done = call(*again, "--offload_folder", "away")
    assert done.status == 2 and "must be in memory" in done.err
