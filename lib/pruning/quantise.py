"""Quantise what a model keeps to integers that it will be packed as, or that llama.cpp runs.

One more pass over the blocks with calibration text: each linear receives what the quantised blocks
before it give, and aims at what the model computes without them (lib/methods/gptq.py). Quantised
are the linears that lib/sparse.py packs, or all whose rows are whole blocks of q4_0; zeros stay
zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lib.methods.gptq import GPTQ, GPTQForLlamaCpp
from lib.model.blocks import BlockRunner
from lib.model.dtypes import SaveDtypes
from lib.model.matrix import PrunableLinear
from lib.prune import UNREACHED, Pruned, Pruner, first_of
from lib.pruning.allocation import Allocation
from lib.pruning.inputs import Group
from lib.pruning.ordered import OrderedBlock
from lib.sparse import NOTHING_TO_PACK, is_packed
from lib.util.errors import UserError


class Quantiser(Pruner):
    """Quantises in place by `solver`; what a linear was is its aim.

    The result is reported in `done`, as if it were pruned.
    """

    stage = "quantised"
    solver: type[GPTQ] = GPTQ
    nothing = NOTHING_TO_PACK  # to quantise: the error

    def __init__(self, runner: BlockRunner) -> None:
        super().__init__(runner, self.solver, Allocation({}))
        self.fmt = self.solver.fmt
        self.saved = SaveDtypes()  # integers times scales are kept as they are

    def takes(self, linear: PrunableLinear) -> bool:
        return is_packed(linear)

    def run(
        self, windows: Tensor | None, on_progress: Callable[[int], Any] = lambda blocks: None
    ) -> Pruned:
        if not any(map(self.takes, self.runner.each_linear())):
            raise UserError(self.nothing)
        return super().run(windows, on_progress)

    def summary(self) -> list[str]:
        """Lines for the user: what is left to rounding to nearest is named."""
        count, bits = len(self.done.pruned), self.fmt.bits
        lines = [f"rounded {count} linears to {bits} bits, column by column"]
        dense = self.done.left_dense.items()
        if left := [name for name, (_, reason) in dense if reason == UNREACHED]:
            lines.append(f"rounded to nearest, {UNREACHED}: {first_of(left)}")
        return lines + self.done.warnings

    def _linears(self, index: int) -> list[PrunableLinear]:
        return [linear for linear in super()._linears(index) if self.takes(linear)]

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        group.method.quantise_(matrices)


class LlamaCppQuantiser(Quantiser):
    """Quantises every linear whose rows are whole blocks of q4_0, experts too, all in place.

    Those that no token reaches, and experts that fewer reach than they have inputs, are rounded to
    nearest.
    """

    solver = GPTQForLlamaCpp
    nothing = "--quantize q4_0: no linear has rows of whole blocks of 32; remove the flag"

    def takes(self, linear: PrunableLinear) -> bool:
        return self.fmt.takes(linear.shape[1])

    def _prune_(
        self, index: int, linears: list[PrunableLinear], ordered: OrderedBlock | None
    ) -> dict[str, Tensor]:
        written = super()._prune_(index, linears, ordered)
        for linear in linears:
            if linear.name not in written:
                linear.set_weight_(self.fmt.nearest(linear.matrix()))
        return written

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        if not group.fallback:
            return super()._change_(group, matrices)
        for matrix in matrices:
            matrix.copy_(self.fmt.nearest(matrix))


def q4_0_weights(runner: BlockRunner) -> tuple[dict[str, bool], list[str]]:
    """{weight's name: whether it is (in, out)} of all that q4_0 can hold, and names of the rest."""
    names: dict[str, bool] = {}
    left: dict[str, None] = {}
    for linear in runner.each_linear():
        name = f"{linear.name}.{linear.parameter}" if linear.expert is None else linear.stage
        if GPTQForLlamaCpp.fmt.takes(linear.shape[1]):
            names[name] = linear.transposed
        else:
            left[name] = None
    return names, list(left)


def check_q4_0(runner: BlockRunner) -> dict[str, Any]:
    """The record of a quantised model. UserError where conversion to q4_0 would change a value."""
    fmt = GPTQForLlamaCpp.fmt
    for linear in runner.each_linear():
        matrix = linear.matrix()
        if fmt.takes(linear.shape[1]) and not torch.equal(fmt.nearest(matrix), matrix):
            raise UserError(f"--quantize q4_0: {linear.name} is not on the grid; report this")
    names, left = q4_0_weights(runner)
    return {"format": "q4_0", "tensors": len(names), "left": left}
