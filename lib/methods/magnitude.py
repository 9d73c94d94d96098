"""Magnitude pruning, the baseline: prune the smallest weights, regardless of activations.

Run: `python main.py --model MODEL --prune_method magnitude`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import PruningMethod
from .obs import keep_highest_
from .sparsity import Sparsity


class Magnitude(PruningMethod):
    """Score |W|, compared over the whole matrix as in wanda's baseline, or within N:M groups."""

    observes = False

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        for weight, sparsity in zip(weights, sparsities, strict=True):
            weight.masked_fill_(sparsity.mask(weight.abs(), overall=True), 0)

    def remove_neurons_(self, weight: Tensor, gains: Tensor, count: int) -> Tensor:
        """Score |W_j| times the norms of the rows that make neuron j: invariant to rescaling."""
        return keep_highest_(weight, weight.norm(dim=0) * gains, count)
