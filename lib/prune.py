"""Prune a model block by block: observe what its linears receive, solve, propagate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.distributed.context import DistContext
from lib.methods.registry import MethodSpec
from lib.model.blocks import BlockRunner, HiddenStates
from lib.model.finite import all_finite, check_weight
from lib.model.linears import eager_experts, find_linears
from lib.model.matrix import PrunableLinear
from lib.model.shapes import FLOAT, META, BlockShape, StepBytes, Workload
from lib.pruning.allocation import Allocation
from lib.pruning.inputs import Group, SharedWeights, merge
from lib.pruning.observe import DenseBlock, find_stages, observe, own_windows
from lib.pruning.ordered import BlockOrder, OrderedBlock
from lib.pruning.residual import ResidualProjections
from lib.util.errors import RunWarning, UserError
from lib.util.events import emit
from lib.util.products import exact_products

# of Group.cost a second, by ADMM, the slowest method: a fifth of one busy core, and a thirtieth
# of a large GPU
SLOWEST = {"cpu": 1e8, "cuda": 1e10}
UNREACHED = "no calibration token reached it, or it is used without being called"


@dataclass
class BlockNotes:
    """What pruning one block gave to report, as it is kept with the block."""

    pruned: list[str] = field(default_factory=list)  # linears
    fallbacks: dict[str, list[str]] = field(default_factory=dict)  # method: experts
    warnings: list[str] = field(default_factory=list)


@dataclass
class Pruned:
    """What was pruned and what was left dense, in weights by linear, and why it was left."""

    pruned: dict[str, int] = field(default_factory=dict)
    left_dense: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of what was left dense
    notes: list[BlockNotes] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        return [warning for notes in self.notes for warning in notes.warnings]

    def leave(self, name: str, size: int, reason: str) -> None:
        self.left_dense[name] = size
        self.reasons[name] = reason

    def summary(self) -> list[str]:
        """Lines for the user: nothing is left dense silently."""
        pruned, left = sum(self.pruned.values()), sum(self.left_dense.values())
        lines = [
            f"pruned {pruned:,} weights in {len(self.pruned)} linears; "
            f"left {left:,} weights of the blocks dense"
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(f"left dense, {reason}", []).append(name)
        for notes in self.notes:
            for method, experts in notes.fallbacks.items():
                reason = f"pruned by {method}, too few tokens were routed to them"
                by_reason.setdefault(reason, []).extend(experts)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{reason}: {', '.join(names[:3])}{more}")
        return lines + self.warnings


class Pruner:
    """Prunes every linear of every block in place; embeddings and the output head stay dense.

    `allocation`: how sparse each linear becomes. `rounding`: the dtype in which the model will be
    saved, to which pruned weights are rounded. `dist`: the processes that share the work.
    The result is reported in `done`.
    """

    def __init__(
        self,
        runner: BlockRunner,
        method_spec: MethodSpec,
        allocation: Allocation,
        *,
        dist: DistContext,
        rounding: torch.dtype | None = None,
    ) -> None:
        self.runner = runner
        self.method_spec = method_spec
        self.allocation = allocation
        self.dist = dist
        self.rounding = rounding
        self.done = Pruned()
        self.shared = SharedWeights(runner.blocks)
        self.projections = ResidualProjections(runner, dist)
        self.stages: dict[tuple, tuple[list[list[int]], int]] = {}  # of classes of blocks

    @torch.no_grad()
    def run(
        self,
        windows: Tensor | None,
        batch_size: int,
        state_device: torch.device | str = "cpu",
        on_progress: Callable[[int], None] | None = None,
        cache_inputs: bool = True,
    ) -> Pruned:
        """Calibrate on windows (n, tokens), None for a method that needs none, and prune.

        `state_device`: where hidden states are kept. `on_progress(1)` is called after each block.
        `cache_inputs`: whether there is memory for inputs of a block that save passes through it.
        Raises UserError where a weight or an activation is not finite, or a linear can't carry the
        N:M pattern.
        """
        # from another memory they would take longer to come than to be computed again
        self.cache_inputs = (
            cache_inputs and torch.device(state_device).type == self.runner.device.type
        )
        with eager_experts(self.runner.model):
            states = dense = None
            if self.method_spec.cls.observes:
                own, self.idle = own_windows(windows, self.dist)
                states = self.runner.capture(own, batch_size, state_device)
            if self.method_spec.cls.dense_stream:
                dense = replace(states, hidden=self.runner.transfer.copy(states.hidden))
            for index in range(len(self.runner.blocks)):
                with self.runner.on_device(index, write_back=True):
                    self._block_(index, states, dense)
                if on_progress:
                    on_progress(1)
        return self.done

    def _block_(
        self, index: int, states: HiddenStates | None, dense_states: HiddenStates | None
    ) -> None:
        """Prune one block, or load it as it was finished, and take the streams through it."""
        block, prefix = self.runner.blocks[index], f"{self.runner.name}.{index}"
        linears = self._linears(index)
        dense = DenseBlock.copy_of(dense_states, block, prefix) if dense_states else None
        need_outputs = states is not None and index + 1 < len(self.runner.blocks)
        self.done.notes.append(BlockNotes())
        ordered = None
        if not self._restore_(index, linears):
            if dense and linears:
                ordered = OrderedBlock(
                    runner=self.runner,
                    states=states,
                    index=index,
                    order=self._order(index, linears, states),
                    dense=dense,
                    method_spec=self.method_spec,
                    cache_inputs=self.cache_inputs,
                    need_outputs=need_outputs,
                )
                written = self._prune_in_order_(ordered)
            else:
                written = self._prune_at_once_(index, linears, states)
            notes = self.done.notes[-1]
            notes.warnings = sum(self.dist.all_gather_object(notes.warnings), [])
            self._keep(index, linears, written)
        for linear in linears:
            if linear.name not in self.done.pruned:
                self.done.leave(linear.name, prod(linear.shape), UNREACHED)
        if need_outputs:
            self._advance_(index, states, dense, ordered)
            states.block_args[index] = []  # the block's recorded arguments are not needed again

    def _linears(self, index: int) -> list[PrunableLinear]:
        """The block's linears that are still to be pruned; the others are reported."""
        linears, left_dense = find_linears(self.runner.blocks[index], f"{self.runner.name}.{index}")
        for name, (size, reason) in left_dense.items():
            self.done.leave(name, size, reason)
        linears = [linear for linear in linears if not self.shared.is_pruned(linear)]
        if not self.runner.weights.resident:  # otherwise they were checked when they were loaded
            for linear in linears:
                check_weight(linear, self.runner.named)
        return linears

    def _restore_(self, index: int, linears: list[PrunableLinear]) -> bool:
        """Load the block and its notes if an interrupted run has finished it; whether it has."""
        weights = self.runner.weights
        if not weights.has(index):
            return False
        notes = BlockNotes(**weights.load(index))
        self.done.notes[-1] = replace(notes, pruned=[])
        for linear in linears:
            if linear.name in notes.pruned:
                self._mark_pruned(linear)
        return True

    def _keep(self, index: int, linears: list[PrunableLinear], written: dict[str, Tensor]) -> None:
        """Under --resume keep the block, and of quantised linears what their codes are made of."""
        prefix = f"{self.runner.name}.{index}."
        matrices = {
            linear.name.removeprefix(prefix): written[linear.name]
            for linear in linears
            if linear.is_quantised and linear.name in written
        }
        self.runner.weights.save(index, vars(self.done.notes[-1]), matrices)

    def _advance_(
        self,
        index: int,
        states: HiddenStates,
        dense: DenseBlock | None,
        ordered: OrderedBlock | None,
    ) -> None:
        """Take the streams through the pruned block and the untouched one."""
        if ordered:
            ordered.advance_()
            return
        if dense:
            self.runner.advance_(dense.states, index, dense.block)
        self.runner.advance_(states, index)

    def _order(self, index: int, linears: list[PrunableLinear], states: HiddenStates) -> BlockOrder:
        """The order in which the linears' inputs are taken, tried once for a class of blocks."""
        prefix = f"{self.runner.name}.{index}."
        names = [(linear.name.removeprefix(prefix), linear.shape) for linear in linears]
        key = type(self.runner.blocks[index]), *names
        if key not in self.stages:
            place = {linear: at for at, linear in enumerate(linears)}
            stages, n_reached = find_stages(self.runner, states, index, linears)
            places = [[place[linear] for linear in stage] for stage in stages]
            self.stages[key] = places, n_reached
        places, n_reached = self.stages[key]
        stages = [[linears[at] for at in stage] for stage in places]
        return BlockOrder.of(stages, n_reached, self.projections, states=states, index=index)

    def _prune_in_order_(self, ordered: OrderedBlock) -> dict[str, Tensor]:
        """Observe and prune stage by stage; {linear's name: what was stored in it}."""
        written: dict[str, Tensor] = {}
        for place, stage in enumerate(ordered.order.stages):
            written |= self._solve_observed_(ordered.observe(place), stage)
        return written

    def _prune_at_once_(
        self, index: int, linears: list[PrunableLinear], states: HiddenStates | None
    ) -> dict[str, Tensor]:
        """Observe all inputs of the dense block, then prune; as `_prune_in_order_`."""
        device = self.runner.device
        if states is None:
            groups = [
                Group([linear], self.method_spec(linear.shape[1], device)) for linear in linears
            ]
            return self._solve_(groups)
        groups = observe(self.runner, states, index, linears, self.method_spec)
        return self._solve_observed_(groups, linears)

    def _solve_observed_(
        self, groups: list[Group], stage: list[PrunableLinear]
    ) -> dict[str, Tensor]:
        """Solve the groups that any process has observed."""
        for group in groups if self.idle else ():
            group.reset_()
        return self._solve_(merge(groups, stage, self.method_spec, self.runner.device, self.dist))

    def _solve_(self, groups: list[Group]) -> dict[str, Tensor]:
        """Solve this process's groups, and store those of all processes."""
        sums = [self.dist.all_reduce_(group.method.statistics()) for group in groups]
        costs = [group.cost for group in groups]
        owners = self.dist.assign_owners(costs)
        written: dict[str, Tensor] = {}
        for group, owner, handles in zip(groups, owners, sums, strict=True):
            for handle in handles:
                handle.wait()
            if group.fallback:
                self.done.notes[-1].fallbacks.setdefault(group.fallback, []).append(group.names)
            if owner == self.dist.rank:
                for linear, matrix in zip(group.linears, self._solved(group), strict=True):
                    self._store_(linear, matrix)
                    written[linear.name] = matrix
        self.dist.barrier(self._longest(costs, owners))
        for group, owner in zip(groups, owners, strict=True) if self.dist.size > 1 else ():
            for linear in group.linears:
                matrix = written.get(linear.name)
                matrix = linear.empty_matrix(self.rounding) if matrix is None else matrix
                matrix = self.dist.broadcast_(matrix, owner)
                if owner != self.dist.rank:
                    self._store_(linear, matrix)
                written[linear.name] = matrix
        return written

    def _longest(self, costs: list[float], owners: list[int]) -> float:
        """Seconds in which every process has solved what it owns, however slow it is."""
        load = [0.0] * self.dist.size
        for cost, owner in zip(costs, owners, strict=True):
            load[owner] += cost
        return max(load) / SLOWEST[self.runner.device.type]

    @exact_products()
    def _solved(self, group: Group) -> list[Tensor]:
        """The group's matrices (out, in), pruned, in the dtype in which they are saved."""
        emit(f"solve {group.names}")
        for statistic in group.method.statistics():
            if not all_finite(statistic):
                raise UserError(f"{group.names}: activations are not finite; try --dtype float32")
        with record_function("moving"):
            matrices = [linear.matrix() for linear in group.linears]
        with record_function("solve"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self._change_(group, matrices)
            except UserError as error:
                raise UserError(f"{group.names}: {error}") from error
        for warning in caught:
            prefix = "" if issubclass(warning.category, RunWarning) else f"{group.names}: "
            self.done.notes[-1].warnings.append(f"{prefix}{warning.message}")
        for linear, matrix in zip(group.linears, matrices, strict=True):
            if not all_finite(matrix):
                raise UserError(
                    f"{linear.name}: pruned weights are not finite; try --dtype float32"
                )
        solved = zip(group.linears, matrices, strict=True)
        return [linear.to_saved_dtype(matrix, self.rounding) for linear, matrix in solved]

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        """Prune the matrices (out, in) of a group in place."""
        sparsities = [self.allocation.sparsity[linear.name] for linear in group.linears]
        costs = [self.allocation.output_costs.get(linear.name) for linear in group.linears]
        group.solver().prune_(matrices, sparsities, costs)

    def _store_(self, linear: PrunableLinear, matrix: Tensor) -> None:
        linear.set_weight_(matrix)
        self._mark_pruned(linear)

    def _mark_pruned(self, linear: PrunableLinear) -> None:
        self.done.pruned[linear.name] = prod(linear.shape)
        self.done.notes[-1].pruned.append(linear.name)
        self.shared.mark_pruned(linear)


def pruning_bytes(load: Workload, method_spec: MethodSpec, cache_inputs: bool = True) -> StepBytes:
    """Memory of pruning: hidden states of all calibration windows, and the work on a block."""
    cls = method_spec.cls
    streams = 2 if cls.dense_stream else 1
    hidden = streams * load.hidden_states(load.windows if cls.observes else 0)
    if cls.dense_stream and cache_inputs:
        channels = max(_cached_channels(block) for block in load.shapes.blocks)
        hidden += load.windows * load.seqlen * channels * load.working.itemsize
    return StepBytes(hidden, max(_block_bytes(load, method_spec, b) for b in load.shapes.blocks))


def _block_bytes(load: Workload, method_spec: MethodSpec, block: BlockShape) -> int:
    """Statistics of a block, with the larger of a batch on its way and the solver's needs."""
    cls = method_spec.cls
    statistics = solving = passing = 0
    for each in block.inputs:
        sums, work = method_spec(each.width, META).bytes_needed(each.outputs)
        # inputs that are taken in order are forgotten one by one
        statistics = max(statistics, sums) if cls.in_order else statistics + sums
        solving = max(solving, FLOAT * each.width * sum(each.outputs) + work)
    if cls.dense_stream:
        statistics += block.weights * load.working.itemsize  # the untouched block
    if cls.observes:
        passing = (2 if cls.dense_stream else 1) * load.activations(block)
    return statistics + max(passing, solving + block.pruned * load.saved.itemsize)


def _cached_channels(block: BlockShape) -> int:
    """Channels of each token that are cached of a block's inputs: its middle ones, or the last."""
    widths = [each.width for each in block.inputs if not each.experts]
    last = 0 if len(widths) < len(block.inputs) else widths.pop()  # of experts nothing is cached
    return max(sum(widths[1:]), last)
