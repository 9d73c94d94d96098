"""Inputs taken in order, in few passes: the same statistics as from whole passes, one by one."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from support import prune_, representative, runner_of, windows
from torch import Tensor, nn

from lib.calibration.inputs import rows
from lib.calibration.residual import as_residual_projection
from lib.calibration.sequential import OrderedBlock, find_order
from lib.methods.registry import method_of
from lib.model.linears import find_linears

NAMES = ["Llama", "Phi", "GPT-2", "OPT", "Gemma 2", "BLOOM", "Mixtral", "Falcon", "GPT-NeoX"]


@pytest.mark.parametrize("name", representative(NAMES, ["Phi", "GPT-2", "Mixtral"]))
@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_changes_nothing(name: str) -> None:
    states = []
    for cache_inputs in (True, False):
        runner = runner_of(tiny.ARCHITECTURES[name](), batch_size=2)
        runner.cache_inputs = cache_inputs
        prune_(runner, "admm")
        states.append(runner.model.state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def begun(cache_inputs: bool = True):
    """The first block of a LLaMA whose stream is off the untouched one, and both streams."""
    runner = runner_of(tiny.tiny_llama())
    states = runner.capture(windows(6), 2)
    dense = replace(states, hidden=states.hidden.clone())
    noise = torch.randn(states.hidden.shape, generator=torch.Generator().manual_seed(1))
    states.hidden += noise * states.hidden.std()
    block = copy.deepcopy(runner.blocks[0])
    order = find_order(runner, states, 0, runner.linears(0))
    ordered = OrderedBlock(
        runner, method_of("admm"), 0, order, block, states, dense, cache_inputs, need_outputs=True
    )
    return runner, states, dense, block, ordered


def all_inputs(runner, states, block) -> tuple[dict[str, list[Tensor]], Tensor]:
    """By hooks over a whole pass: the input and output of each linear of the block, its output."""
    seen: dict[str, list] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.setdefault(name, []).append((args[0], out))
        )
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    out = torch.cat([run() for _, run in runner.iter_batches(states, 0, block)])
    for handle in handles:
        handle.remove()
    return {
        name: [rows(torch.cat(tensors)) for tensors in zip(*pairs, strict=True)]
        for name, pairs in seen.items()
    }, out


@torch.no_grad()
@pytest.mark.parametrize("cache_inputs", [True, False])
def test_statistics_are_those_of_whole_passes(cache_inputs: bool) -> None:
    runner, states, dense, dense_block, ordered = begun(cache_inputs)
    first, first_dense = (one.hidden.clone() for one in (states, dense))
    theirs, aim = all_inputs(runner, dense, dense_block)
    block = runner.blocks[0]
    for place, stage in enumerate(one.linears for one in ordered.order):
        now, out = all_inputs(runner, replace(states, hidden=first.clone()), block)
        [group] = ordered.observe(place)
        name, method = stage[0].name.removeprefix(f"{runner.name}.0."), group.method
        x, y = now[name]
        torch.testing.assert_close(method.hessian.triu(), (x.T @ x).triu(), rtol=1e-5, atol=1e-4)
        assert [linear.name for linear in group.linears] == [linear.name for linear in stage]
        if name.endswith(("o_proj", "down_proj")):
            ahead = rows(aim) - rows(out)  # at the end; after attention, of the stream and of o
            if name.endswith("o_proj"):
                ahead = rows(first_dense) + theirs[name][1] - rows(first) - y
            found, expected = method.residual_error_gram, ahead.T @ x
            assert method.input_error_gram is None
        else:
            found, expected = method.input_error_gram, (theirs[name][0] - x).T @ x
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        for linear in stage:  # what comes after is to see the change
            linear.module.weight.data *= 1.1
    _, expected = all_inputs(runner, replace(states, hidden=first), block)
    ordered.advance_()
    assert torch.equal(states.hidden, expected)  # the product, to the bit
    assert torch.equal(dense.hidden, aim)


# --- where linears add to the residual states


class Scaling(nn.Module):
    """A block that multiplies its input before it adds the outputs of its attention to it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.o, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.factor * x + self.o(x)
        return x + self.down(self.up(x).relu())


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_stream_that_is_not_the_blocks_input_is_left_alone(factor: float) -> None:
    """The error of the stream there would be taken from the input as it came."""
    block, x = Scaling(factor), torch.randn(2, 5, 8)
    o, up, down = find_linears(block, "")[0]
    run = partial(block, x)
    first = as_residual_projection(block, run, o, [up, down], x)
    assert (first is not None) == (factor == 1.0)
    assert as_residual_projection(block, run, down, [], x).last
