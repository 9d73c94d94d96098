"""The pruning methods by name: one class, one line here. Importing this file imports no torch.

A method's class extends lib/methods/base.py's `PruningMethod`, which says what it may override.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lib.methods.base import PruningMethod

METHODS = {
    "wanda": "lib.methods.wanda:Wanda",
    "sparsegpt": "lib.methods.sparsegpt:SparseGPT",
    "admm": "lib.methods.admm:Admm",
    "magnitude": "lib.methods.magnitude:Magnitude",
}
ROUNDING = "rounding"  # it prunes nothing: lib/round.py's
CLASSES = METHODS | {ROUNDING: "lib.methods.rounding:Rounding"}


@dataclass(frozen=True)
class MethodSpec:
    """A method's name and options: call it with (width, device) for each input."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type[PruningMethod]:
        """The method's class; importing it imports torch."""
        module, name = CLASSES[self.name].split(":")
        return getattr(import_module(module), name)

    @property
    def settings(self) -> dict[str, Any]:
        """The value of every option of the method, given or by default."""
        declared = signature(self.cls).parameters.values()
        defaults = {p.name: p.default for p in declared if p.default is not Parameter.empty}
        return defaults | self.options

    def __call__(self, width: int, device: torch.device) -> PruningMethod:
        return self.cls(width, device, **self.options)
