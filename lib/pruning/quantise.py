"""Quantise what a pruned model keeps to the integers that it will be packed as, block by block.

    python main.py --model MODEL --prune_method admm --replace_sparse_layers --pack_bits 4 ...

One more pass over the blocks with calibration text: each linear receives what the quantised blocks
before it give, and aims at what the model computes without them (lib/methods/gptq.py). Quantised
are the linears that lib/sparse.py packs; zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lib.methods.gptq import GPTQ
from lib.model.blocks import BlockRunner
from lib.model.matrix import PrunableLinear
from lib.prune import UNREACHED, Pruned, Pruner, first_of
from lib.pruning.allocation import Allocation
from lib.pruning.inputs import Group
from lib.sparse import NOTHING_TO_PACK, is_packed
from lib.util.errors import UserError


class Quantiser(Pruner):
    """Quantises in place by `method`; what a linear was is its aim.

    The result is reported in `done`, as if it were pruned.
    """

    stage = "quantised"

    def __init__(self, runner: BlockRunner, method: type[GPTQ] = GPTQ) -> None:
        super().__init__(runner, method, Allocation({}))
        self.fmt = method.fmt
        self.save_dtype = None  # integers times scales are kept as they are

    def run(
        self, windows: Tensor | None, on_progress: Callable[[int], Any] = lambda blocks: None
    ) -> Pruned:
        """As `Pruner.run`; raises UserError too where nothing will be packed."""
        if not any(map(self._is_packed_in, range(len(self.runner.blocks)))):
            raise UserError(NOTHING_TO_PACK)
        return super().run(windows, on_progress)

    def summary(self) -> list[str]:
        """Lines for the user: what is left to rounding to nearest is named."""
        count, bits = len(self.done.pruned), self.fmt.bits
        lines = [f"rounded {count} linears to {bits} bits, column by column"]
        if left := [name for name, reason in self.done.reasons.items() if reason == UNREACHED]:
            lines.append(f"rounded to nearest, {UNREACHED}: {first_of(left)}")
        return lines + self.done.warnings

    def _linears(self, index: int) -> list[PrunableLinear]:
        return [linear for linear in super()._linears(index) if is_packed(linear)]

    def _is_packed_in(self, index: int) -> bool:
        with self.runner.on_device(index):
            return any(map(is_packed, self.runner.linears(index)))

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        group.method.quantise_(matrices)
