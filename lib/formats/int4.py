"""The 4-bit integers that packed checkpoints hold.

Candidates for a scale are all numbers with five significant bits from 1/12 to 1/4 of the group's
largest weight; the one with the least squared error is chosen. Small scales clip the largest weight
if that helps the others. Quantizing quantized weights again gives the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packed.formats import SMALLEST
from ..packed.formats import Int4 as PackedInt4
from ..packed.layout import Packed
from .base import ScaledFormat, significant_steps

CANDIDATES = 28  # steps of five significant bits from any number to three times that number


class Int4(ScaledFormat, PackedInt4):
    """The packed format, with the scales of the least error."""

    label = "the 4-bit integers that are packed"
    packs = True

    def encode(self, matrix: Tensor, scales: Tensor | None = None) -> Packed:
        """Return the packed form of a matrix (out, in), on the grid of `scales` or the best one."""
        return super().encode(matrix, self.fit_scales(matrix) if scales is None else scales)

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        rows, width = tile.shape
        groups = self.n_groups(width)
        weights = F.pad(tile, (0, groups * self.group - width)).view(rows, groups, self.group)
        largest = weights.abs().amax(2, keepdim=True)  # (rows, groups, 1)
        # division by a power of two, so that squares neither overflow nor underflow
        unit = ((largest.view(torch.int32) >> 23).clamp(27, 227) << 23).view(torch.float32)
        weights, first = weights / unit, largest / unit
        first = (first / (-1.5 * self.lowest)).clamp_min(SMALLEST / unit)
        best = self._nearest(weights, significant_steps(first, CANDIDATES), costs)
        return torch.where(largest > 0, best * unit, 1).squeeze(2)
