"""Prune a model block by block, and check what was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.pruning.check import Measured, measure
from lib.pruning.pruner import PartPruner, Pruned, Pruner


@dataclass(frozen=True)
class Reached:
    """What pruning has reached, in every rank; later steps are checked against it.

    `sparsity`: of each linear, where it must stay so; `left_dense`: linears that it does not hold
    for.
    """

    measured: Measured
    sparsity: Mapping[str, Sparsity] | None = None
    left_dense: frozenset[str] = frozenset()

    def measure(self, runner: BlockRunner) -> Measured:
        """Measure the model as it is now. UserError where a linear is less sparse than it was."""
        now = measure(runner, self.sparsity, self.left_dense)
        for name, zeros in self.measured.zeros.items():
            assert now.zeros[name] >= zeros, f"{name} has lost zeros"
        return now


def prune(
    pruner: Pruner,
    windows: Tensor | None,
    sparsity: Mapping[str, Sparsity] | None,
    on_progress: Callable[[int], None],
) -> tuple[Pruned, Reached]:
    """Run a pruner on calibration windows (n, tokens); `sparsity` is what linears must reach.

    UserError where one falls short.
    """
    pruned = pruner.run(windows, on_progress)
    left_dense = frozenset(() if isinstance(pruner, PartPruner) else pruned.left_dense)
    measured = measure(pruner.runner, sparsity, left_dense)
    return pruned, Reached(measured, sparsity, left_dense)
