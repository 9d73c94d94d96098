"""Magnitude pruning: the smallest weights go, whatever flows through them. The baseline.

Run: `python main.py --model MODEL --prune_method magnitude`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lib.methods.base import PruningMethod
from lib.methods.obs import keep_lowest_loss, zero_others_
from lib.methods.sparsity import Sparsity, lowest_overall


class Magnitude(PruningMethod):
    """Score |W|, compared over the whole matrix as in wanda's baseline, or within N:M groups."""

    observes = False

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        for weight, sparsity in zip(weights, sparsities, strict=True):
            score = weight.abs()
            if sparsity.pattern:
                mask = sparsity.mask(score)
            else:
                mask = lowest_overall(score, int(score.numel() * sparsity.ratio))
            weight.masked_fill_(mask, 0)

    def remove_neurons_(self, weight: Tensor, gains: Tensor, count: int) -> Tensor:
        """Score |W_j| times the norms of the rows that make neuron j: no rescaling changes it."""
        kept = keep_lowest_loss(weight.norm(dim=0) * gains, count)
        return zero_others_(weight, kept)
