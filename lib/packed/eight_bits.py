"""Kept weights as int8, with one float32 scale for each row of the matrix.

The scale is the row's largest weight over 127, so that every weight is off by half a step at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.util.errors import UserError

LARGEST = 127
SMALLEST = torch.finfo(torch.float32).tiny


def to_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (rows, in) and float32 scales (rows,) of `weight` (rows, in). UserError where it holds
    nan or inf."""
    weight = weight.float()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    if not bool(largest.isfinite().all()):
        raise UserError("--pack_bits 8: a weight is nan or inf, which 8 bits can't hold")
    scale = (largest / LARGEST).clamp_min(SMALLEST)
    codes = (weight / scale[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return codes.to(torch.int8), scale
