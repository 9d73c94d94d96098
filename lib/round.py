"""Round what a pruned model keeps to the integers that it will be packed as, block by block.

    python main.py --model MODEL --prune_method admm --replace_sparse_layers --pack_bits 4 ...

One more pass over the blocks with calibration text: each linear receives what the rounded blocks
before it give, and aims at what the model computes without rounding (lib/methods/rounding.py).
Rounded are the linears that lib/sparse.py packs; zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lib.methods.rounding import Rounding
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.matrix import PrunableLinear
from lib.packed.grid import quantise
from lib.prune import UNREACHED, Pruned, Pruner
from lib.pruning.allocation import uniform
from lib.pruning.inputs import Group, first_names
from lib.sparse import is_packed
from lib.util.errors import UserError


class Rounder(Pruner):
    """Rounds in place; what a linear was is its aim.

    The result is reported in `done`, as if it were pruned.
    """

    stage = "rounded"

    def __init__(self, runner: BlockRunner, method: type[Rounding]) -> None:
        super().__init__(runner, method, uniform(runner, Sparsity(0.0)))
        self.save_dtype = None  # integers times scales are kept as they are
        self.bits = method.bits
        self.row_scales: dict[str, Tensor] = {}  # at 8 bits, (out, 1)

    def run(
        self, windows: Tensor | None, on_progress: Callable[[int], None] = lambda blocks: None
    ) -> Pruned:
        """As `Pruner.run`; raises UserError too where nothing will be packed."""
        if not any(map(self._is_packed_in, range(len(self.runner.blocks)))):
            raise UserError(
                "--replace_sparse_layers: no linear is smaller packed; prune with --prune_method "
                "first"
            )
        return super().run(windows, on_progress)

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scales that rounded values do not tell by themselves, by every name of a weight.

        At 8 bits these are all; at 4 bits the values have no other scale (lib/packed/grid.py).
        """
        names = first_names(self.runner).items()
        return {
            f"{name}.weight": self.row_scales[first]
            for name, first in names
            if first in self.row_scales
        }

    def summary(self) -> list[str]:
        """Lines for the user: what is left to rounding to nearest is named."""
        lines = [f"rounded {len(self.done.pruned)} linears to {self.bits} bits, column by column"]
        if left := [name for name, reason in self.done.reasons.items() if reason == UNREACHED]:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            lines.append(f"rounded to nearest, {UNREACHED}: {', '.join(left[:3])}{more}")
        return lines + self.done.warnings

    def _linears(self, index: int) -> list[PrunableLinear]:
        linears = [linear for linear in super()._linears(index) if is_packed(linear)]
        if self.bits == 8:
            for linear in linears:
                self.row_scales[linear.name] = quantise(linear.matrix(), bits=8)[1]
        return linears

    def _is_packed_in(self, index: int) -> bool:
        """Return whether a linear of block `index` will be packed."""
        with self.runner.on_device(index):
            return any(map(is_packed, self.runner.linears(index)))

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        group.method.round_(matrices)
