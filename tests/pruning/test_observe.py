"""Each input of a block is taken into statistics once, in the order of the forward pass."""

from __future__ import annotations

import pytest
import tiny
import torch
from support import linears_of, runner_of, windows
from torch import nn

from lib.methods.registry import method_of
from lib.model.matrix import PrunableLinear
from lib.pruning.observe import find_stages, observe

ORDER = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def last_names(linears: list[PrunableLinear]) -> list[str]:
    return [linear.name.rpartition(".")[2] for linear in linears]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_inputs_are_shared_and_batches_add_up(name: str, method: str) -> None:
    runner, ids = runner_of(tiny.ARCHITECTURES[name]()), windows(5)
    found = []
    for size in (1, 2, 5):
        states = runner.capture(ids, size)
        groups = observe(runner, states, 0, linears_of(runner), method_of(method))
        assert [last_names(group.linears) for group in groups] == ORDER
        assert [group.method.tokens for group in groups] == [5 * 24] * 4
        found.append([statistic for g in groups for statistic in g.method.statistics()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_the_last_linear_is_not_computed() -> None:
    runner = runner_of(tiny.tiny_llama())
    states = runner.capture(windows(3), 2)
    computed = []
    for name, module in runner.blocks[0].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: computed.append(name))
    observe(runner, states, 0, linears_of(runner), method_of("wanda"))
    assert computed.count("mlp.up_proj") == 2 and "mlp.down_proj" not in computed


def test_stages_follow_the_forward_pass() -> None:
    runner = runner_of(tiny.tiny_llama())
    states = runner.capture(windows(2), 2)
    stages, reached = find_stages(runner, states, 0, linears_of(runner)[::-1])
    assert reached == 4
    assert [set(last_names(stage)) for stage in stages] == list(map(set, ORDER))
