"""Measure the sparsity of a model from its weights and compare it with the requested one."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from ..methods.sparsity import Sparsity
from ..util.errors import UserError
from .blocks import BlockRunner


class SparsityCheck:
    """Numbers of zeros and of weights in every linear layer of the decoder blocks, by name.

    If `target` is given, each layer must have that sparsity; layers named in `left_dense` are only
    counted. Raises UserError naming a layer with too few zeros, in all or in its N:M groups.
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
                    problem = f"{short} of {groups} groups are not {n}:{m}"
                    raise UserError(name, problem, "Please report this")
            # methods round counts down, once per row or block of columns
            elif ratio * zero.numel() - self.zeros[name] > max(linear.shape):
                share = f"only {zero.float().mean():.4f} of its weights are zero"
                problem = f"{share}, but {ratio:g} was requested"
                raise UserError(name, problem, "Please report this")

    @property
    def overall(self) -> float:
        """Share of zeros among the weights of all linear layers."""
        return sum(self.zeros.values()) / max(1, sum(self.sizes.values()))

    def record(self) -> dict[str, Any]:
        """Return the shares of zeros, of all layers and of each, as in results.json."""
        shares = {name: round(self.zeros[name] / self.sizes[name], 6) for name in self.sizes}
        return {"overall": self.overall, "linears": shares}

    def recheck(self, runner: BlockRunner) -> SparsityCheck:
        """Measure the current model. Raises UserError if a layer is less sparse than at first."""
        now = SparsityCheck(runner, self.target, self.left_dense)
        for name, zeros in self.zeros.items():
            if now.zeros[name] < zeros:
                lost = zeros - now.zeros[name]
                raise UserError(name, f"it has lost {lost} zeros", "Please report this")
        return now
