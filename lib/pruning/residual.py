"""The residual stream where a linear adds to it, in blocks of any architecture.

With the outputs of a linear and of all linears after it replaced by zeros, a block returns the
stream as it stands where the linear's outputs are added: if it adds them as they are. Whether it
does, one batch shows: a norm behind the linear or a factor on its outputs (Gemma 2, Granite) would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.dist.team import Team
from lib.methods.registry import Recipe
from lib.model.blocks import BlockRunner, HiddenStates, replaced
from lib.model.linears import watch_inputs
from lib.model.matrix import PrunableLinear
from lib.pruning.inputs import Group
from lib.pruning.observe import DenseTwin, rows

ROUNDINGS = 8  # of the stream's dtype, that a sum may be off by


class Writers:
    """Which linears add to the residual states: tried once for each class of blocks."""

    def __init__(self, runner: BlockRunner, team: Team) -> None:
        self.runner = runner
        self.team = team
        self.known: dict[tuple[type, str], bool] = {}

    @torch.no_grad()
    def adds(
        self,
        states: HiddenStates,
        index: int,
        lot: list[PrunableLinear],
        later: list[PrunableLinear],
    ) -> bool:
        """Whether `lot`, of block `index`, is one linear that does; `later` are those after it."""
        linear = lot[0]
        if len(lot) > 1 or linear.expert is not None:
            return False
        key = type(self.runner.blocks[index]), linear.name.split(f".{index}.", 1)[-1]
        if key not in self.known:
            _, run = next(self.runner.runs(states, index))
            try:
                found = adds_to_stream(run, linear, later)
            except RuntimeError:  # a block whose shapes depend on what the linears give
                found = False
            self.known[key] = self.team.gathered(found)[0]  # rounding could divide processes
        return self.known[key]


@torch.no_grad()
def observe_writer(
    runner: BlockRunner,
    states: HiddenStates,
    index: int,
    linear: PrunableLinear,
    later: list[PrunableLinear],
    recipe: Recipe,
    twin: DenseTwin,
) -> Group:
    """As `observe`, for a linear that adds to the stream: also how far the stream lags there."""
    group = Group([linear], recipe(linear.shape[1], runner.device))
    dense_linear, *dense_later = (twin.linears[one.name] for one in (linear, *later))
    dense_runs = runner.runs(twin.states, index, twin.block)
    for (_, run), (_, dense_run) in zip(runner.runs(states, index), dense_runs, strict=True):
        with record_function("forward"):
            x, here = stream_at(run, linear, later)
            dense, there = stream_at(dense_run, dense_linear, dense_later)
        with record_function("statistics"):
            group.method.observe(rows(x), rows(dense), rows(there.float() - here.float()))
    return group


def stream_at(
    run: Callable[[], Tensor], linear: PrunableLinear, later: Sequence[PrunableLinear]
) -> tuple[Tensor, Tensor]:
    """The linear's input (..., in), and the stream (..., hidden) that its outputs are added to."""
    inputs: list[Tensor] = []
    with watch_inputs([linear], lambda _, x: inputs.append(x)), silenced([linear, *later]):
        stream = run()
    return inputs[0], stream


def adds_to_stream(
    run: Callable[[], Tensor], linear: PrunableLinear, later: Sequence[PrunableLinear]
) -> bool:
    """Whether the block adds the linear's outputs, as they are, to what it returns."""
    outputs: list[Tensor] = []
    handle = linear.module.register_forward_hook(lambda _, args, out: outputs.append(out))
    try:
        with silenced(later):
            after = run().float()
    finally:
        handle.remove()
    if len(outputs) != 1 or outputs[0].shape != after.shape:
        return False
    with silenced([linear, *later]):
        before = run()
    added, resolution = outputs[0].float(), torch.finfo(before.dtype).eps
    before = before.float()
    off = (after - before - added).abs()
    bound = ROUNDINGS * resolution * (after.abs() + before.abs() + added.abs())
    return bool((off <= bound).all() and added.any())


@contextmanager
def silenced(linears: Sequence[PrunableLinear]) -> Iterator[None]:
    """Inside, the modules of `linears` return zeros; afterwards they are their own again."""
    first = {id(linear.module): linear for linear in reversed(linears)}
    parameters: dict[int, set[str]] = {}
    for linear in linears:
        parameters.setdefault(id(linear.module), set()).add(linear.parameter)

    def make(index: int) -> Callable:
        linear = list(first.values())[index]
        whole = len(parameters[id(linear.module)]) > 1  # experts, from hidden states to the same

        def forward(*args, **kwargs) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            return x.new_zeros(*x.shape[:-1], x.shape[-1] if whole else linear.shape[0])

        return forward

    with replaced([linear.module for linear in first.values()], make):
        yield
