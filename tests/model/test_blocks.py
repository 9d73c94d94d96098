"""The runner's blocks give the model's own logits, and whatever happens it restores the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from support import CPU, linears_of, prune_, runner_of, windows
from torch import Tensor, nn

from lib.data.samples import Sample, Windows, join, windows_of
from lib.eval import perplexities, perplexity
from lib.methods.registry import method_of
from lib.model.blocks import BlockRunner
from lib.pruning.inputs import observe
from lib.util.errors import UserError

TOKENS = 24  # of a window


def patches(model: nn.Module) -> list[str]:
    """What is not as it was built: forwards and hooks."""
    found = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    for name, module in model.named_modules():
        if module._forward_pre_hooks or module._forward_hooks:
            found.append(name)
    return found


def through(runner: BlockRunner, ids: Tensor | Windows, positions: Tensor) -> Tensor:
    """Logits (n, positions, vocabulary) by way of the runner, in batches of three."""
    states = runner.capture(ids, 3, CPU)
    for index in range(len(runner.blocks)):
        runner.advance_(states, index)
    chunks = positions.split(13)
    whole = [[runner.logits(states, batch)(chunk) for chunk in chunks] for batch in states.batches]
    return torch.cat([torch.cat(row, dim=1) for row in whole])


@pytest.mark.parametrize("name", tiny.ALL)
def test_batch_by_batch_and_chunk_by_chunk_it_is_the_models_own_forward(name: str) -> None:
    """On windows longer than sliding ones, their last batch smaller; of architectures of all kinds:
    blocks with masks of their own, with experts, with a state, with other arguments and outputs."""
    model, ids = tiny.ALL[name](), windows(5, TOKENS)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    logits = through(runner_of(model), ids, torch.arange(TOKENS))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not patches(model)
    with torch.no_grad():
        again = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(again, expected)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("name", tiny.REFUSED)
def test_models_that_it_cannot_carry_are_refused(name: str, damaged: bool) -> None:
    """Although the logits of a token with a damaged embedding, and those after it, are nan."""
    model = tiny.REFUSED[name]()
    if damaged:
        model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(UserError, match="cannot be pruned"):
        runner_of(model).verify()


def test_blocks_that_read_the_keys_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although here nothing happens between them: in the dense model these are other keys."""
    text = "transformers.models.gemma4.modeling_gemma4.Gemma4TextModel"
    monkeypatch.setattr(f"{text}._maybe_slice_kv_shared_inputs", lambda self, *args, **_: args[:4])
    with pytest.raises(UserError, match="blocks that depend on each other"):
        runner_of(tiny.REFUSED["Gemma 4, shared keys"]()).verify()


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_they_are_measured_by_their_whole_forward(name: str) -> None:
    runner = BlockRunner(tiny.REFUSED[name](), CPU, batch_size=3, whole=True)
    ids = windows(5)
    with torch.no_grad():
        logits = runner.model(input_ids=ids, use_cache=False).logits[:, :-1]
    runner.verify()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert perplexity(runner, ids) == pytest.approx(loss.exp().item(), rel=1e-4)
    assert not patches(runner.model)


def test_perplexity_in_chunks_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, ids = runner_of(tiny.tiny_llama(), 2), windows(4)
    with torch.no_grad():
        logits = runner.model(input_ids=ids).logits[:, :-1].double()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    nats, losses = losses.sum().item(), losses.sum(1) / mask[:, 1:].sum(1)
    expected = losses.mean().exp().item()
    row = 4 * tiny.VOCAB  # bytes
    for room, least in ((2**28, 1), (row * 2 * 5, 1), (1, 1), (row, 6), (1, 128)):
        monkeypatch.setattr("lib.model.blocks.LOGIT_BYTES", room)
        monkeypatch.setattr("lib.eval.HEAD_POSITIONS", least)
        [found] = perplexities(runner, [Windows(ids, mask)])
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert found["nats"] == pytest.approx(nats, rel=1e-5)
    deviation = losses.std().item() / 2  # of the mean of four
    assert found["standard_error"] == pytest.approx(expected * deviation, rel=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "Qwen3-MoE", "DeepSeek-V3"])
def test_documents_of_one_window_do_not_see_each_other(name: str) -> None:
    documents = [windows(1, count, seed=count) for count in (13, 17, 18)]
    runner = runner_of(tiny.ALL[name]())
    packed = windows_of([Sample(ids[0], ids[0] >= 0) for ids in documents], 48)
    logits = through(runner, join([packed, packed]), torch.arange(48))
    with torch.no_grad():
        alone = [runner.model(input_ids=ids, use_cache=False).logits for ids in documents]
    expected = torch.cat(alone, 1).expand_as(logits)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


class Interrupted(Exception):
    pass


def interrupted(*_, **__):
    raise Interrupted


@pytest.mark.parametrize("place", ["self_attn", "mlp", "mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("work", ["build", "advance", "observe", "prune", "measure"])
def test_nothing_stays_patched_after_an_exception(work: str, place: str) -> None:
    model, ids = tiny.tiny_llama(), windows(3)
    runner = runner_of(model)
    states = runner.capture(ids, 2, CPU)
    caches = model.config.use_cache
    block = model.model.layers[0 if work == "build" else 1]  # a probe goes no further
    broken = block.get_submodule(place)
    before = broken.__class__
    broken.__class__ = type("Broken", (before,), {"forward": interrupted})
    passes = ((run, {}) for _, run in runner.iter_batches(states, 1))
    jobs: dict[str, Callable] = {
        "build": lambda: BlockRunner(model, CPU),
        "advance": lambda: runner.advance_(states, 1),
        "observe": lambda: observe(runner, linears_of(runner, 1), method_of("wanda"), passes),
        "prune": lambda: prune_(runner, ids=ids),
        "measure": lambda: perplexity(runner, ids),
    }
    if place == "mlp.down_proj" and work in ("observe", "prune"):
        jobs[work]()  # of the last block, only what this linear receives is wanted
    else:
        with pytest.raises(Interrupted):
            jobs[work]()
    broken.__class__ = before
    assert not patches(model)
    assert model.config.use_cache == caches
