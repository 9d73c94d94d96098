"""Where linears add to the residual states, found by trying, and what more is found of them."""

import pytest
import tiny
import torch
from support import CPU, linears_of, runner_of, windows

from lib.distributed.context import DistContext
from lib.pruning.observe import stages
from lib.pruning.ordered import passed
from lib.pruning.residual import Writers, adds_to_stream, handing_on, silenced, stream_at

WRITERS = {  # in the order of the forward pass
    "Llama": ["self_attn.o_proj", "mlp.down_proj"],
    "Qwen2": ["self_attn.o_proj", "mlp.down_proj"],
    "Phi": ["self_attn.dense", "mlp.fc2"],  # attention and MLP side by side
    "GPT-2": ["attn.c_proj", "mlp.c_proj"],
    "Gemma 2": [],  # a norm stands behind both
}


def in_lots(name: str):
    """A tiny model's runner, windows before its first block, and that block's linears in lots."""
    runner = runner_of(tiny.ARCHITECTURES[name]())
    states = runner.capture(windows(6), 2, CPU)
    return runner, states, stages(runner, states, 0, linears_of(runner))[0]


def after(lots, place: int):
    return [linear for lot in lots[place + 1 :] for linear in lot]


@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_found(name):
    runner, states, lots = in_lots(name)
    _, run = next(runner.iter_batches(states, 0))
    found = set()
    with torch.no_grad():
        for place, lot in enumerate(lots):
            for linear in lot:
                if adds_to_stream(run, linear, after(lots, place)) is not None:
                    found.add(linear.name.removeprefix("0."))
    assert found == set(WRITERS[name])


@torch.no_grad()
def test_stream_of_a_llama_block():
    runner, states, lots = in_lots("Llama")
    _, run = next(runner.iter_batches(states, 0))
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
    _, run = next(runner.iter_batches(states, 0))
    before = run()
    with pytest.raises(KeyError), silenced(linears):
        assert torch.equal(run(), states.hidden[:2])
        raise KeyError
    assert torch.equal(run(), before)


@torch.no_grad()
@pytest.mark.parametrize("name", WRITERS)
def test_what_was_found_of_writers(name):
    """The module that ends in attention's writer can be left out, its outputs being given."""
    runner, states, lots = in_lots(name)
    writers = Writers(runner, DistContext(CPU, alone=True))
    found = {
        lot[0].name.removeprefix("0."): writers.find(states, 0, lot, after(lots, place))
        for place, lot in enumerate(lots)
    }
    found = {linear: writer for linear, writer in found.items() if writer}
    assert found.keys() == set(WRITERS[name])
    for linear, writer in found.items():
        assert writer.last == (linear == WRITERS[name][-1])
        if not writer.last:
            assert writer.ends == linear.split(".")[0]
            [lot] = [lot for lot in lots if lot[0].name == f"0.{linear}"]
            _, run = next(runner.iter_batches(states, 0))
            whole = run()
            _, out = passed(run, lot[0])
            block = runner.blocks[0]
            for inner in getattr(block, writer.ends).children():
                inner.register_forward_pre_hook(refuse)
            with handing_on(block, {writer.ends: (out, writer.length)}):
                assert torch.equal(run(), whole)


def refuse(*_):
    raise AssertionError("it was run")


@torch.no_grad()
def test_running_out_of_memory_is_no_finding(monkeypatch):
    runner, states, lots = in_lots("Llama")
    writers = Writers(runner, DistContext(CPU, alone=True))
    place = next(at for at, lot in enumerate(lots) if lot[0].name.endswith("o_proj"))

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lib.pruning.residual.adds_to_stream", fail)
    with pytest.raises(torch.OutOfMemoryError):
        writers.find(states, 0, lots[place], after(lots, place))
    assert not writers.known


@torch.no_grad()
def test_experts_and_their_router_can_be_silenced():
    runner, states, lots = in_lots("Mixtral")
    _, run = next(runner.iter_batches(states, 0))
    linears = [linear for lot in lots for linear in lot]
    assert any(linear.expert is not None for linear in linears)
    with silenced(linears):
        assert torch.equal(run(), states.hidden[:2])
    place, lot = next((p, lot) for p, lot in enumerate(lots) if lot[0].name.endswith("o_proj"))
    assert adds_to_stream(run, lot[0], after(lots, place)) is not None
