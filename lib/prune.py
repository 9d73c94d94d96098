"""Pruning as a visitor of the sweep, block by block: observe, prune, propagate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lib.errors import UserError
from lib.linears import eager_experts, find_linears
from lib.matrix import Linear
from lib.methods import Recipe
from lib.observe import DenseTwin, Group, observe, stages
from lib.sparsity import Sparsity
from lib.sweep import Stream, Sweep

UNREACHED = "no calibration token reached it, or it is used without being called"


@dataclass
class Pruned:
    """What was done: sizes in weights of what was pruned and left dense, and why it was left."""

    pruned: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave(self, name: str, size: int, why: str) -> None:
        self.left[name] = size
        self.why[name] = why

    def summary(self) -> list[str]:
        """What a user should know, a line each: nothing is left dense silently."""
        pruned, left = sum(self.pruned.values()), sum(self.left.values())
        lines = [
            f"pruned {pruned:,} weights in {len(self.pruned)} linears; "
            f"left {left:,} weights of the blocks dense"
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.why.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left dense, {why}: {', '.join(names[:3])}{more}")
        return lines + self.notes


class Pruner:
    """Prunes every linear of every block in place; embeddings and the output head stay dense.

    `rounding`: the dtype in which the model will be saved, to which pruned weights are rounded.
    What was done is in `done`.
    """

    def __init__(
        self,
        sweep: Sweep,
        blocks_name: str,
        recipe: Recipe,
        sparsity: Sparsity,
        rounding: torch.dtype | None = None,
    ) -> None:
        self.sweep = sweep
        self.blocks_name = blocks_name
        self.recipe = recipe
        self.sparsity = sparsity
        self.rounding = rounding
        self.done = Pruned()
        self.shared = _Shared(sweep.blocks)

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
                stream = self.sweep.record(windows, batch_size, keep_on)
            if self.recipe.dense_stream:
                dense = replace(stream, hidden=stream.hidden.clone())
            for index in range(len(self.sweep.blocks)):
                with self.sweep.at_hand(index, keep=True):
                    self._block_(index, stream, dense)
                advanced(1)
        return self.done

    def _block_(self, index: int, stream: Stream | None, dense: Stream | None) -> None:
        """Prune one block, and take the streams through it."""
        sweep, prefix = self.sweep, f"{self.blocks_name}.{index}"
        block = sweep.blocks[index]
        linears, left = find_linears(block, prefix)
        linears = [linear for linear in linears if self.shared.open(linear)]
        for linear in linears:
            check_linear(linear, self.sparsity)
        for name, (size, why) in left.items():
            self.done.leave(name, size, why)
        if stream is None:
            for linear in linears:
                self._group_(Group([linear], self.recipe(linear.shape[1], sweep.device)))
        else:
            twin = DenseTwin.of(dense, block, prefix) if dense else None
            for lot in stages(sweep, stream, index, linears, self.recipe):
                for group in observe(sweep, stream, index, lot, self.recipe, twin):
                    self._group_(group)
            if twin:
                sweep.advance_(dense, index, twin.block)
            sweep.advance_(stream, index)
            stream.calls[index] = []  # the block's recorded arguments are not needed again
        for linear in linears:
            if linear.name not in self.done.pruned:
                self.done.leave(linear.name, prod(linear.shape), UNREACHED)

    @torch.no_grad()
    def _group_(self, group: Group) -> None:
        """Prune the linears of a group by its statistics, in place."""
        for statistic in group.method.statistics():
            if not statistic.isfinite().all():
                raise UserError(f"{group.names}: activations are not finite; try --dtype float32")
        with record_function("moving"):
            matrices = [linear.matrix() for linear in group.linears]
        with record_function("solve"):
            try:
                group.method.prune_(matrices, self.sparsity)
            except UserError as error:
                raise UserError(f"{group.names}: {error}") from error
        for linear, matrix in zip(group.linears, matrices, strict=True):
            if not matrix.isfinite().all():
                raise UserError(
                    f"{linear.name}: pruned weights are not finite; try --dtype float32"
                )
            linear.store_(matrix, self.rounding)
            self.done.pruned[linear.name] = matrix.numel()
            self.shared.close(linear)


class _Shared:
    """Weights that several blocks share: each is pruned once, where tokens reach it first."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        count = Counter(id(p) for block in blocks for p in block.parameters())
        self.several = {key for key, times in count.items() if times > 1}
        self.closed: set[tuple[int, int | None]] = set()

    def open(self, linear: Linear) -> bool:
        """Whether the linear's weight is still to be pruned."""
        return self._key(linear) not in self.closed

    def close(self, linear: Linear) -> None:
        if self._key(linear)[0] in self.several:
            self.closed.add(self._key(linear))

    def _key(self, linear: Linear) -> tuple[int, int | None]:
        return id(getattr(linear.module, linear.parameter)), linear.expert


def check_linear(linear: Linear, sparsity: Sparsity) -> None:
    """UserError where the linear's weights are not finite or can't carry the N:M pattern."""
    if sparsity.m and linear.shape[1] % sparsity.m:
        raise UserError(
            f"--sparsity_type {sparsity.pattern}: {linear.name} has {linear.shape[1]} inputs, not "
            f"a multiple of {sparsity.m}; use --sparsity_type unstructured"
        )
    if linear.stored.is_floating_point() and not linear.stored.isfinite().all():
        raise UserError(f"--model: the weight of {linear.name} holds nan or inf")
