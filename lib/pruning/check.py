"""The sparsity that a model really has, measured from its weights, against the requested one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.matrix import PrunableLinear
from lib.util.errors import UserError


@dataclass
class Measured:
    """Zeros and sizes, in weights, of every linear of the decoder blocks."""

    zeros: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """Share of zeros among the weights of all linears."""
        return sum(self.zeros.values()) / max(1, sum(self.sizes.values()))

    def shares(self) -> dict:
        """The record for results.json."""
        shares = {name: round(self.zeros[name] / self.sizes[name], 6) for name in self.sizes}
        return {"overall": self.overall, "linears": shares}


def measure(
    runner: BlockRunner,
    target: Mapping[str, Sparsity] | None = None,
    left_dense: frozenset[str] = frozenset(),
) -> Measured:
    """Count the zeros of every linear, and check them against `target` by name, where given.

    Linears named in `left_dense` are only counted. Raises UserError naming the linear that fell
    short, or whose N:M groups hold too few zeros.
    """
    measured = Measured()
    for index in range(len(runner.blocks)):
        with runner.on_device(index):
            for linear in runner.linears(index):
                zero = linear.matrix() == 0  # (out, in)
                measured.zeros[linear.name] = int(zero.count_nonzero())
                measured.sizes[linear.name] = zero.numel()
                if target and linear.name not in left_dense:
                    _check_reached(linear, zero, target[linear.name])
    return measured


def _check_reached(linear: PrunableLinear, zero: torch.Tensor, target: Sparsity) -> None:
    if target.m:
        zeros = sum(zero[:, column :: target.m].byte() for column in range(target.m))
        short = int((zeros < target.n).count_nonzero())
        if short:
            raise UserError(
                f"{linear.name}: {short} of {zero.numel() // target.m} groups "
                f"are not {target.pattern}"
            )
        return
    missing = target.ratio * zero.numel() - int(zero.count_nonzero())
    if missing > max(linear.shape):  # counts are rounded down, once per row or block of columns
        raise UserError(
            f"{linear.name}: only {zero.float().mean():.4f} of its weights are zero, "
            f"{target.ratio:g} was requested"
        )
