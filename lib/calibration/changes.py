"""What a walk through the blocks changes: written, shared by ranks, kept, restored, reported."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from ..model.blocks import BlockRunner
from ..model.linears import find_linears
from ..model.matrix import PrunableLinear
from ..util import progress
from ..util.errors import RunWarning, UserError
from ..util.resume import PRUNED
from .inputs import Group, weight_key

UNREACHED = "no calibration token reached it, or its forward() is bypassed"


@dataclass
class BlockNotes:
    """Report on pruning one block; stored with the block."""

    pruned: list[str] = field(default_factory=list)  # names of linear layers
    fallbacks: dict[str, list[str]] = field(default_factory=dict)  # method: experts
    warnings: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # relative squared errors of outputs
    kept: list[int] = field(default_factory=list)  # remaining neurons or experts
    routed: list[float] = field(default_factory=list)  # share of tokens routed to each expert


class Changes:
    """The changed linear layers of a runner's blocks, one block after another.

    `pruned` maps them to their number of weights, and `left_dense` the others also to the reason. A
    subclass may choose among the layers (`takes`).
    """

    checkpoint_prefix = PRUNED  # of the files in which --resume keeps finished blocks

    def __init__(self, runner: BlockRunner) -> None:
        self.runner, self.dist = runner, runner.dist
        self.saved = runner.weights.saved  # dtype in which changed weights are saved
        self.pruned: dict[str, int] = {}
        self.left_dense: dict[str, tuple[int, str]] = {}
        self.notes: list[BlockNotes] = []  # the last ones are the current block's
        # weights that several blocks share are changed once, where tokens reach them first
        count = Counter(id(p) for block in runner.blocks for p in block.parameters())
        self.shared = {key for key, times in count.items() if times > 1}
        self.shared_done: set[tuple[int, int | None]] = set()
        self.written: dict[str, Tensor] = {}  # changed matrices as they are saved, by layer

    def takes(self, linear: PrunableLinear) -> bool:
        """Return whether a layer is to be changed."""
        return True

    def begin(self, index: int) -> None:
        """Find the `linears` of block `index` that are still to be changed; report the others."""
        runner, self.index = self.runner, index
        self.notes.append(BlockNotes())
        # resident blocks were checked when they were loaded
        for linear in runner.linears(index) if not runner.weights.resident else ():
            linear.check_finite(runner.named)
        linears, left_dense = find_linears(runner.blocks[index], f"{runner.name}.{index}")
        self.left_dense |= left_dense
        left = [linear for linear in linears if weight_key(linear) not in self.shared_done]
        self.linears = [linear for linear in left if self.takes(linear)]

    def restore_(self) -> bool:
        """Load the block and its notes if an interrupted run finished it; return whether it did."""
        facts = self.runner.weights.get(self.index, prefix=self.checkpoint_prefix)
        if facts is None:
            return False
        notes = BlockNotes(**facts)
        self.notes[-1] = replace(notes, pruned=[])
        for linear in self.linears:
            if linear.name in notes.pruned:
                self._mark_pruned(linear)
        return True

    @contextmanager
    def reporting(self, group: Group) -> Iterator[None]:
        """Note warnings raised inside, and name the group's layers in an error."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                progress.on_step("solve", 0)
                yield
            except UserError as error:
                raise error.inside(group.names) from error
        for warning in caught:
            prefix = "" if issubclass(warning.category, RunWarning) else f"{group.names}: "
            self.notes[-1].warnings.append(f"{prefix}{warning.message}")

    def write_(self, linear: PrunableLinear, matrix: Tensor) -> None:
        """Give a layer its changed matrix (out, in), as it will be saved."""
        matrix = matrix.to(linear.saved_dtype(self.saved))
        linear.set_weight_(matrix)
        self.written[linear.name] = matrix
        self._mark_pruned(linear)

    def exchange_(self, group: Group, owner: int) -> None:
        """Send a group's matrices from the rank that changed them to all others."""
        for linear in group.linears:
            matrix = self.written.get(linear.name)
            if matrix is None:
                dtype, device = linear.saved_dtype(self.saved), linear.raw_weight.device
                matrix = torch.empty(linear.shape, dtype=dtype, device=device)
            matrix = self.dist.broadcast_(matrix, owner)
            if owner != self.dist.rank:
                self.write_(linear, matrix)

    def share(self) -> None:
        """Share the notes of all ranks on the block."""
        notes = self.notes[-1]
        of_all = self.dist.all_gather_object((notes.warnings, notes.kept, notes.errors))
        warned, kept, errors = zip(*of_all, strict=True)
        notes.warnings, notes.kept = sum(warned, []), sum(kept, [])
        notes.errors = {name: error for each in errors for name, error in each.items()}

    def keep(self) -> None:
        """Store the block for --resume: for quantized layers the matrices behind their codes."""
        prefix = f"{self.runner.name}.{self.index}."
        matrices = {
            linear.name.removeprefix(prefix): self.written[linear.name]
            for linear in self.linears
            if linear.is_quantized and linear.name in self.written
        }
        facts, prefix = vars(self.notes[-1]), self.checkpoint_prefix
        self.runner.weights.put(self.index, facts, matrices, prefix=prefix)

    def end(self) -> None:
        """Report the layers that no token reached."""
        for linear in self.linears:
            if linear.name not in self.pruned:
                self.left_dense[linear.name] = prod(linear.shape), UNREACHED
        self.written.clear()

    def warnings(self) -> list[str]:
        """Return all warnings of the methods."""
        return [warning for notes in self.notes for warning in notes.warnings]

    def errors(self) -> dict[str, float]:
        """Return the relative squared error of each pruned layer's outputs, by name."""
        return {name: error for notes in self.notes for name, error in notes.errors.items()}

    def _mark_pruned(self, linear: PrunableLinear) -> None:
        self.pruned[linear.name] = prod(linear.shape)
        self.notes[-1].pruned.append(linear.name)
        if weight_key(linear)[0] in self.shared:
            self.shared_done.add(weight_key(linear))
