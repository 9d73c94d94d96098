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

from torch import Tensor

from .base import PruningMethod
from .wanda import Wanda


class Ria(Wanda):
    """Wanda's sums of one input; scores weights relative to their row and their column."""

    alpha = 0.5
    _overall = True
    remove_neurons_ = PruningMethod.remove_neurons_  # the paper has no rule for neurons

    def score(self, weight: Tensor) -> Tensor:
        return relative_importance(weight) * self.square_sum.sqrt().float() ** self.alpha


def relative_importance(weight: Tensor) -> Tensor:
    """Return the sum of each |W|'s (out, in) shares of its column and row; 0 if these are all 0."""
    size = weight.abs()
    columns, rows = size.sum(0), size.sum(1, keepdim=True)
    return size / columns.masked_fill(columns == 0, 1) + size / rows.masked_fill(rows == 0, 1)
