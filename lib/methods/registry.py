"""The pruning methods by name: one class, one line here. Importing this file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

METHODS = {
    "wanda": "lib.methods.wanda:Wanda",
    "sparsegpt": "lib.methods.sparsegpt:SparseGPT",
    "admm": "lib.methods.admm:Admm",
    "magnitude": "lib.methods.magnitude:Magnitude",
}


@dataclass(frozen=True)
class Recipe:
    """A method's class with its options bound: call it with (width, device) for each input.

    `in_order`: a block's inputs are taken one after another, each after the linears before it are
    pruned. `dense_stream`: `observe` also gets the same input as the untouched model computes it.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type:
        module, name = METHODS[self.name].split(":")
        return getattr(import_module(module), name)

    @property
    def observes(self) -> bool:
        return self.cls.observes

    @property
    def in_order(self) -> bool:
        return self.options.get("in_order", self.cls.in_order)

    @property
    def dense_stream(self) -> bool:
        return self.options.get("dense_stream", self.cls.dense_stream)

    @property
    def settings(self) -> dict[str, Any]:
        """Every option of the method with the value that it has, given or by default."""
        declared = signature(self.cls).parameters.values()
        defaults = {p.name: p.default for p in declared if p.default is not Parameter.empty}
        return defaults | self.options

    def __call__(self, width: int, device: Any) -> Any:
        return self.cls(width, device, **self.options)
