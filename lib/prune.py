"""What pruning (lib/pruning) has reached, against which later steps are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.pruning.check import Measured, measure


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
