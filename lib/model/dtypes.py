"""In which dtype each parameter of a model is saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SaveDtypes:
    """Says it to whatever saves, keeps, fetches, sends or trains a parameter.

    The model is saved in `dtype` (None: as it is), except for what its class always keeps in
    float32 (some routers), by parts of names, and what text does not read.
    """

    def __init__(self, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.exact = frozenset(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self.unread = getattr(model, "unread", frozenset())

    def of(self, name: str, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which a parameter is saved; `name` is that in the model."""
        if self.dtype is None or name in self.unread or self.exact & set(name.split(".")):
            return parameter.dtype
        return self.dtype if parameter.is_floating_point() else parameter.dtype
