"""STAND-IN, to be replaced: products with a packed weight on the CPU."""

from __future__ import annotations

from torch import Tensor

MOST_TOKENS = 8


def ready() -> bool:
    """Whether the kernels can be used; builds them on the first call."""
    return False


def linear(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x (tokens, in) -> (tokens, out)."""
    raise NotImplementedError
