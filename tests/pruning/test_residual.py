"""Where linears add to the residual states, found by trying, and what more is found of them."""

import pytest
import tiny
import torch
from support import ALONE, CPU, linears_of, runner_of, windows

from lib.pruning.observe import find_stages
from lib.pruning.ordered import run_to_outputs
from lib.pruning.residual import (
    ResidualProjections,
    adds_to_stream,
    replayed_outputs,
    stream_at,
    zeroed_outputs,
)

PROJECTIONS = {  # in the order of the forward pass
    "Llama": ["self_attn.o_proj", "mlp.down_proj"],
    "Qwen2": ["self_attn.o_proj", "mlp.down_proj"],
    "Phi": ["self_attn.dense", "mlp.fc2"],  # attention and MLP side by side
    "GPT-2": ["attn.c_proj", "mlp.c_proj"],
    "Gemma 2": [],  # a norm stands behind both
}


def in_stages(name: str):
    """A tiny model's runner, windows before its first block, and that block's linears in stages."""
    runner = runner_of(tiny.ARCHITECTURES[name]())
    states = runner.capture(windows(6), 2, CPU)
    return runner, states, find_stages(runner, states, 0, linears_of(runner))[0]


def after(stages, place: int):
    return [linear for stage in stages[place + 1 :] for linear in stage]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_found(name):
    runner, states, stages = in_stages(name)
    _, run = next(runner.iter_batches(states, 0))
    found = set()
    with torch.no_grad():
        for place, stage in enumerate(stages):
            for linear in stage:
                if adds_to_stream(run, linear, after(stages, place)) is not None:
                    found.add(linear.name.removeprefix("0."))
    assert found == set(PROJECTIONS[name])


@torch.no_grad()
def test_stream_of_a_llama_block():
    runner, states, stages = in_stages("Llama")
    _, run = next(runner.iter_batches(states, 0))
    names = [stage[0].name for stage in stages]
    attention, mlp = names.index("0.self_attn.o_proj"), names.index("0.mlp.down_proj")
    [o_proj], [down_proj] = stages[attention], stages[mlp]
    hidden = states.hidden[:2]
    x, before = stream_at(run, o_proj, after(stages, attention))
    assert torch.equal(before, hidden)
    y, between = stream_at(run, down_proj, after(stages, mlp))
    assert torch.allclose(between, hidden + o_proj.module(x), atol=1e-6)
    assert torch.allclose(run(), between + down_proj.module(y), atol=1e-5)


@torch.no_grad()
def test_nothing_stays_silent():
    runner, states, stages = in_stages("Llama")
    linears = [linear for stage in stages for linear in stage]
    _, run = next(runner.iter_batches(states, 0))
    before = run()
    with pytest.raises(KeyError), zeroed_outputs(linears):
        assert torch.equal(run(), states.hidden[:2])
        raise KeyError
    assert torch.equal(run(), before)


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTIONS)
def test_how_projections_end_their_modules(name):
    """The module that ends in attention's projection can be left out, its outputs being given."""
    runner, states, stages = in_stages(name)
    projections = ResidualProjections(runner, ALONE)
    found = {
        stage[0].name.removeprefix("0."): projections.find(states, 0, stage, after(stages, place))
        for place, stage in enumerate(stages)
    }
    found = {linear: projection for linear, projection in found.items() if projection}
    assert found.keys() == set(PROJECTIONS[name])
    for linear, projection in found.items():
        assert projection.last == (linear == PROJECTIONS[name][-1])
        if not projection.last:
            assert projection.ends == linear.split(".")[0]
            [stage] = [stage for stage in stages if stage[0].name == f"0.{linear}"]
            _, run = next(runner.iter_batches(states, 0))
            whole = run()
            _, out = run_to_outputs(run, stage[0])
            block = runner.blocks[0]
            for inner in getattr(block, projection.ends).children():
                inner.register_forward_pre_hook(refuse)
            with replayed_outputs(block, {projection.ends: (out, projection.length)}):
                assert torch.equal(run(), whole)


def refuse(*_):
    raise AssertionError("it was run")


@torch.no_grad()
def test_running_out_of_memory_is_no_finding(monkeypatch):
    runner, states, stages = in_stages("Llama")
    projections = ResidualProjections(runner, ALONE)
    place = next(at for at, stage in enumerate(stages) if stage[0].name.endswith("o_proj"))

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lib.pruning.residual.adds_to_stream", fail)
    with pytest.raises(torch.OutOfMemoryError):
        projections.find(states, 0, stages[place], after(stages, place))
    assert not projections.by_class


@torch.no_grad()
def test_experts_and_their_router_can_be_zeroed():
    runner, states, stages = in_stages("Mixtral")
    _, run = next(runner.iter_batches(states, 0))
    linears = [linear for stage in stages for linear in stage]
    assert any(linear.expert is not None for linear in linears)
    with zeroed_outputs(linears):
        assert torch.equal(run(), states.hidden[:2])
    place, stage = next(
        (p, stage) for p, stage in enumerate(stages) if stage[0].name.endswith("o_proj")
    )
    assert adds_to_stream(run, stage[0], after(stages, place)) is not None
