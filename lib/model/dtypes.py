"""In which dtype each parameter of a model is saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SaveDtypes:
    """Says it to whatever saves, keeps, fetches, sends or trains a parameter.

    The model is saved in `dtype` (None: as it is), except for what its class always keeps in
    float32 (some routers), by parts of names.
    """

    def __init__(self, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.exact = frozenset(getattr(model, "_keep_in_fp32_modules_strict", None) or ())

    def of(self, name: str, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which a parameter is saved; `name` is that in the model."""
        floats = self.dtype is not None and parameter.is_floating_point()
        return self.dtype if floats and not self.exact & set(name.split(".")) else parameter.dtype
