"""One block whose inputs are taken in order, beside the untouched one, in as few passes as can be.

A method that takes inputs in order prunes a block stage by stage: q, k and v, then o, then gate and
up, then down. Of each stage it needs what the linears receive now and in the untouched model, or,
for a residual projection, its input and how far the untouched stream is ahead once its outputs are
added. A pass or most of one for every stage, in two streams, is saved by what is kept:

  - the untouched block runs once; kept are the inputs of the middle stages, and of a residual
    projection the stream after it;
  - a pass through the pruned block stops at the last input wanted. The input of a residual
    projection is kept, and once it is pruned, its outputs: the module that ends in it (attention)
    is not run again;
  - with the stream before the last projection in place of the hidden states, and its input kept,
    the block's output is that stream and one product.

Where memory is short (`cache_inputs` false) nothing of this is kept, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.methods.base import PruningMethod
from lib.model.blocks import BlockRunner, HiddenStates, Stop
from lib.model.linears import watch_inputs, watch_outputs
from lib.model.matrix import PrunableLinear
from lib.pruning.inputs import Group
from lib.pruning.observe import DenseBlock, Observation, rows, run_until_stop
from lib.pruning.residual import (
    ResidualProjection,
    ResidualProjections,
    replayed_outputs,
    stream_at,
)

Needs = dict[str, Tensor]  # by a linear's name: its input; of a projection, the stream after it


@dataclass(frozen=True)
class BlockOrder:
    """The linears of a block in stages, one for each distinct input, in the forward's order.

    `projections`: of each stage, how it adds to the residual stream, if it does. `shared`: whether
    the stage's linears all receive one input.
    """

    stages: list[list[PrunableLinear]]
    projections: list[ResidualProjection | None]
    shared: list[bool]

    @classmethod
    def of(
        cls,
        stages: list[list[PrunableLinear]],
        n_reached: int,
        projections: ResidualProjections,
        states: HiddenStates,
        index: int,
    ) -> BlockOrder:
        """Try which of the stages, of which `n_reached` have one input each, add to the stream."""
        adding = []
        for place, stage in enumerate(stages):
            later = [linear for after in stages[place + 1 :] for linear in after]
            adding.append(projections.find(states, index, stage, later))
        shared = [
            place < n_reached and all(linear.expert is None for linear in stage)
            for place, stage in enumerate(stages)
        ]
        return cls(stages, adding, shared)

    @property
    def last(self) -> int:
        return len(self.stages) - 1

    def dense_needs(self, place: int) -> list[PrunableLinear]:
        """The linears of the untouched block of which stage `place` needs something."""
        if projection := self.projections[place]:
            return [] if projection.last else self.stages[place]
        if self.shared[place]:
            return self.stages[place][:1]
        # an expert's tokens are chosen by a router, which may choose others in the dense model
        return [linear for linear in self.stages[place] if linear.expert is None]

    def dense_rounds(self, cache_inputs: bool) -> dict[int, list[int]]:
        """{stage before which the untouched block runs: stages whose needs that run gives}."""
        places = list(range(len(self.stages)))
        if not cache_inputs:
            return {place: [place] for place in places}
        # the widest inputs are the last stage's: not worth keeping through the whole block
        if len(places) > 1 and not self.projections[self.last] and self.dense_needs(self.last):
            return {0: places[:-1], self.last: places[-1:]}
        return {0: places}


class OrderedBlock:
    """Block `index` of a method that takes inputs in order.

    `cache_inputs`: whether there is memory for what saves passes. `need_outputs`: whether the
    block's outputs will be wanted; `advance_` computes them, and ends the block.
    """

    def __init__(
        self,
        runner: BlockRunner,
        states: HiddenStates,
        index: int,
        order: BlockOrder,
        dense: DenseBlock,
        method: type[PruningMethod],
        cache_inputs: bool,
        need_outputs: bool,
    ) -> None:
        self.runner, self.states, self.index = runner, states, index
        self.order, self.dense, self.method = order, dense, method
        self.cache_inputs, self.need_outputs = cache_inputs, need_outputs
        final = order.projections[order.last]
        self.dense_rounds = order.dense_rounds(cache_inputs)
        self.dense_to_the_end = bool(need_outputs or final)
        self.dense_advanced = False  # its hidden states are those after the block
        self.needs: list[Needs] = [{} for _ in states.batches]  # kept for later stages
        # the block's outputs are the stream that is kept then, and one product
        self.finish_from_stream = bool(cache_inputs and need_outputs and final and final.exact)
        # of projections, by place: inputs, then outputs once they are pruned
        self.inputs: list[dict[int, Tensor]] = [{} for _ in states.batches]
        self.outputs: list[dict[int, Tensor]] = [{} for _ in states.batches]

    def observe(self, place: int) -> list[Group]:
        """The statistics of stage `place`, those before it being pruned."""
        if projection := self.order.projections[place]:
            return [self._observe_projection(place, projection)]
        stage, shared = self.order.stages[place], self.order.shared[place]
        observation = Observation(stage, self.method, self.runner.device, shared)
        with watch_inputs(stage, observation.see), record_function("forward"):
            for batch, needs, _, run in self._iter_batches(place):
                observation.start_pass(needs)
                with self._skip_done_modules(place, batch):
                    run_until_stop(run)
        return observation.groups

    def _observe_projection(self, place: int, projection: ResidualProjection) -> Group:
        """The statistics of a single linear, with the stream's error once its outputs are added."""
        [linear], transfer = self.order.stages[place], self.runner.transfer
        group = Group([linear], self.method(linear.shape[1], self.runner.device))
        for batch, needs, cut, run in self._iter_batches(place):
            with record_function("forward"), self._skip_done_modules(place, batch):
                if projection.last:
                    x, stream = stream_at(run, linear)
                    out, target = linear.module(x), transfer.fetch(self.dense.states.hidden, cut)
                else:  # the stream is still the block's input
                    x, out = run_to_outputs(run, linear)
                    stream, target = transfer.fetch(self.states.hidden, cut), needs[linear.name]
            with record_function("statistics"):
                residual_error = target.float() - (stream.float() + out.float())
                group.method.observe(rows(x), residual_error=rows(residual_error))
            if projection.last and self.finish_from_stream:
                self.inputs[batch] = {place: owned(x)}
                transfer.store_(self.states.hidden, cut, stream)
            elif self.cache_inputs and projection.ends:
                self.inputs[batch][place] = owned(x)
            if place == self.order.last and (self.finish_from_stream or not self.need_outputs):
                self.outputs[batch].clear()
        return group

    @torch.no_grad()
    def advance_(self) -> None:
        """Take both streams through the pruned block and the untouched one."""
        states, transfer, last = self.states, self.runner.transfer, self.order.last
        if not self.dense_advanced:
            self.runner.advance_(self.dense.states, self.index, self.dense.block)
        if not self.finish_from_stream:
            with record_function("forward"):
                for batch, (cut, run) in enumerate(self.runner.iter_batches(states, self.index)):
                    with self._skip_done_modules(last + 1, batch):
                        transfer.store_(states.hidden, cut, run())
            return
        [linear] = self.order.stages[last]
        arriving = transfer.batches(states.hidden, states.batches)
        with record_function("forward"):
            for cut, stream, inputs in zip(states.batches, arriving, self.inputs, strict=True):
                out = linear.module(inputs.pop(last))
                transfer.store_(states.hidden, cut, stream + out)

    def _skip_done_modules(self, place: int, batch: int) -> AbstractContextManager[None]:
        """Inside, modules that end in a pruned projection before `place` are not run again."""
        inputs, outputs = self.inputs[batch], self.outputs[batch]
        for earlier in [done for done in inputs if done < place]:
            [linear] = self.order.stages[earlier]
            outputs[earlier] = linear.module(inputs.pop(earlier))
        if not outputs:
            return nullcontext()
        replayed = {}
        for earlier, out in outputs.items():
            projection = self.order.projections[earlier]
            replayed[projection.ends] = out, projection.length
        return replayed_outputs(self.runner.blocks[self.index], replayed)

    def _iter_batches(self, place: int) -> Iterator[tuple[int, Needs, slice, Callable[[], Tensor]]]:
        """For each batch: its number, what is needed of the untouched block, its slice, its run."""
        runs = self.runner.iter_batches(self.states, self.index)
        needs = self._iter_needs(place)
        for batch, (of_batch, (cut, run)) in enumerate(zip(needs, runs, strict=True)):
            yield batch, of_batch, cut, run

    def _iter_needs(self, place: int) -> Iterator[Needs]:
        """For each batch, what stage `place` needs of the untouched block."""
        own = [linear.name for linear in self.order.dense_needs(place)]
        places = self.dense_rounds.get(place, ())
        wanted = [linear for later in places for linear in self.order.dense_needs(later)]
        to_the_end = place == max(self.dense_rounds) and self.dense_to_the_end
        if not (wanted or to_the_end):
            for kept in self.needs:
                yield {name: kept.pop(name) for name in own if name in kept}
            return
        states = self.dense.states
        runs = self.runner.iter_batches(states, self.index, self.dense.block)
        for batch, (cut, run) in enumerate(runs):
            with record_function("forward"):
                needs, out = self._run_dense(run, cut, wanted, to_the_end)
            if to_the_end:
                self.runner.transfer.store_(states.hidden, cut, out)
            now = {name: needs.pop(name) for name in own if name in needs}
            if needs:
                self.needs[batch] = {name: owned(tensor) for name, tensor in needs.items()}
            yield now
        self.dense_advanced = to_the_end

    def _run_dense(
        self, run: Callable[[], Tensor], cut: slice, wanted: list[PrunableLinear], to_the_end: bool
    ) -> tuple[Needs, Tensor | None]:
        """What `wanted` need of one batch, and the untouched block's outputs if `to_the_end`."""
        needs: Needs = {}
        stages = zip(self.order.stages, self.order.projections, strict=True)
        adding = {stage[0].name for stage, projection in stages if projection}

        def note(linear: PrunableLinear, tensor: Tensor) -> None:
            needs.setdefault(linear.name, tensor)
            if len(needs) == len(wanted) and not to_the_end:
                raise Stop

        def note_stream(linear: PrunableLinear, _: Tensor, out: Tensor) -> None:
            note(linear, self.runner.transfer.fetch(self.dense.states.hidden, cut) + out)

        linears = [self.dense.linears[linear.name] for linear in wanted]
        inputs = [linear for linear in linears if linear.name not in adding]
        outputs = [linear for linear in linears if linear.name in adding]
        out: list[Tensor] = []
        with watch_inputs(inputs, note), watch_outputs(outputs, note_stream):
            run_until_stop(lambda: out.append(run()))
        return needs, out[0] if out else None


def run_to_outputs(run: Callable[[], Tensor], linear: PrunableLinear) -> tuple[Tensor, Tensor]:
    """The linear's input (..., in) and output (..., out), in a run that goes no further."""
    seen: list[Tensor] = []

    def see(_: PrunableLinear, x: Tensor, out: Tensor) -> None:
        seen.extend((x, out))
        raise Stop

    with watch_outputs([linear], see):
        run_until_stop(run)
    return seen[0], seen[1]


def owned(x: Tensor) -> Tensor:
    """A tensor to keep: without anything else that shares its memory."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
