"""Sparse linear layers that stay packed: one bit per weight, and the kept values contiguous.

Importing this package registers packed checkpoints with transformers:

    import packed_bitmask
    model = AutoModelForCausalLM.from_pretrained(folder)

It needs only torch, transformers and safetensors, and nothing else of the project around it.
README.md beside this file describes the format, the kernels and their use.
"""

from .checkpoint import card_lines
from .errors import PackedError, PackedWarning
from .formats import PACKED
from .linear import SparseLinear

FORMATS = {fmt.name: fmt for fmt in PACKED.values()}

__all__ = ["FORMATS", "PackedError", "PackedWarning", "SparseLinear", "card_lines"]
