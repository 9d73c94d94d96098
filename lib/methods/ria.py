"""RIA: relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play").

The score of weight W[i, j] is

    (|W[i, j]| / sum_i |W[i, j]| + |W[i, j]| / sum_j |W[i, j]|) * ||X[:, j]||^alpha

the weight's shares of its column and of its row in |W|, times Wanda's norm of the input to the
power of alpha. As in the authors' default, scores are compared over the whole matrix, or within
N:M groups. The authors' channel permutation, which sorts inputs before N:M groups are formed, is
not implemented: inputs stay in their order.
Run: `python main.py --model MODEL --prune_method ria [--method_args alpha=0.5]`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import PruningMethod
from .sparsity import Sparsity
from .wanda import Wanda


class Ria(Wanda):
    """Wanda's sums of one input; scores weights relative to their row and their column."""

    alpha = 0.5
    remove_neurons_ = PruningMethod.remove_neurons_  # the paper has no rule for neurons

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        for weight, sparsity in zip(weights, sparsities, strict=True):
            score = relative_importance(weight) * self.square_sum.sqrt().float() ** self.alpha
            weight.masked_fill_(sparsity.mask(score, overall=True), 0)


def relative_importance(weight: Tensor) -> Tensor:
    """Return the sum of each |W|'s (out, in) shares of its column and row; 0 if these are all 0."""
    size = weight.abs()
    return size / _or_one(size.sum(0)) + size / _or_one(size.sum(1, keepdim=True))


def _or_one(sums: Tensor) -> Tensor:
    return sums.masked_fill(sums == 0, 1)
