"""Where linears add to the residual states, found by trying, and what more is found of them."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from support import linears_of, runner_of, windows
from torch import Tensor, nn

from lib.model.linears import find_linears
from lib.pruning.ordered import find_order, run_to_outputs
from lib.pruning.residual import as_residual_projection, replayed_outputs

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


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_and_the_modules_that_end_in_them(name: str) -> None:
    """The module that ends in attention's projection can be left out, its outputs being given."""
    runner = runner_of(tiny.ARCHITECTURES[name]())
    states, block = runner.capture(windows(6), 2), runner.blocks[0]
    order = find_order(runner, states, 0, linears_of(runner))
    found = {
        stage.linears[0].name.removeprefix("0."): stage.projection
        for stage in order
        if stage.projection
    }
    assert list(found) == PROJECTIONS[name]
    for stage in order:
        if not stage.projection:
            continue
        assert stage.projection.last == (stage is order[-1])
        if not stage.projection.last:
            ends = stage.projection.ends
            assert stage.linears[0].name.startswith(f"0.{ends}.")
            _, run = next(runner.iter_batches(states, 0))
            whole = run()
            _, out = run_to_outputs(run, stage.linears[0])
            for inner in getattr(block, ends).children():
                inner.register_forward_pre_hook(refuse)
            with replayed_outputs(block, {ends: (out, stage.projection.length)}):
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


def test_running_out_of_memory_is_no_finding() -> None:
    runner = runner_of(tiny.tiny_llama())
    states = runner.capture(windows(2), 2)
    calls = []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) > 1:  # the first is the pass that finds the stages
            raise torch.OutOfMemoryError("CUDA out of memory")

    runner.blocks[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        find_order(runner, states, 0, linears_of(runner))
