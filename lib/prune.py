"""Pruning as a visitor of the sweep, block by block: observe, prune, propagate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.errors import UserError
from lib.finite import all_finite, check_weight
from lib.groups import Group, SharedWeights, merge
from lib.journal import Journal
from lib.linears import eager_experts, find_linears
from lib.matrix import Linear
from lib.methods import Recipe
from lib.observe import DenseTwin, observe, own_windows, stages
from lib.outcome import UNREACHED, Pruned
from lib.parallel import Team
from lib.residual import Writers, observe_writer
from lib.sparsity import Sparsity, per_block
from lib.sweep import Stream, Sweep


class Pruner:
    """Prunes every linear of every block in place; embeddings and the output head stay dense.

    `sparsity`: of all blocks, or of each. `rounding`: the dtype in which the model will be saved,
    to which pruned weights are rounded. `team`: the processes that share the work. `journal`, of
    the one that leads: keeps every finished block, and gives back those of an interrupted run.
    What was done is in `done`.
    """

    def __init__(
        self,
        sweep: Sweep,
        blocks_name: str,
        recipe: Recipe,
        sparsity: Sparsity | Sequence[Sparsity],
        rounding: torch.dtype | None = None,
        team: Team | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.sweep = sweep
        self.blocks_name = blocks_name
        self.recipe = recipe
        self.sparsities = per_block(sparsity, len(sweep.blocks))
        self.rounding = rounding
        self.team = team or Team(sweep.device, alone=True)
        self.journal = journal
        self.done = Pruned()
        self.shared = SharedWeights(sweep.blocks)
        self.writers = Writers(sweep, self.team)

    @torch.no_grad()
    def run(
        self,
        windows: Tensor | None,
        batch_size: int,
        keep_on: torch.device | str = "cpu",
        advanced: Callable[[int], None] = lambda blocks: None,
    ) -> Pruned:
        """Calibrate on windows (n, tokens), None for a method that needs none, and prune.

        `keep_on`: where hidden states are kept. `advanced(1)` is called after each block. Raises
        UserError where a weight or an activation is not finite, or a linear can't carry the N:M
        pattern.
        """
        with eager_experts(self.sweep.model):
            stream = dense = None
            if self.recipe.observes:
                mine, self.idle = own_windows(windows, self.team)
                stream = self.sweep.record(mine, batch_size, keep_on)
            if self.recipe.dense_stream:
                dense = replace(stream, hidden=self.sweep.transfer.copy(stream.hidden))
            for index in range(len(self.sweep.blocks)):
                self.team.at(f"block {index}")
                with self.sweep.at_hand(index, keep=True):
                    self._block_(index, stream, dense)
                advanced(1)
        self.done.warnings = sum(self.team.gathered(self.done.warnings), [])
        return self.done

    def _block_(self, index: int, stream: Stream | None, dense: Stream | None) -> None:
        """Prune one block, or take it from the journal, and take the streams through it."""
        sweep, prefix = self.sweep, f"{self.blocks_name}.{index}"
        self.sparsity = self.sparsities[index]  # of the block at hand
        linears, left = find_linears(sweep.blocks[index], prefix)
        for name, (size, why) in left.items():
            self.done.leave(name, size, why)
        linears = [linear for linear in linears if self.shared.open(linear)]
        for linear in linears if sweep.placement else ():  # else checked when it was loaded
            check_weight(linear, sweep.model.name_or_path)
        twin = DenseTwin.of(dense, sweep.blocks[index], prefix) if dense else None
        kept = self.journal.read(index) if self.journal else None
        names = self.team.gathered(None if kept is None else sorted(kept))[0]
        if names is not None:
            for linear in (linear for linear in linears if linear.name in names):
                wire = linear.wire(rounding=self.rounding)
                self._store_(linear, self.team.broadcast_(kept[linear.name] if kept else wire, 0))
        else:
            written = self._prune_block_(index, linears, stream, twin)
            if self.journal:
                self.journal.write(index, written)
        for linear in linears:
            if linear.name not in self.done.pruned:
                self.done.leave(linear.name, prod(linear.shape), UNREACHED)
        if stream and index + 1 < len(sweep.blocks):
            if twin:
                sweep.advance_(dense, index, twin.block)
            sweep.advance_(stream, index)
            stream.calls[index] = []  # the block's recorded arguments are not needed again

    def _prune_block_(
        self, index: int, linears: list[Linear], stream: Stream | None, twin: DenseTwin | None
    ) -> dict[str, Tensor]:
        """Observe and prune, lot by lot; {linear's name: what was stored in it}."""
        if stream is None:
            device = self.sweep.device
            groups = [Group([one], self.recipe(one.shape[1], device)) for one in linears]
            return self._solve_(groups)
        written: dict[str, Tensor] = {}
        lots = stages(self.sweep, stream, index, linears, self.recipe)
        for place, lot in enumerate(lots):
            later = [linear for after in lots[place + 1 :] for linear in after]
            whole = self.sweep, stream, index
            if twin and self.writers.adds(stream, index, lot, later):
                groups = [observe_writer(*whole, lot[0], later, self.recipe, twin)]
            else:
                groups = observe(*whole, lot, self.recipe, twin)
            if self.idle:
                for group in groups:
                    group.forget_()
            written |= self._solve_(merge(groups, lot, self.recipe, self.sweep.device, self.team))
        return written

    def _solve_(self, groups: list[Group]) -> dict[str, Tensor]:
        """Solve this process's groups, and store those of all processes."""
        sums = [self.team.sum_(group.method.statistics()) for group in groups]
        owners = self.team.owners([group.cost for group in groups])
        written: dict[str, Tensor] = {}
        for group, owner, handles in zip(groups, owners, sums, strict=True):
            for handle in handles:
                handle.wait()
            self.done.note(group)
            if owner == self.team.rank:
                for linear, wire in zip(group.linears, self._solved(group), strict=True):
                    self._store_(linear, wire)
                    written[linear.name] = wire
        for group, owner in zip(groups, owners, strict=True) if self.team.size > 1 else ():
            for linear in group.linears:
                wire = written.get(linear.name)
                wire = linear.wire(rounding=self.rounding) if wire is None else wire
                wire = self.team.broadcast_(wire, owner)
                if owner != self.team.rank:
                    self._store_(linear, wire)
                written[linear.name] = wire
        return written

    def _solved(self, group: Group) -> list[Tensor]:
        """The group's matrices (out, in), pruned, in the dtype in which they travel."""
        for statistic in group.method.statistics():
            if not all_finite(statistic):
                raise UserError(f"{group.names}: activations are not finite; try --dtype float32")
        with record_function("moving"):
            matrices = [linear.matrix() for linear in group.linears]
        with record_function("solve"), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                group.solver().prune_(matrices, self.sparsity)
            except UserError as error:
                raise UserError(f"{group.names}: {error}") from error
        self.done.warnings += [f"{group.names}: {warning.message}" for warning in warned]
        for linear, matrix in zip(group.linears, matrices, strict=True):
            if not all_finite(matrix):
                raise UserError(
                    f"{linear.name}: pruned weights are not finite; try --dtype float32"
                )
        wires = zip(group.linears, matrices, strict=True)
        return [linear.wire(matrix, self.rounding) for linear, matrix in wires]

    def _store_(self, linear: Linear, wire: Tensor) -> None:
        linear.store_(wire)
        self.done.pruned[linear.name] = wire.numel()
        self.shared.close(linear)
