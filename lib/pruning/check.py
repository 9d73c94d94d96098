"""The sparsity that a model really has, measured from its weights, against the requested one."""

from __future__ import annotations

from collections.abc import Container, Mapping

from ..methods.sparsity import Sparsity
from ..model.blocks import BlockRunner
from ..util.errors import UserError


class Measured:
    """Zeros and sizes, in weights, of every linear of the decoder blocks, by name.

    They are checked against `target`, the sparsity that each must have, where it is given; linears
    named in `left_dense` are only counted. UserError naming the linear that fell short, or whose
    N:M groups hold too few zeros.
    """

    def __init__(
        self,
        runner: BlockRunner,
        target: Mapping[str, Sparsity] | None = None,
        left_dense: Container[str] = (),
    ) -> None:
        self.target, self.left_dense = target, left_dense
        self.zeros: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        for linear in runner.each_linear():
            name, zero = linear.name, linear.matrix() == 0  # (out, in)
            self.zeros[name] = int(zero.count_nonzero())
            self.sizes[name] = zero.numel()
            if not target or name in left_dense:
                continue
            ratio, n, m = target[name].ratio, target[name].n, target[name].m
            if m:
                zeros = sum(zero[:, column::m].byte() for column in range(m))
                if short := int((zeros < n).count_nonzero()):
                    groups = zero.numel() // m
                    raise UserError(f"{name}: {short} of {groups} groups are not {n}:{m}")
            # counts are rounded down, once per row or block of columns
            elif ratio * zero.numel() - self.zeros[name] > max(linear.shape):
                raise UserError(
                    f"{name}: only {zero.float().mean():.4f} of its weights are zero, "
                    f"{ratio:g} was requested"
                )

    @property
    def overall(self) -> float:
        """Share of zeros among the weights of all linears."""
        return sum(self.zeros.values()) / max(1, sum(self.sizes.values()))

    def shares(self) -> dict:
        shares = {name: round(self.zeros[name] / self.sizes[name], 6) for name in self.sizes}
        return {"overall": self.overall, "linears": shares}

    def again(self, runner: BlockRunner) -> Measured:
        """Measure the model as it is now. UserError where a linear is less sparse than it was."""
        now = Measured(runner, self.target, self.left_dense)
        for name, zeros in self.zeros.items():
            if now.zeros[name] < zeros:
                raise UserError(f"{name}: has lost {zeros - now.zeros[name]} zeros; report this")
        return now
