"""One block whose inputs are taken in order, beside the untouched one, in as few passes as can be.

A method that takes inputs in order prunes a block lot by lot: q, k and v, then o, then gate and up,
then down. Of each lot it asks what the linears receive now and in the untouched model, or, where a
linear adds to the residual stream (a writer), its input and how far the untouched stream is ahead
once its outputs are added. Computed from the block's input each time, that takes a pass or most of
one for every lot, in two streams. Here

  - the untouched block runs once, and what later lots need of it is kept: the inputs of the middle
    lots, and of a writer the stream after it, which is the block's input and its outputs;
  - a pass through the pruned block stops at the last input wanted. A writer's input is kept, and
    once it is pruned, its outputs: the module that ends in it (attention) is not run again;
  - with the stream before the last writer in place of the hidden states, and its input kept, the
    block's output is that stream and one product.

Where memory is short (`kept` false) nothing of this is kept, and passes start at the block's input
each time, with the same results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.methods.registry import MethodSpec
from lib.model.blocks import BlockRunner, HiddenStates, Stop
from lib.model.linears import watch_inputs, watch_outputs
from lib.model.matrix import PrunableLinear
from lib.pruning.inputs import Group
from lib.pruning.observe import DenseTwin, Observation, rows, run_until_stop
from lib.pruning.residual import Writer, Writers, handing_on, stream_at

Found = dict[str, Tensor]  # by a linear's name: its input; of a writer, the stream after it


class OrderedBlock:
    """Block `index` of a method that takes inputs in order; `lots` are its linears in that order.

    The first `reached` lots have one input each, but for experts.
    `kept`: whether there is memory for what saves passes. `goes_on`: whether the block's outputs
    will be wanted; `advance_` gives them, and ends the block.
    """

    def __init__(
        self,
        runner: BlockRunner,
        states: HiddenStates,
        index: int,
        lots: list[list[PrunableLinear]],
        reached: int,
        twin: DenseTwin,
        writers: Writers,
        method_spec: MethodSpec,
        kept: bool,
        goes_on: bool,
    ) -> None:
        self.runner, self.states, self.index = runner, states, index
        self.lots, self.twin, self.method_spec = lots, twin, method_spec
        self.kept, self.goes_on = kept, goes_on
        self.writers: list[Writer | None] = []
        for place, lot in enumerate(lots):
            later = [linear for after in lots[place + 1 :] for linear in after]
            self.writers.append(writers.find(states, index, lot, later))
        self.last = len(lots) - 1
        self.shared = [
            place < reached and all(linear.expert is None for linear in lot)
            for place, lot in enumerate(lots)
        ]
        self.rounds = self._rounds()
        final = self.writers[self.last]
        # the block's outputs are the stream that is kept then, and one product
        self.by_product = bool(kept and goes_on and final and final.exact)
        self.dense: list[Found] = [{} for _ in states.batches]
        self.inputs: list[dict[int, Tensor]] = [{} for _ in states.batches]  # of writers, by place
        self.outputs: list[dict[int, Tensor]] = [{} for _ in states.batches]  # of pruned writers
        self.on_progress = False  # the untouched stream, through the block

    def observe(self, place: int) -> list[Group]:
        """The statistics of lot `place`, those before it being pruned."""
        if self.writers[place]:
            return [self._observe_writer(place)]
        lot = self.lots[place]
        observation = Observation(lot, self.method_spec, self.runner.device, self.shared[place])
        with watch_inputs(lot, observation.see), record_function("forward"):
            for batch, dense, _, run in self._runs(place):
                observation.start_pass(dense)
                with self._short(place, batch):
                    run_until_stop(run)
        return observation.groups

    def _observe_writer(self, place: int) -> Group:
        """Of a lot of one linear, and how far the stream lags once its outputs are added."""
        [linear], writer, transfer = self.lots[place], self.writers[place], self.runner.transfer
        group = Group([linear], self.method_spec(linear.shape[1], self.runner.device))
        for batch, dense, cut, run in self._runs(place):
            with record_function("forward"), self._short(place, batch):
                if writer.last:
                    x, here = stream_at(run, linear)
                    out, aim = linear.module(x), transfer.fetch(self.twin.states.hidden, cut)
                else:  # the stream stands there as it came
                    x, out = passed(run, linear)
                    here, aim = transfer.fetch(self.states.hidden, cut), dense[linear.name]
            with record_function("statistics"):
                lag = aim.float() - (here.float() + out.float())
                group.method.observe(rows(x), lag=rows(lag))
            if writer.last and self.by_product:
                self.inputs[batch] = {place: owned(x)}
                transfer.store_(self.states.hidden, cut, here)
            elif self.kept and writer.ends:
                self.inputs[batch][place] = owned(x)
            if place == self.last and (self.by_product or not self.goes_on):
                self.outputs[batch].clear()
        return group

    @torch.no_grad()
    def advance_(self) -> None:
        """Take both streams through the pruned block and the untouched one."""
        states, transfer = self.states, self.runner.transfer
        if not self.on_progress:
            self.runner.advance_(self.twin.states, self.index, self.twin.block)
        if not self.by_product:
            with record_function("forward"):
                for batch, (cut, run) in enumerate(self.runner.iter_batches(states, self.index)):
                    with self._short(len(self.lots), batch):
                        transfer.store_(states.hidden, cut, run())
            return
        [linear] = self.lots[self.last]
        arriving = transfer.batches(states.hidden, states.batches)
        with record_function("forward"):
            for cut, stream, inputs in zip(states.batches, arriving, self.inputs, strict=True):
                out = linear.module(inputs.pop(self.last))
                transfer.store_(states.hidden, cut, stream + out)

    def _short(self, place: int, batch: int) -> AbstractContextManager[None]:
        """Inside, what ends in a pruned writer before `place` is not computed again."""
        inputs, outputs = self.inputs[batch], self.outputs[batch]
        for earlier in [one for one in inputs if one < place]:
            [linear] = self.lots[earlier]
            outputs[earlier] = linear.module(inputs.pop(earlier))
        if not outputs:
            return nullcontext()
        ends = {
            self.writers[one].ends: (out, self.writers[one].length) for one, out in outputs.items()
        }
        return handing_on(self.runner.blocks[self.index], ends)

    def _runs(self, place: int) -> Iterator[tuple]:
        """For each batch: its number, what is needed of the untouched block, its cut, its run."""
        runs = self.runner.iter_batches(self.states, self.index)
        for batch, (dense, (cut, run)) in enumerate(zip(self._dense(place), runs, strict=True)):
            yield batch, dense, cut, run

    def _needs(self, place: int) -> list[PrunableLinear]:
        """Of which linears of the untouched block something is needed for lot `place`."""
        if self.writers[place]:
            return [] if self.writers[place].last else self.lots[place]
        if self.shared[place]:
            return self.lots[place][:1]
        # an expert's tokens are chosen by a router, which may choose others in the dense model
        return [linear for linear in self.lots[place] if linear.expert is None]

    def _rounds(self) -> dict[int, list[int]]:
        """{lot before which the untouched block runs: lots of which that run gives the needs}."""
        places = list(range(len(self.lots)))
        if not self.kept:
            return {place: [place] for place in places}
        # the widest inputs are the last lot's: not worth keeping through the whole block
        if len(places) > 1 and not self.writers[self.last] and self._needs(self.last):
            return {0: places[:-1], self.last: places[-1:]}
        return {0: places}

    def _dense(self, place: int) -> Iterator[Found]:
        """For each batch, what lot `place` needs of the untouched block."""
        own = [linear.name for linear in self._needs(place)]
        through = place == max(self.rounds) and (self.goes_on or self.writers[self.last])
        needs = [linear for one in self.rounds.get(place, ()) for linear in self._needs(one)]
        if not (needs or through and place in self.rounds):
            for found in self.dense:
                yield {name: found.pop(name) for name in own if name in found}
            return
        states, transfer = self.twin.states, self.runner.transfer
        for batch, (cut, run) in enumerate(
            self.runner.iter_batches(states, self.index, self.twin.block)
        ):
            with record_function("forward"):
                found, out = self._dense_run(run, cut, needs, bool(through))
            if through:
                transfer.store_(states.hidden, cut, out)
            here = {name: found.pop(name) for name in own if name in found}
            if found:
                self.dense[batch] = {name: owned(tensor) for name, tensor in found.items()}
            yield here
        self.on_progress = bool(through)

    def _dense_run(
        self, run, cut: slice, needs: list[PrunableLinear], through: bool
    ) -> tuple[Found, Tensor | None]:
        """What `needs` ask for, and the untouched block's outputs where it runs through."""
        found: Found = {}
        adding = {
            lot[0].name for lot, writer in zip(self.lots, self.writers, strict=True) if writer
        }

        def note(linear: PrunableLinear, tensor: Tensor) -> None:
            found.setdefault(linear.name, tensor)
            if len(found) == len(needs) and not through:
                raise Stop

        def add(linear: PrunableLinear, _: Tensor, out: Tensor) -> None:
            note(linear, self.runner.transfer.fetch(self.twin.states.hidden, cut) + out)

        twins = [self.twin.linears[linear.name] for linear in needs]
        out: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(watch_inputs([t for t in twins if t.name not in adding], note))
            stack.enter_context(watch_outputs([t for t in twins if t.name in adding], add))
            run_until_stop(lambda: out.append(run()))
        return found, out[0] if out else None


def passed(run, linear: PrunableLinear) -> tuple[Tensor, Tensor]:
    """The linear's input (..., in) and output (..., out), in a run that goes no further."""
    seen: list[Tensor] = []

    def see(_: PrunableLinear, x: Tensor, out: Tensor) -> None:
        seen.extend((x, out))
        raise Stop

    with watch_outputs([linear], see):
        run_until_stop(run)
    return seen[0], seen[1]


def owned(x: Tensor) -> Tensor:
    """A tensor to keep: without what else stands in its memory."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
