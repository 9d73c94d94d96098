"""Where linears add to the residual states, found by trying, and what more is found of them."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from support import linears_of, runner_of, windows
from torch import Tensor, nn

from lib.model.linears import find_linears
from lib.pruning.ordered import find_order
from lib.pruning.residual import as_residual_projection

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


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
