"""Where linears add to the residual states, found by trying, and how far it lags behind there."""

from dataclasses import replace

import pytest
import tiny
import torch
from support import CPU, linears_of, runner_of, windows

from lib.dist.team import Team
from lib.methods.registry import Recipe
from lib.pruning.observe import DenseTwin, stages
from lib.pruning.residual import Writers, adds_to_stream, observe_writer, silenced, stream_at

WRITERS = {
    "Llama": {"self_attn.o_proj", "mlp.down_proj"},
    "Qwen2": {"self_attn.o_proj", "mlp.down_proj"},
    "Phi": {"self_attn.dense", "mlp.fc2"},  # attention and MLP side by side
    "GPT-2": {"attn.c_proj", "mlp.c_proj"},
    "Gemma 2": set(),  # a norm stands behind both
}


def in_lots(name: str):
    """A tiny model's runner, windows before its first block, and that block's linears in lots."""
    runner = runner_of(tiny.ARCHITECTURES[name]())
    states = runner.capture(windows(6), 2, CPU)
    return runner, states, stages(runner, states, 0, linears_of(runner), Recipe("admm"))


def merged(states):
    """The blocks' arguments for one batch of all windows, which are the same for any batch."""
    return [calls[:1] for calls in states.calls]


def after(lots, place: int):
    return [linear for lot in lots[place + 1 :] for linear in lot]


@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_found(name):
    runner, states, lots = in_lots(name)
    _, run = next(runner.runs(states, 0))
    found = set()
    with torch.no_grad():
        for place, lot in enumerate(lots):
            for linear in lot:
                if adds_to_stream(run, linear, after(lots, place)):
                    found.add(linear.name.removeprefix("0."))
    assert found == WRITERS[name]


@torch.no_grad()
def test_stream_of_a_llama_block():
    runner, states, lots = in_lots("Llama")
    _, run = next(runner.runs(states, 0))
    names = [lot[0].name for lot in lots]
    attention, mlp = names.index("0.self_attn.o_proj"), names.index("0.mlp.down_proj")
    [o_proj], [down_proj] = lots[attention], lots[mlp]
    hidden = states.hidden[:2]
    x, before = stream_at(run, o_proj, after(lots, attention))
    assert torch.equal(before, hidden)
    y, between = stream_at(run, down_proj, after(lots, mlp))
    assert torch.allclose(between, hidden + o_proj.module(x), atol=1e-6)
    assert torch.allclose(run(), between + down_proj.module(y), atol=1e-5)


@torch.no_grad()
def test_nothing_stays_silent():
    runner, states, lots = in_lots("Llama")
    linears = [linear for lot in lots for linear in lot]
    _, run = next(runner.runs(states, 0))
    before = run()
    with pytest.raises(KeyError), silenced(linears):
        assert torch.equal(run(), states.hidden[:2])
        raise KeyError
    assert torch.equal(run(), before)


@torch.no_grad()
def test_lag_is_what_the_stream_lacks_of_the_dense_one():
    runner, states, lots = in_lots("Llama")
    dense = replace(states, hidden=states.hidden.clone())
    twin = DenseTwin.of(dense, runner.blocks[0], "0")
    states.hidden += torch.randn(states.hidden.shape, generator=torch.Generator().manual_seed(1))
    writers = Writers(runner, Team(CPU, alone=True))
    inputs = {}
    for place, lot in enumerate(lots):
        later = after(lots, place)
        if writers.adds(states, 0, lot, later):
            whole = runner, states, 0, lot[0], later
            group = observe_writer(*whole, Recipe("admm"), twin)
            inputs[lot[0].name.split(".")[-1]] = group.method, lot[0], later
    assert inputs.keys() == {"o_proj", "down_proj"}
    [(_, run), (_, twin_run)] = [
        next(runner.runs(replace(one, batch_size=6, calls=merged(one)), 0, block))
        for one, block in ((states, None), (dense, twin.block))
    ]
    for method, linear, later in inputs.values():
        x, here = stream_at(run, linear, later)
        twins = [twin.linears[one.name] for one in (linear, *later)]
        y, there = stream_at(twin_run, twins[0], twins[1:])
        x, y, lag = (tensor.flatten(0, 1) for tensor in (x, y, there - here))
        assert torch.allclose(method.lag, lag.T @ x, atol=1e-3)
        assert torch.allclose(method.drift, (y - x).T @ x, atol=1e-3)
        assert method.tokens == len(x)


@torch.no_grad()
def test_experts_and_their_router_can_be_silenced():
    runner, states, lots = in_lots("Mixtral")
    _, run = next(runner.runs(states, 0))
    linears = [linear for lot in lots for linear in lot]
    assert any(linear.expert is not None for linear in linears)
    with silenced(linears):
        assert torch.equal(run(), states.hidden[:2])
    place, lot = next((p, lot) for p, lot in enumerate(lots) if lot[0].name.endswith("o_proj"))
    assert adds_to_stream(run, lot[0], after(lots, place))
