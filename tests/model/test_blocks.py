"""The sweep is the model's own forward, restores what it patches, and observes each input once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.eval import perplexity
from lib.methods.registry import Recipe
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.linears import find_linears
from lib.model.pretrained import decoder_blocks
from lib.prune import Pruner
from lib.pruning.observe import observe, stages

CPU = torch.device("cpu")
# full attention, sliding windows in all blocks or in every other one, blocks of other signatures
NAMES = ("Llama", "Mistral", "Gemma 2", "Gemma 3", "GPT-2", "Falcon")
MODELS = {name: tiny.ARCHITECTURES[name] for name in NAMES}


def windows(count: int, tokens: int = 24, seed: int = 0) -> Tensor:
    """Random token ids (count, tokens), longer than the sliding windows."""
    return torch.randint(3, 300, (count, tokens), generator=torch.Generator().manual_seed(seed))


def swept(model: PreTrainedModel) -> BlockRunner:
    return BlockRunner(model, decoder_blocks(model)[1], CPU)


def patches(model: PreTrainedModel) -> list[str]:
    """What is not as it was built: forwards and hooks."""
    found = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    for name, module in model.named_modules():
        if module._forward_pre_hooks or module._forward_hooks:
            found.append(name)
    return found


def through(runner: BlockRunner, ids: Tensor, batch_size: int, positions: Tensor) -> Tensor:
    """Logits (n, positions, vocabulary) by way of the runner."""
    states = runner.capture(ids, batch_size, CPU)
    for index in range(len(runner.blocks)):
        runner.advance_(states, index)
    return torch.cat([runner.logits(states, batch, positions) for batch in states.batches])


@pytest.mark.parametrize("name", MODELS)
def test_the_unpruned_sweep_is_the_models_own_forward(name: str) -> None:
    model, ids = MODELS[name](), windows(5)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    logits = through(swept(model), ids, 2, torch.arange(24))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not patches(model)


def test_a_window_that_slides_matters() -> None:
    """The test above could not fail if the windows were short: hidden tokens change the logits."""
    narrow, ids = tiny.ARCHITECTURES["Mistral"](), windows(1)
    wide = tiny.build("mistral", sliding_window=None)
    with torch.no_grad():
        assert not torch.allclose(narrow(ids).logits[:, -1], wide(ids).logits[:, -1], atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_chunks_are_the_whole_ones(name: str) -> None:
    runner, ids = swept(MODELS[name]()), windows(3)
    whole = through(runner, ids, 3, torch.arange(24))
    chunks = [through(runner, ids, 3, part) for part in torch.arange(24).split(7)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole)


def test_perplexity_in_chunks_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, ids = swept(tiny.tiny_llama()), windows(4)
    with torch.no_grad():
        logits = runner.model(input_ids=ids).logits[:, :-1].double()
    losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)
    expected = losses.mean().exp().item()
    for room in (2**28, 4 * tiny.VOCAB * 2 * 5, 1):  # in bytes: all, five or one position
        monkeypatch.setattr("lib.eval.LOGIT_BYTES", room)
        found = perplexity(runner, ids, 2)
        assert found.value == pytest.approx(expected, rel=1e-5)
    deviation = losses.std().item() / 2  # of the mean of four
    assert found.standard_error == pytest.approx(expected * deviation, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_one_batch_is_as_many(name: str) -> None:
    runner, ids = swept(MODELS[name]()), windows(5)
    values = [perplexity(runner, ids, size).value for size in (1, 2, 5)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_statistics_of_one_batch_are_those_of_many(name: str, method: str) -> None:
    runner, ids = swept(MODELS[name]()), windows(5)
    found = []
    for size in (1, 2, 5):
        states = runner.capture(ids, size, CPU)
        linears = linears_of(runner)
        groups = observe(runner, states, 0, linears, Recipe(method))
        found.append([statistic for g in groups for statistic in g.method.statistics()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def linears_of(runner: BlockRunner, index: int = 0) -> list:
    return find_linears(runner.blocks[index], str(index))[0]


class Interrupted(Exception):
    pass


def interrupted(*_, **__):
    raise Interrupted


@pytest.mark.parametrize("place", ["self_attn", "mlp", "mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("work", ["build", "advance", "observe", "prune", "measure"])
def test_nothing_stays_patched_after_an_exception(work: str, place: str) -> None:
    model, ids = tiny.tiny_llama(), windows(3)
    runner = swept(model)
    states = runner.capture(ids, 2, CPU)
    caches = model.config.use_cache
    block = model.model.layers[1]
    broken = block.get_submodule(place)
    before = broken.__class__
    broken.__class__ = type("Broken", (before,), {"forward": interrupted})
    jobs: dict[str, Callable] = {
        "build": lambda: BlockRunner(model, model.model.layers[1:], CPU),
        "advance": lambda: runner.advance_(states, 1),
        "observe": lambda: observe(runner, states, 1, linears_of(runner, 1), Recipe("wanda")),
        "prune": lambda: Pruner(runner, "layers", Recipe("wanda"), Sparsity(0.5)).run(ids, 2),
        "measure": lambda: perplexity(runner, ids, 2),
    }
    if place == "mlp.down_proj" and work in ("observe", "prune"):
        jobs[work]()  # of the last block, only what this linear receives is wanted
    else:
        with pytest.raises(Interrupted):
            jobs[work]()
    broken.__class__ = before
    assert not patches(model)
    assert model.config.use_cache == caches


def test_nothing_stays_patched_when_the_models_own_forward_fails() -> None:
    model = tiny.tiny_llama()
    runner = swept(model)
    states = runner.capture(windows(2), 2, CPU)
    handle = model.lm_head.register_forward_pre_hook(interrupted)
    with pytest.raises(Interrupted):
        runner.logits(states, slice(0, 2), torch.arange(4))
    handle.remove()
    handle = model.model.embed_tokens.register_forward_pre_hook(interrupted)
    with pytest.raises(Interrupted):
        runner.capture(windows(2), 2, CPU)
    handle.remove()
    assert not patches(model)


def test_linears_with_a_shared_input_share_its_statistics() -> None:
    runner = swept(tiny.tiny_llama())
    states = runner.capture(windows(3), 2, CPU)
    groups = observe(runner, states, 0, linears_of(runner), Recipe("wanda"))
    names = [[linear.name.rpartition(".")[2] for linear in group.linears] for group in groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]] + [
        ["down_proj"]
    ]
    assert [group.method.tokens for group in groups] == [3 * 24] * 4


def test_the_last_linear_is_not_computed() -> None:
    model = tiny.tiny_llama()
    runner = swept(model)
    states = runner.capture(windows(3), 2, CPU)
    computed = []
    for name, module in runner.blocks[0].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: computed.append(name))
    observe(runner, states, 0, linears_of(runner), Recipe("wanda"))
    assert computed.count("mlp.up_proj") == 2 and "mlp.down_proj" not in computed
    computed.clear()
    attention = [linear for linear in linears_of(runner) if "v_proj" in linear.name]
    observe(runner, states, 0, attention, Recipe("wanda"))
    assert computed.count("self_attn.k_proj") == 2 and "self_attn.v_proj" not in computed


def test_stages_follow_the_forward_pass() -> None:
    runner = swept(tiny.tiny_llama())
    states = runner.capture(windows(2), 2, CPU)
    linears = linears_of(runner)
    together = stages(runner, states, 0, linears, Recipe("wanda"))
    assert [len(lot) for lot in together] == [7]
    in_order = Recipe("wanda", {"in_order": True})
    lots = stages(runner, states, 0, linears[::-1], in_order)
    names = [{linear.name.rpartition(".")[2] for linear in lot} for lot in lots]
    assert names == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}] + [
        {"down_proj"}
    ]
