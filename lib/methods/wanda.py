"""Wanda: prune by weight and activation (Sun et al. 2023, arXiv 2306.11695, equation 1).

The score of weight W[i, j] is |W[i, j]| * ||X[:, j]||, the norm of input channel j over all
calibration tokens. Scores are compared within one output row (section 3), or within N:M groups;
`WandaVariant` instead gives every row its own share of zeros (section 4.2 of the authors' code).
Run: `python main.py --model MODEL --prune_method wanda [--use_variant]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import PruningMethod
from .obs import keep_highest_
from .sparsity import Sparsity

TOKENS = 64  # tokens whose squares are summed in float32
VARIANT_TOLERANCE = 1e-3  # for the sparsity, and for the interval of alpha at which bisection stops


class Wanda(PruningMethod):
    """Sum of squares per input channel, for one input of a block.

    Sums are in float32 over a few tokens, then in float64. If the window length is a multiple of
    `TOKENS`, sums and masks do not depend on the batch size or the number of processes.
    """

    _overall = False  # whether scores are compared over the whole matrix

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.square_sum = torch.zeros(width, device=device, dtype=torch.float64)  # (in,)

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        # float32 first: squares of float16 activations overflow beyond 256
        squares = x.float().square()
        whole = len(x) // TOKENS * TOKENS
        few = squares[:whole].unflatten(0, (whole // TOKENS, TOKENS)).sum(1)
        self.square_sum += few.sum(0, dtype=torch.float64)
        self.square_sum += squares[whole:].sum(0)

    def statistics(self) -> list[Tensor]:
        return [self.square_sum]

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        for weight, sparsity in zip(weights, sparsities, strict=True):
            weight.masked_fill_(sparsity.mask(self.score(weight), self._overall), 0)

    def score(self, weight: Tensor) -> Tensor:
        """Return the score of each weight (out, in)."""
        return weight.abs() * self.square_sum.sqrt().float()

    def remove_neurons_(self, weight: Tensor, gains: Tensor, count: int) -> Tensor:
        """Score |W_j| |X_j|: neuron j's part of the outputs, if inputs are uncorrelated."""
        score = weight.norm(dim=0) * self.square_sum.sqrt().float()
        return keep_highest_(weight, score, count)


class WandaVariant(Wanda):
    """Wanda with an individual share of zeros per row, as with --use_variant."""

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        for weight, sparsity in zip(weights, sparsities, strict=True):
            weight.masked_fill_(variant_mask(self.score(weight), sparsity.ratio), 0)


def variant_mask(score: Tensor, ratio: float) -> Tensor:
    """Mask the smallest scores of each row (out, in) while these sum to at most alpha of the row.

    Bisects on alpha from 0.4 in [0, 0.8] until the sparsity of the whole matrix is within 0.001 of
    the ratio or the interval is below 0.001, as in the authors' code.
    """
    values, order = score.sort(dim=-1, stable=True)
    share = values.cumsum(-1)  # (out, in), up to the row's sum
    total = share[:, -1:].clone()
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        mask = share <= alpha * total  # (out, in), in sorted order
        off = mask.float().mean().item() - ratio
        if abs(off) <= VARIANT_TOLERANCE or high - low < VARIANT_TOLERANCE:
            return torch.zeros_like(mask).scatter_(1, order, mask)
        low, high = (low, alpha) if off > 0 else (alpha, high)
        alpha = (low + high) / 2
