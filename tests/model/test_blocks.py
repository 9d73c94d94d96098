"""What the runner refuses and measures, that it restores the model, and what it sees of linears."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tiny
import torch
from support import CPU, linears_of, patches, prune_, runner_of, through, windows
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lib.calibration.inputs import observe
from lib.data.samples import Sample, Windows, join, windows_of
from lib.eval import perplexities, perplexity
from lib.methods.registry import method_of
from lib.model.blocks import BlockRunner
from lib.model.linears import find_linears, watch_inputs, watch_outputs
from lib.util.errors import UserError


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_what_cannot_be_carried_is_refused_and_measured_as_a_whole(name: str) -> None:
    """Also where the logits of a token with a damaged embedding, and those after it, are nan."""
    model, ids = tiny.REFUSED[name](), windows(5)
    runner = BlockRunner(model, CPU, batch_size=3, whole=True)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    runner.verify()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert perplexity(runner, ids) == pytest.approx(loss.exp().item(), rel=1e-4)
    assert not patches(model)
    for damage in (1.0, float("nan")):
        model.get_input_embeddings().weight.data[5] *= damage
        with pytest.raises(UserError, match="cannot be pruned"):
            runner_of(model).verify()


def test_blocks_that_read_the_keys_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although here nothing happens between them: in the dense model these are other keys."""
    text = "transformers.models.gemma4.modeling_gemma4.Gemma4TextModel"
    monkeypatch.setattr(f"{text}._maybe_slice_kv_shared_inputs", lambda self, *args, **_: args[:4])
    with pytest.raises(UserError, match="blocks that depend on each other"):
        runner_of(tiny.REFUSED["Gemma 4, shared keys"]()).verify()


def test_perplexity_in_chunks_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, ids = runner_of(tiny.tiny_llama(), 2), windows(4)
    with torch.no_grad():
        logits = runner.model(input_ids=ids).logits[:, :-1].double()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0, 4:] = False  # the rest of a cut text
    losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    nats, counts, sums = losses.sum().item(), mask[:, 1:].sum(1), losses.sum(1)
    expected = math.exp(nats / counts.sum())
    row = 4 * tiny.VOCAB  # bytes
    for room, least in ((2**28, 1), (row * 2 * 5, 1), (1, 1), (row, 6), (1, 128)):
        monkeypatch.setattr("lib.model.blocks.LOGIT_BYTES", room)
        monkeypatch.setattr("lib.eval.HEAD_POSITIONS", least)
        [found] = perplexities(runner, [Windows(ids, mask)])
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["by_window"]["tokens"].tolist() == counts.tolist()
    for clusters in ([(0,), (1,), (2,), (3,)], [(0,), (1, 2), (3,)], [(0, 1, 2, 3)]):
        documents = torch.tensor([n for n, each in enumerate(clusters) for _ in each])
        [found] = perplexities(runner, [Windows(ids, mask, documents=documents)])
        off = [sum(sums[n] - counts[n] * nats / counts.sum() for n in each) for each in clusters]
        squares, number = sum(each.item() ** 2 for each in off), len(clusters)
        scale = number / (number - 1) if number > 1 else math.nan
        error = math.sqrt(scale * squares) / counts.sum().item()
        assert found["standard_error"] == pytest.approx(expected * error, rel=1e-4, nan_ok=True)


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
    assert not patches(model) and model.config.use_cache == caches


# --- what linears and fused experts are multiplied with, however the product is written

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by place": lambda x, w: F.linear(x, w),
    "both by name": lambda x, w: F.linear(weight=w, input=x),
    "matmul by name": lambda x, w: torch.matmul(x, other=w.T),
    "method": lambda x, w: x.matmul(w.T),
    "operator": lambda x, w: x @ w.T,
}


class Experts(nn.Module):
    """Three matrices in one parameter; expert i gets i + 1 tokens."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 8))
        self.product = product

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.product(x[: i + 1], self.weight[i]) for i in range(3)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_experts_inputs_are_seen(name: str) -> None:
    experts, x, seen = Experts(PRODUCTS[name]), torch.randn(4, 8), {}
    linears, left = find_linears(experts, "block")
    expected = experts(x)
    with watch_inputs(linears, lambda linear, its: seen.update({linear.expert: its})):
        found = experts(x)
    assert not left and [linear.expert for linear in linears] == [0, 1, 2]
    assert seen.keys() == {0, 1, 2}
    assert all(torch.equal(seen[i], x[: i + 1]) for i in range(3))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("module", "keyword"), [(nn.Linear(8, 8), "input"), (Conv1D(8, 8), "x")])
def test_inputs_and_outputs_of_a_call_by_keyword_are_seen(module: nn.Module, keyword: str) -> None:
    [linear] = find_linears(nn.ModuleDict({"linear": module}), "0")[0]
    seen: list[Tensor] = []
    x = torch.ones(3, 8)
    with watch_inputs([linear], lambda _, x: seen.append(x)):
        module(**{keyword: x})
    with watch_outputs([linear], lambda _, x, out: seen.append(x)):
        module(**{keyword: x})
    assert [tensor is x for tensor in seen] == [True, True]
