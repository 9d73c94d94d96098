"""Prune a model block by block: observe what its linears receive, solve, propagate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.distributed.context import DistContext
from lib.methods.registry import MethodSpec
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner, HiddenStates
from lib.model.finite import all_finite, check_weight
from lib.model.linears import eager_experts, find_linears
from lib.model.matrix import PrunableLinear
from lib.pruning.check import asked_of
from lib.pruning.inputs import Group, SharedWeights, merge
from lib.pruning.journal import Journal
from lib.pruning.observe import DenseTwin, observe, own_windows, stages
from lib.pruning.ordered import OrderedBlock
from lib.pruning.residual import Writers
from lib.util.errors import RunWarning, UserError

# of Group.cost a second, by ADMM, the slowest method: a fifth of one busy core, and a thirtieth
# of a large GPU
SLOWEST = {"cpu": 1e8, "cuda": 1e10}
UNREACHED = "no calibration token reached it, or it is used without being called"


@dataclass
class Pruned:
    """What was done: sizes in weights of what was pruned and left dense, and why it was left."""

    pruned: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)  # method: experts
    warnings: list[str] = field(default_factory=list)

    def leave(self, name: str, size: int, why: str) -> None:
        self.left[name] = size
        self.why[name] = why

    def note(self, group: Group) -> None:
        if group.fallback:
            self.fallbacks.setdefault(group.fallback, []).append(group.names)

    def summary(self) -> list[str]:
        """What a user should know, a line each: nothing is left dense silently."""
        pruned, left = sum(self.pruned.values()), sum(self.left.values())
        lines = [
            f"pruned {pruned:,} weights in {len(self.pruned)} linears; "
            f"left {left:,} weights of the blocks dense"
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.why.items():
            reasons.setdefault(f"left dense, {why}", []).append(name)
        for method, names in self.fallbacks.items():
            reasons[f"pruned by {method}, too few tokens were routed to them"] = names
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{why}: {', '.join(names[:3])}{more}")
        return lines + self.warnings


class Pruner:
    """Prunes every linear of every block in place; embeddings and the output head stay dense.

    `sparsity`: of all linears, or of each by its name. `rounding`: the dtype in which the model
    will be saved, to which pruned weights are rounded. `dist`: the processes that share the work.
    `journal`, of the main process: keeps every finished block, and gives back those of an
    interrupted run.
    What was done is in `done`.
    """

    def __init__(
        self,
        runner: BlockRunner,
        method_spec: MethodSpec,
        sparsity: Sparsity | Mapping[str, Sparsity],
        rounding: torch.dtype | None = None,
        dist: DistContext | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.runner = runner
        self.method_spec = method_spec
        self.sparsity = sparsity
        self.rounding = rounding
        self.dist = dist or DistContext(runner.device, alone=True)
        self.journal = journal
        self.done = Pruned()
        self.shared = SharedWeights(runner.blocks)
        self.writers = Writers(runner, self.dist)
        self.orders: dict[tuple, tuple[list[list[int]], int]] = {}  # of classes of blocks

    @torch.no_grad()
    def run(
        self,
        windows: Tensor | None,
        batch_size: int,
        state_device: torch.device | str = "cpu",
        on_progress: Callable[[int], None] = lambda blocks: None,
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
            if self.method_spec.observes:
                mine, self.idle = own_windows(windows, self.dist)
                states = self.runner.capture(mine, batch_size, state_device)
            if self.method_spec.dense_stream:
                dense = replace(states, hidden=self.runner.transfer.copy(states.hidden))
            for index in range(len(self.runner.blocks)):
                with self.runner.on_device(index, write_back=True):
                    self._block_(index, states, dense)
                on_progress(1)
        self.done.warnings = sum(self.dist.all_gather_object(self.done.warnings), [])
        return self.done

    def _block_(self, index: int, states: HiddenStates | None, dense: HiddenStates | None) -> None:
        """Prune one block, or take it from the journal, and take the streams through it."""
        runner, prefix = self.runner, f"{self.runner.name}.{index}"
        linears, left = find_linears(runner.blocks[index], prefix)
        for name, (size, why) in left.items():
            self.done.leave(name, size, why)
        linears = [linear for linear in linears if self.shared.open(linear)]
        for linear in linears if runner.placement else ():  # else checked when it was loaded
            check_weight(linear, runner.named)
        twin = DenseTwin.of(dense, runner.blocks[index], prefix) if dense else None
        goes_on = states is not None and index + 1 < len(runner.blocks)
        ordered = None
        kept = self.journal.read(index) if self.journal else None
        names = self.dist.all_gather_object(None if kept is None else sorted(kept))[0]
        if names is not None:
            for linear in (linear for linear in linears if linear.name in names):
                matrix = kept[linear.name] if kept else linear.empty_matrix(self.rounding)
                self._store_(linear, self.dist.broadcast_(matrix, 0))
        else:
            if twin and linears:
                lots = self._lots(index, linears, states)
                found = self.runner, states, index, *lots, twin, self.writers, self.method_spec
                ordered = OrderedBlock(*found, self.cache_inputs, goes_on)
            written = self._prune_block_(index, linears, states, ordered)
            if self.journal:
                self.journal.write(index, written)
        for linear in linears:
            if linear.name not in self.done.pruned:
                self.done.leave(linear.name, prod(linear.shape), UNREACHED)
        if goes_on and ordered:
            ordered.advance_()
        elif goes_on:
            if twin:
                runner.advance_(dense, index, twin.block)
            runner.advance_(states, index)
        if goes_on:
            states.block_args[index] = []  # the block's recorded arguments are not needed again

    def _lots(
        self, index: int, linears: list[PrunableLinear], states: HiddenStates
    ) -> tuple[list[list[PrunableLinear]], int]:
        """The linears in the order in which their inputs are taken, tried once for a class.

        Also how many lots one batch reaches.
        """
        prefix = f"{self.runner.name}.{index}."
        names = [(linear.name.removeprefix(prefix), linear.shape) for linear in linears]
        key = type(self.runner.blocks[index]), *names
        if key not in self.orders:
            place = {linear: at for at, linear in enumerate(linears)}
            lots, reached = stages(self.runner, states, index, linears)
            self.orders[key] = [[place[linear] for linear in lot] for lot in lots], reached
        lots, reached = self.orders[key]
        return [[linears[at] for at in lot] for lot in lots], reached

    def _prune_block_(
        self,
        index: int,
        linears: list[PrunableLinear],
        states: HiddenStates | None,
        ordered: OrderedBlock | None,
    ) -> dict[str, Tensor]:
        """Observe and prune, lot by lot; {linear's name: what was stored in it}."""
        if states is None:
            device = self.runner.device
            groups = [Group([one], self.method_spec(one.shape[1], device)) for one in linears]
            return self._solve_(groups)
        written: dict[str, Tensor] = {}
        for place, lot in enumerate(ordered.lots if ordered else [linears]):
            if ordered:
                groups = ordered.observe(place)
            else:
                groups = observe(self.runner, states, index, lot, self.method_spec)
            if self.idle:
                for group in groups:
                    group.forget_()
            written |= self._solve_(
                merge(groups, lot, self.method_spec, self.runner.device, self.dist)
            )
        return written

    def _solve_(self, groups: list[Group]) -> dict[str, Tensor]:
        """Solve this process's groups, and store those of all processes."""
        sums = [self.dist.all_reduce_(group.method.statistics()) for group in groups]
        costs = [group.cost for group in groups]
        owners = self.dist.assign_owners(costs)
        written: dict[str, Tensor] = {}
        for group, owner, handles in zip(groups, owners, sums, strict=True):
            for handle in handles:
                handle.wait()
            self.done.note(group)
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

    def _solved(self, group: Group) -> list[Tensor]:
        """The group's matrices (out, in), pruned, in the dtype in which they are saved."""
        for statistic in group.method.statistics():
            if not all_finite(statistic):
                raise UserError(f"{group.names}: activations are not finite; try --dtype float32")
        with record_function("moving"):
            matrices = [linear.matrix() for linear in group.linears]
        with record_function("solve"), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                group.solver().prune_(matrices, self._asked(group))
            except UserError as error:
                raise UserError(f"{group.names}: {error}") from error
        for one in warned:
            whose = "" if issubclass(one.category, RunWarning) else f"{group.names}: "
            self.done.warnings.append(f"{whose}{one.message}")
        for linear, matrix in zip(group.linears, matrices, strict=True):
            if not all_finite(matrix):
                raise UserError(
                    f"{linear.name}: pruned weights are not finite; try --dtype float32"
                )
        solved = zip(group.linears, matrices, strict=True)
        return [linear.to_saved_dtype(matrix, self.rounding) for linear, matrix in solved]

    def _asked(self, group: Group) -> list[Sparsity]:
        return [asked_of(self.sparsity, linear) for linear in group.linears]

    def _store_(self, linear: PrunableLinear, matrix: Tensor) -> None:
        linear.set_weight_(matrix)
        self.done.pruned[linear.name] = matrix.numel()
        self.shared.close(linear)
