"""One prunable matrix of a decoder block, independent of how its module stores it.

`nn.Linear` stores its weight as (out, in), GPT-2's `Conv1D` as (in, out), a fused MoE parameter as
(experts, out, in) or, transposed, (experts, in, out). Solvers only see a float32 (out, in) matrix.
It is saved in the dtype that `SaveDtypes` gives, as any parameter is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..packed.layout import all_finite
from ..util.errors import UserError

FLOAT = 4  # bytes of a float32: statistics, solvers, masters, gradients and averages


def unread_of(model: nn.Module) -> frozenset[str]:
    """Return the names of parameters and buffers that a text-only pass does not read.

    They are known of every model that `skeleton` has built or `load_model` has loaded.
    """
    return getattr(model, "unread", frozenset())


class SaveDtypes:
    """The dtype in which each parameter is saved, kept, fetched, sent and trained.

    The model is saved in `dtype` (None: unchanged). Exceptions are parts that its class always
    keeps in float32 (some routers), by parts of names, and parts that do not process text.
    """

    def __init__(self, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.exact = frozenset(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self.unread = unread_of(model)

    def of(self, name: str, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which a parameter is saved; `name` is its name in the model."""
        if self.dtype is None or name in self.unread or self.exact & set(name.split(".")):
            return parameter.dtype
        return self.dtype if parameter.is_floating_point() else parameter.dtype


@dataclass(eq=False)
class PrunableLinear:
    """One prunable matrix: (a slice of) a parameter of `module`.

    `name` is the full name in the model.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False
    is_quantized: ClassVar[bool] = False  # whether the weight holds codes instead of values

    @property
    def parameter_name(self) -> str:
        """The parameter's name in the model, which all of its experts share."""
        if self.expert is None:
            return f"{self.name}.{self.parameter}"
        return self.name.rpartition(".")[0]

    @property
    def raw_weight(self) -> Tensor:
        """The weight as the model stores it (a view)."""
        weight = getattr(self.module, self.parameter).data
        return weight if self.expert is None else weight[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, columns = self.raw_weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def check_finite(self, model: str) -> None:
        """Raise UserError if the weight holds nan or inf; the message begins with `model`."""
        weight = self.raw_weight
        if weight.is_floating_point() and not all_finite(weight):
            problem = f"the weight of {self.name} holds nan or inf"
            raise UserError(model, problem, "Download the model again")

    def matrix(self) -> Tensor:
        """Return a contiguous float32 copy (out, in) on the weight's device."""
        weight = self.raw_weight.T if self.transposed else self.raw_weight
        return weight.to(torch.float32, copy=True).contiguous()

    def saved_dtype(self, saved: SaveDtypes) -> torch.dtype:
        """Return the dtype in which ranks send the matrix, and save it."""
        if self.is_quantized:  # it will be quantized again
            return torch.float32
        return saved.of(self.name, self.raw_weight)

    def set_weight_(self, matrix: Tensor) -> None:
        """Write a matrix (out, in) into the weight."""
        self.raw_weight.copy_(matrix.T if self.transposed else matrix)
