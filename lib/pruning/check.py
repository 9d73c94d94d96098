"""The sparsity that a model really has, measured from its weights, and what it should be."""

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
        """As it stands in results.json."""
        shares = {name: round(self.zeros[name] / self.sizes[name], 6) for name in self.sizes}
        return {"overall": self.overall, "linears": shares}


def measure(
    runner: BlockRunner,
    asked: Sparsity | Mapping[str, Sparsity] | None = None,
    left: frozenset[str] = frozenset(),
) -> Measured:
    """Count the zeros of every linear, and where `asked` is given see that it was reached.

    Linears named in `left` were left dense and are only counted. Raises UserError naming the
    linear that fell short, or whose N:M groups hold too few zeros.
    """
    found = Measured()
    for index in range(len(runner.blocks)):
        with runner.on_device(index):
            for linear in runner.linears(index):
                zero = linear.matrix() == 0  # (out, in)
                found.zeros[linear.name] = int(zero.count_nonzero())
                found.sizes[linear.name] = zero.numel()
                if asked and linear.name not in left:
                    _see_reached(linear, zero, asked_of(asked, linear))
    return found


def asked_of(asked: Sparsity | Mapping[str, Sparsity], linear: PrunableLinear) -> Sparsity:
    """How sparse a linear shall become, of one answer for all or of one by name."""
    return asked if isinstance(asked, Sparsity) else asked[linear.name]


def _see_reached(linear: PrunableLinear, zero: torch.Tensor, asked: Sparsity) -> None:
    if asked.m:
        zeros = sum(zero[:, column :: asked.m].byte() for column in range(asked.m))
        short = int((zeros < asked.n).count_nonzero())
        if short:
            raise UserError(
                f"{linear.name}: {short} of {zero.numel() // asked.m} groups "
                f"are not {asked.pattern}"
            )
        return
    missing = asked.ratio * zero.numel() - int(zero.count_nonzero())
    if missing > max(linear.shape):  # counts are rounded down, once per row or block of columns
        raise UserError(
            f"{linear.name}: only {zero.float().mean():.4f} of its weights are zero, "
            f"{asked.ratio:g} was asked"
        )
