"""Magnitude pruning: the smallest weights go, whatever flows through them. The baseline.

Run: `python main.py --model MODEL --prune_method magnitude`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.methods.sparsity import Sparsity, choosing_bytes, lowest_overall, one_each


class Magnitude:
    """Score |W|, compared over the whole matrix as in wanda's baseline, or within N:M groups."""

    observes = False  # needs no calibration windows
    in_order = False
    dense_stream = False

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.tokens = 0

    def observe(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Nothing: the weights alone decide."""

    def statistics(self) -> list[Tensor]:
        return []

    def bytes_needed(self, rows: list[int]) -> tuple[int, int]:
        """Of the statistics, and beside them for solving linears with `rows` outputs."""
        return 0, choosing_bytes(self.width * max(rows))

    def prune_(self, weights: list[Tensor], sparsity: Sparsity | Sequence[Sparsity]) -> None:
        """Zero the lowest-scored entries of every (out, in) matrix in place."""
        for weight, one in zip(weights, one_each(sparsity, len(weights)), strict=True):
            score = weight.abs()
            if one.pattern:
                mask = one.mask(score)
            else:
                mask = lowest_overall(score, int(score.numel() * one.ratio))
            weight.masked_fill_(mask, 0)
