"""The pruning methods by name: one class, one line here. Importing this file imports no torch.

A method's class extends lib/methods/base.py's `PruningMethod`, which says what it may override.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.methods.base import PruningMethod

METHODS = {
    "wanda": "lib.methods.wanda:Wanda",
    "sparsegpt": "lib.methods.sparsegpt:SparseGPT",
    "admm": "lib.methods.admm:Admm",
    "magnitude": "lib.methods.magnitude:Magnitude",
}
EXPERT_METHODS = {  # of --sparsity_type experts
    "reap": "lib.methods.experts:Reap",
    "contribution": "lib.methods.experts:Contribution",
    "frequency": "lib.methods.experts:Frequency",
    "random": "lib.methods.experts:Random",
}


def method_of(name: str, variant: bool = False) -> type[PruningMethod]:
    """Return a method's class, to be called with (width, device); importing it imports torch.

    `variant`: of Wanda the one of --use_variant.
    """
    module, class_name = (METHODS | EXPERT_METHODS)[name].split(":")
    return getattr(import_module(module), class_name + "Variant" * variant)
