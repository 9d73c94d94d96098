"""What a block's linears receive: grouped by shared input, stage by stage, taken into statistics.

Statistics belong to an input, not to a linear: q, k and v share one, gate and up another. A pass
over a block goes no further than the last input wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lib.distributed.context import DistContext
from lib.methods.base import PruningMethod
from lib.model.blocks import BlockRunner, HiddenStates, Stop
from lib.model.linears import find_linears, watch_inputs
from lib.model.matrix import PrunableLinear
from lib.pruning.inputs import Group


@dataclass
class DenseBlock:
    """One block as the untouched model runs it: its hidden states and a copy of the block."""

    states: HiddenStates
    block: nn.Module
    linears: dict[str, PrunableLinear]

    @classmethod
    def copy_of(cls, states: HiddenStates, block: nn.Module, prefix: str) -> DenseBlock:
        block = copy.deepcopy(block)
        linears, _ = find_linears(block, prefix)
        return cls(states, block, {linear.name: linear for linear in linears})


def own_windows(windows: Tensor, dist: DistContext) -> tuple[Tensor, bool]:
    """This process's part of windows (n, tokens), and whether it is idle.

    An idle process has no window of its own; it runs another's, whose statistics do not count.
    """
    own = windows[dist.share(len(windows))]
    idle = not len(own)
    return windows[:1] if idle else own, idle


class Observation:
    """Statistics of the inputs of `linears`, of one block, over all batches."""

    def __init__(
        self,
        linears: list[PrunableLinear],
        method: type[PruningMethod],
        device: torch.device,
        shared: bool = False,
    ) -> None:
        self.linears = linears
        self.shared = shared  # they receive one input: the first of them shows it
        self.method = method
        self.device = device
        self.groups: list[Group] = []
        self.group_of: dict[PrunableLinear, Group] = {}
        self.start_pass({})

    def start_pass(self, dense: dict[str, Tensor]) -> None:
        """Forget the tensors of the pass before, whose memory may be in use again."""
        self.dense = dense
        self.seen: set[PrunableLinear] = set()
        self.inputs: list[tuple[Tensor, Group]] = []

    def see(self, linear: PrunableLinear, x: Tensor) -> None:
        """Add x (..., in) to the statistics, once for all linears that receive it."""
        for receiver in self.linears if self.shared else [linear]:
            self._add(receiver, x)

    def _add(self, linear: PrunableLinear, x: Tensor) -> None:
        group = self.group_of.get(linear)
        shared = next((g for tensor, g in self.inputs if same(tensor, x)), None)
        if group is None:
            group = shared or Group([], self.method(linear.shape[1], self.device))
            if shared is None:
                self.groups.append(group)
            self.group_of[linear] = group
            group.linears.append(linear)
        if shared is not group:
            self.inputs.append((x, group))
            if linear is group.linears[0]:
                with record_function("statistics"):
                    dense = self.dense.get(linear.name)
                    known = {} if dense is None else {"dense": rows(dense)}
                    group.method.observe(rows(x), **known)
        self.seen.add(linear)
        if len(self.seen) == len(self.linears):
            raise Stop


@torch.no_grad()
def observe(
    runner: BlockRunner,
    states: HiddenStates,
    index: int,
    linears: list[PrunableLinear],
    method: type[PruningMethod],
) -> list[Group]:
    """Run block `index` over all batches, no further than the last input of `linears`.

    Returns the linears that were reached, grouped by shared input, with its statistics.
    """
    observation = Observation(linears, method, runner.device)
    with watch_inputs(linears, observation.see), record_function("forward"):
        for _, run in runner.iter_batches(states, index):
            observation.start_pass({})
            run_until_stop(run)
    return observation.groups


@torch.no_grad()
def find_stages(
    runner: BlockRunner,
    states: HiddenStates,
    index: int,
    linears: list[PrunableLinear],
) -> tuple[list[list[PrunableLinear]], int]:
    """The linears in stages, one for each distinct input, in the order of the forward pass.

    What the first batch does not reach is a stage of its own at the end. Returns the stages and
    how many of them were reached.
    """
    reached: list[tuple[Tensor, list[str]]] = []  # an input, and `linear.stage` of its receivers

    def see(linear: PrunableLinear, x: Tensor) -> None:
        if any(linear.stage in names for _, names in reached):
            return
        names = next((names for tensor, names in reached if same(tensor, x)), None)
        if names is None:
            reached.append((x, [linear.stage]))
        else:
            names.append(linear.stage)

    _, run = next(runner.iter_batches(states, index))
    with watch_inputs(linears, see):
        run()
    stages = [[linear for linear in linears if linear.stage in names] for _, names in reached]
    placed = {name for _, names in reached for name in names}
    rest = [linear for linear in linears if linear.stage not in placed]
    return (stages + [rest] if rest else stages), len(stages)


def run_until_stop(run: Callable[[], object]) -> None:
    with suppress(Stop):
        run()


def rows(x: Tensor) -> Tensor:
    """(..., in) as (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are the same memory seen the same way."""
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )
