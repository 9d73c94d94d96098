"""One prunable matrix of a decoder block, whatever its module keeps it as.

`nn.Linear` keeps its weight (out, in), GPT-2's `Conv1D` (in, out), a fused mixture-of-experts
parameter (experts, out, in) or, transposed, (experts, in, out). Solvers see a float32 (out, in)
matrix and none of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class PrunableLinear:
    """One prunable matrix: (a slice of) a parameter of `module`.

    `name` is the full name in the model, `stage` what the linears that are reached at the same
    point of the block's forward have in common: the name, for all experts that of their parameter.
    """

    name: str
    stage: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def stored(self) -> Tensor:
        """The weight as the model keeps it, a view."""
        weight = getattr(self.module, self.parameter).data
        return weight if self.expert is None else weight[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> Tensor:
        """A float32 copy, (out, in), contiguous, on the weight's device."""
        stored = self.stored.T if self.transposed else self.stored
        return stored.to(torch.float32, copy=True).contiguous()

    def wire(self, matrix: Tensor | None = None, rounding: torch.dtype | None = None) -> Tensor:
        """(out, in) as it travels between processes and is kept: in the dtype it is saved in.

        Without a matrix, an empty one to receive into.
        """
        dtype = rounding or self.stored.dtype
        if matrix is None:
            return torch.empty(self.shape, dtype=dtype, device=self.stored.device)
        return matrix.to(dtype)

    def store_(self, wire: Tensor) -> None:
        """Write an (out, in) matrix back."""
        self.stored.copy_(wire.T if self.transposed else wire)
