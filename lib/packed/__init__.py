"""Sparse linear layers that stay packed: one bit per weight, and the kept values contiguous.

Importing this package teaches transformers to load packed checkpoints:

    import packed_bitmask
    model = AutoModelForCausalLM.from_pretrained(folder)

It needs only torch, transformers and safetensors, and nothing else of the project around it.
The format, the paths and the kernels are described in README.md beside this file.
"""

from .checkpoint import card_lines
from .errors import PackedError, PackedWarning
from .formats import FORMATS
from .linear import SparseLinear

__all__ = ["FORMATS", "PackedError", "PackedWarning", "SparseLinear", "card_lines"]
