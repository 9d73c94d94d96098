"""The sparsity that a model really has, measured from its weights, against the requested one."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.util.errors import UserError


@dataclass
class Measured:
    """Zeros and sizes, in weights, of every linear of the decoder blocks.

    `target`: the sparsity that each must have, where that is known; `left_dense`: those that are
    only counted.
    """

    target: Mapping[str, Sparsity] | None
    left_dense: Container[str]
    zeros: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """Share of zeros among the weights of all linears."""
        return sum(self.zeros.values()) / max(1, sum(self.sizes.values()))

    def shares(self) -> dict:
        shares = {name: round(self.zeros[name] / self.sizes[name], 6) for name in self.sizes}
        return {"overall": self.overall, "linears": shares}

    def again(self, runner: BlockRunner) -> Measured:
        """Measure the model as it is now. UserError where a linear is less sparse than it was."""
        now = measure(runner, self.target, self.left_dense)
        for name, zeros in self.zeros.items():
            assert now.zeros[name] >= zeros, f"{name} has lost zeros"
        return now


def measure(
    runner: BlockRunner,
    target: Mapping[str, Sparsity] | None = None,
    left_dense: Container[str] = (),
) -> Measured:
    """Count the zeros of every linear, and check them against `target` by name, where given.

    Linears named in `left_dense` are only counted. Raises UserError naming the linear that fell
    short, or whose N:M groups hold too few zeros.
    """
    measured = Measured(target, left_dense)
    for linear in runner.each_linear():
        name, zero = linear.name, linear.matrix() == 0  # (out, in)
        measured.zeros[name] = int(zero.count_nonzero())
        measured.sizes[name] = zero.numel()
        if not target or name in left_dense:
            continue
        ratio, n, m = target[name].ratio, target[name].n, target[name].m
        if m:
            zeros = sum(zero[:, column::m].byte() for column in range(m))
            if short := int((zeros < n).count_nonzero()):
                groups = zero.numel() // m
                raise UserError(f"{name}: {short} of {groups} groups are not {n}:{m}")
        # counts are rounded down, once per row or block of columns
        elif ratio * zero.numel() - measured.zeros[name] > max(linear.shape):
            raise UserError(
                f"{name}: only {zero.float().mean():.4f} of its weights are zero, "
                f"{ratio:g} was requested"
            )
    return measured
