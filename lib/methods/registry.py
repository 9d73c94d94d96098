"""The pruning methods by name: one class, one line here. Importing this file imports no torch.

A class is called with the width and the device of one input of a block. Its object takes in what
flows there (`observe`), keeps sums that add up over processes (`statistics`, `tokens`), says
beforehand how much memory it takes (`bytes_needed`), and prunes the linears that receive the input
(`prune_`). What it asks of its caller is told by three constants of the class:

  - `observes`: it needs calibration windows at all.
  - `in_order`: a block's inputs are taken one after another, each after the linears before it are
    pruned.
  - `dense_stream`: `observe` also gets the same input as the untouched model computes it.
"""

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
class MethodSpec:
    """A method's class with its options bound: call it with (width, device) for each input."""

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
        return self.cls.in_order

    @property
    def dense_stream(self) -> bool:
        return self.cls.dense_stream

    @property
    def settings(self) -> dict[str, Any]:
        """Every option of the method with the value that it has, given or by default."""
        declared = signature(self.cls).parameters.values()
        defaults = {p.name: p.default for p in declared if p.default is not Parameter.empty}
        return defaults | self.options

    def __call__(self, width: int, device: Any) -> Any:
        return self.cls(width, device, **self.options)
