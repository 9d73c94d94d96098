"""Sequential calibration of one block beside its dense copy, with as few passes as possible.

A sequential method prunes a block stage by stage: q, k and v, then o, then gate and up, then down.
For each stage it needs the layers' inputs in the pruned and in the dense model. For a residual
projection it needs the input and the difference between both residual streams after it. Caching
avoids up to one pass per stage in each of the two models:

  - The dense block runs once. The inputs of the middle stages are cached, and for a residual
    projection the stream after it.
  - A pass through the pruned block stops at the last input wanted.
  - If the stream before the last projection replaces the hidden states, and its input is cached,
    the block's output is that stream plus one product.

If memory is short (`cache_inputs` false) nothing is cached; the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods.base import PruningMethod
from ..model.blocks import BlockRunner, HiddenStates, Stop
from ..model.linears import find_linears, watch_inputs, watch_outputs
from ..model.matrix import PrunableLinear
from .inputs import Group, by_input, observe, rows
from .residual import ResidualProjection, find_projection, stream_at

Needs = dict[str, Tensor]  # by layer name: its input; for a projection, the stream after it


@dataclass(frozen=True)
class Stage:
    """Layers of a block that are observed together, and pruned before those of later stages."""

    linears: list[PrunableLinear]
    shared: bool  # all receive one input
    projection: ResidualProjection | None  # its place in the residual stream, if it adds to it

    def dense_needs(self) -> list[PrunableLinear]:
        """Return the layers for which a tensor of the dense block is needed."""
        if self.projection:
            return [] if self.projection.last else self.linears
        if self.shared:
            return self.linears[:1]
        # an expert's tokens depend on the router, which may choose others in the dense model
        return [linear for linear in self.linears if linear.expert is None]


@torch.no_grad()
def find_order(
    runner: BlockRunner, states: HiddenStates, index: int, linears: list[PrunableLinear]
) -> list[Stage]:
    """Return the layers in stages, one per distinct input, in the order of the forward pass.

    Layers that the first batch does not reach form a stage at the end.
    """
    _, run = next(runner.iter_batches(states, index))
    reached = by_input(linears, run)
    stages = [[one for one in linears if one.parameter_name in names] for names in reached]
    placed = {name for names in reached for name in names}
    if rest := [linear for linear in linears if linear.parameter_name not in placed]:
        stages.append(rest)
    order = []
    for place, stage in enumerate(stages):
        later = [linear for after in stages[place + 1 :] for linear in after]
        projection = find_projection(runner, states, index, stage, later)
        shared = place < len(reached) and all(linear.expert is None for linear in stage)
        order.append(Stage(stage, shared, projection))
    return order


@dataclass(eq=False)
class OrderedBlock:
    """Block `index` under sequential calibration; `order` are its stages.

    `dense` is a copy of the dense block. `need_outputs`: whether the block's outputs are wanted;
    `advance_` computes them, and ends the block.
    """

    runner: BlockRunner
    method: type[PruningMethod]
    index: int
    order: list[Stage]
    dense: nn.Module
    states: HiddenStates
    dense_states: HiddenStates
    cache_inputs: bool
    need_outputs: bool

    def __post_init__(self) -> None:
        self.dense_linears, _ = find_linears(self.dense, f"{self.runner.name}.{self.index}")
        self.last, final, batches = len(self.order) - 1, self.order[-1], self.states.batches
        # with caching the dense block runs once, otherwise once per stage
        self.dense_to_the_end = bool(self.need_outputs or final.projection)
        self.needs: list[Needs] = [{} for _ in batches]  # tensors cached for later stages
        # the block's outputs are then the cached stream plus one product
        exact = final.projection and final.projection.exact
        self.finish_from_stream = bool(self.cache_inputs and self.need_outputs and exact)
        self.last_inputs: list[Tensor] = []  # of the last projection, by batch

    def observe(self, place: int) -> list[Group]:
        """Return the statistics of stage `place`; the stages before it are pruned."""
        stage = self.order[place]
        if stage.projection:
            return [self._observe_projection(place, stage.projection)]
        passes = ((run, needs) for needs, _, run in self._iter_batches(place))
        return observe(self.runner, stage.linears, self.method, passes, stage.shared)

    def _observe_projection(self, place: int, projection: ResidualProjection) -> Group:
        """Return statistics of one layer, with the stream's error after its outputs are added."""
        [linear], device = self.order[place].linears, self.runner.device
        group = Group([linear], self.method(linear.shape[1], self.runner.device))
        for needs, cut, run in self._iter_batches(place):
            if projection.last:
                x, stream = stream_at(run, linear)
                out, target = linear.module(x), self.dense_states.hidden[cut].to(device)
            else:  # the stream is still the block's input
                x, out = run_to_outputs(run, linear)
                stream, target = self.states.hidden[cut].to(device), needs[linear.name]
            residual_error = target.float() - (stream.float() + out.float())
            group.observe(rows(x), residual_error=rows(residual_error))
            if self.method.needs_outputs:
                group.observe_output(linear, rows(x))
            if projection.last and self.finish_from_stream:
                self.last_inputs.append(owned(x))
                self.states.hidden[cut] = stream
        return group

    @torch.no_grad()
    def advance_(self) -> None:
        """Take both streams through the pruned and the dense block."""
        states = self.states
        if not self.finish_from_stream:
            self.runner.advance_(states, self.index)
            return
        [linear] = self.order[self.last].linears
        for cut, x in zip(states.batches, self.last_inputs, strict=True):
            stream = states.hidden[cut].to(self.runner.device)
            states.hidden[cut] = stream + linear.module(x)

    def _iter_batches(self, place: int) -> Iterator[tuple[Needs, slice, Callable[[], Tensor]]]:
        """Yield for each batch the needs from the dense block, its slice, its run."""
        runs = self.runner.iter_batches(self.states, self.index)
        for needs, batch in zip(self._iter_needs(place), runs, strict=True):
            yield needs, *batch

    def _iter_needs(self, place: int) -> Iterator[Needs]:
        """Yield for each batch the tensors that stage `place` needs from the dense block."""
        names = [linear.name for linear in self.order[place].dense_needs()]
        stages = self.order if self.cache_inputs else [self.order[place]]
        wanted = [linear for stage in stages for linear in stage.dense_needs()]
        to_the_end = self.dense_to_the_end and (self.cache_inputs or place == self.last)
        if (self.cache_inputs and place) or not (wanted or to_the_end):
            for kept in self.needs:
                yield {name: kept.pop(name) for name in names if name in kept}
            return
        states = self.dense_states
        for batch, (cut, run) in enumerate(
            self.runner.iter_batches(states, self.index, self.dense)
        ):
            needs, out = self._run_dense(run, cut, wanted, to_the_end)
            if to_the_end:
                for name, tensor in needs.items():  # an input may be that of the block
                    if same_memory(tensor, states.hidden):
                        needs[name] = tensor.clone()
                states.hidden[cut] = out
            current = {name: needs.pop(name) for name in names if name in needs}
            if needs:
                self.needs[batch] = {name: owned(tensor) for name, tensor in needs.items()}
            yield current

    def _run_dense(
        self, run: Callable[[], Tensor], cut: slice, wanted: list[PrunableLinear], to_the_end: bool
    ) -> tuple[Needs, Tensor | None]:
        """Return the needs of `wanted` in one batch, and the dense block's outputs if requested."""
        needs: Needs = {}

        def note(linear: PrunableLinear, tensor: Tensor) -> None:
            needs.setdefault(linear.name, tensor)
            if len(needs) == len(wanted) and not to_the_end:
                raise Stop

        def note_stream(linear: PrunableLinear, _: Tensor, out: Tensor) -> None:
            note(linear, self.dense_states.hidden[cut].to(out.device) + out)

        names = {linear.name for linear in wanted}
        adding = {stage.linears[0].name for stage in self.order if stage.projection}
        inputs = [linear for linear in self.dense_linears if linear.name in names - adding]
        outputs = [linear for linear in self.dense_linears if linear.name in names & adding]
        out: list[Tensor] = []
        with watch_inputs(inputs, note), watch_outputs(outputs, note_stream), suppress(Stop):
            out.append(run())
        return needs, out[0] if out else None


def run_to_outputs(run: Callable[[], Tensor], linear: PrunableLinear) -> tuple[Tensor, Tensor]:
    """Return the layer's input (..., in) and output (..., out) from a run that stops there."""
    seen: list[Tensor] = []

    def see(_: PrunableLinear, x: Tensor, out: Tensor) -> None:
        seen.extend((x, out))
        raise Stop

    with watch_outputs([linear], see), suppress(Stop):
        run()
    return seen[0], seen[1]


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def owned(x: Tensor) -> Tensor:
    """Return a tensor that shares no larger memory, so that it can be cached."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
