"""The pruning methods by name: one class, one line here. Importing this file imports no torch.

A method's class extends lib/methods/base.py's `PruningMethod`, which says what it may override.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import PruningMethod

METHODS = {
    "wanda": "wanda:Wanda",
    "sparsegpt": "sparsegpt:SparseGPT",
    "admm": "admm:Admm",
    "magnitude": "magnitude:Magnitude",
}
EXPERT_METHODS = {  # of --sparsity_type experts
    "reap": "experts:Reap",
    "contribution": "experts:Contribution",
    "frequency": "experts:Frequency",
    "random": "experts:Random",
}


def method_of(name: str, variant: bool = False) -> type[PruningMethod]:
    """Return a method's class, to be called with (width, device); importing it imports torch.

    `variant`: of Wanda the one of --use_variant.
    """
    module, class_name = (METHODS | EXPERT_METHODS)[name].split(":")
    return getattr(import_module(f".{module}", __package__), class_name + "Variant" * variant)
