"""Where linears add to the residual states, found by trying, and what more is found of them."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from support import linears_of, runner_of, windows
from torch import Tensor, nn

from lib.model.linears import find_linears
from lib.pruning.observe import find_stages
from lib.pruning.ordered import run_to_outputs
from lib.pruning.residual import (
    ResidualProjections,
    as_residual_projection,
    replayed_outputs,
    stream_at,
    zeroed_outputs,
)

PROJECTIONS = {  # in the order of the forward pass
    "Llama": ["self_attn.o_proj", "mlp.down_proj"],
    "Phi": ["self_attn.dense", "mlp.fc2"],  # attention and MLP side by side
    "GPT-2": ["attn.c_proj", "mlp.c_proj"],
    "Mixtral": ["self_attn.o_proj"],  # experts are no single linear
    "Gemma 2": [],  # a norm stands behind both
}
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def in_stages(name: str):
    """A tiny model's runner, windows before its first block, and that block's linears in stages."""
    runner = runner_of(tiny.ARCHITECTURES[name]())
    states = runner.capture(windows(6), 2)
    return runner, states, find_stages(runner, states, 0, linears_of(runner))[0]


def after(stages, place: int):
    return [linear for stage in stages[place + 1 :] for linear in stage]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_and_the_modules_that_end_in_them(name: str) -> None:
    """The module that ends in attention's projection can be left out, its outputs being given."""
    runner, states, stages = in_stages(name)
    projections, block = ResidualProjections(runner), runner.blocks[0]
    found = {
        stage[0].name.removeprefix("0."): projections.find(states, 0, stage, after(stages, place))
        for place, stage in enumerate(stages)
    }
    assert [linear for linear, one in found.items() if one] == PROJECTIONS[name]
    for place, (linear, projection) in enumerate(found.items()):
        if not projection:
            continue
        assert projection.last == (place == len(stages) - 1)
        if not projection.last:
            assert projection.ends == linear.split(".")[0]
            _, run = next(runner.iter_batches(states, 0))
            whole = run()
            _, out = run_to_outputs(run, stages[place][0])
            for inner in getattr(block, projection.ends).children():
                inner.register_forward_pre_hook(refuse)
            with replayed_outputs(block, {projection.ends: (out, projection.length)}):
                assert torch.equal(run(), whole)


def refuse(*_) -> None:
    raise AssertionError("it was run")


class Scaling(nn.Module):
    """A block that multiplies its input before it adds the outputs of its attention to it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.o, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.factor * x + self.o(x)
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_stream_that_is_not_the_blocks_input_is_left_alone(factor: float) -> None:
    """The error of the stream there would be taken from the input as it came."""
    block, x = Scaling(factor), torch.randn(2, 5, 8)
    o, up, down = find_linears(block, "")[0]
    run = partial(block, x)
    first = as_residual_projection(block, run, o, [up, down], x)
    assert (first is not None) == (factor == 1.0)
    assert as_residual_projection(block, run, down, [], x).last


def test_stream_of_a_llama_block() -> None:
    runner, states, stages = in_stages("Llama")
    _, run = next(runner.iter_batches(states, 0))
    _, [o_proj], _, [down_proj] = stages
    hidden = states.hidden[:2]
    with zeroed_outputs(after(stages, 1)):
        x, before = stream_at(run, o_proj)
    assert torch.equal(before, hidden)
    y, between = stream_at(run, down_proj)
    assert torch.allclose(between, hidden + o_proj.module(x), atol=1e-6)
    assert torch.allclose(run(), between + down_proj.module(y), atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_zeroed_linears_compute_again(name: str) -> None:
    runner, states, stages = in_stages(name)
    _, run = next(runner.iter_batches(states, 0))
    before = run()
    with pytest.raises(KeyError), zeroed_outputs(after(stages, -1)):
        assert torch.equal(run(), states.hidden[:2])
        raise KeyError
    assert torch.equal(run(), before)


def test_running_out_of_memory_is_no_finding() -> None:
    runner, states, stages = in_stages("Llama")
    projections = ResidualProjections(runner)

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = runner.blocks[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        projections.find(states, 0, stages[1], after(stages, 1))
    handle.remove()
    assert projections.find(states, 0, stages[1], after(stages, 1))
