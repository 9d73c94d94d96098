"""How sparse, in which pattern, and the only place where a score becomes a mask.

A mask is True where a weight is *pruned*. Ties go to the lower column, so that a mask depends on
the scores alone. Importing this file does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNSTRUCTURED = "unstructured"
TYPES = (UNSTRUCTURED, "2:4", "4:8")


@dataclass(frozen=True)
class Sparsity:
    """Share of the weights to drop; with `n` and `m`, n of every m consecutive inputs."""

    ratio: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, kind: str, ratio: float) -> Sparsity:
        """From `unstructured` or `N:M` and a ratio in [0, 1). ValueError where they disagree."""
        if not 0 <= ratio < 1:  # also refuses nan
            raise ValueError(f"--sparsity_ratio {ratio}: must be at least 0 and below 1")
        if kind == UNSTRUCTURED:
            return cls(ratio)
        n, m = map(int, kind.split(":"))
        if ratio != n / m:
            raise ValueError(
                f"--sparsity_ratio {ratio}: --sparsity_type {kind} drops {n} of every {m} weights; "
                f"use --sparsity_ratio {n / m} or --sparsity_type {UNSTRUCTURED}"
            )
        return cls(ratio, n, m)

    @property
    def pattern(self) -> str | None:
        """`2:4`, or None where the mask is unstructured."""
        return f"{self.n}:{self.m}" if self.m else None

    def mask(self, score: Tensor) -> Tensor:
        """Mask of the lowest scores: per row (Wanda's comparison group), or per N:M group."""
        if self.m:
            return n_of_m(score, self.n, self.m)
        return lowest_per_row(score, int(score.shape[-1] * self.ratio))


def lowest_per_row(score: Tensor, count: int) -> Tensor:
    """Mask (rows, columns) of exactly the `count` smallest scores of every row."""
    assert 0 <= count <= score.shape[-1]
    if count == 0:
        return score.new_zeros(score.shape).bool()
    threshold = score.kthvalue(count, dim=-1, keepdim=True).values  # (rows, 1)
    mask = score <= threshold
    surplus = mask.sum(-1, keepdim=True) - count
    if surplus.any():  # scores equal to the threshold: only the first of them go
        equal = score == threshold
        allowed = equal.sum(-1, keepdim=True) - surplus
        mask &= ~equal | (equal.cumsum(-1) <= allowed)
    return mask


def lowest_overall(score: Tensor, count: int) -> Tensor:
    """Mask of exactly the `count` smallest scores of the whole matrix."""
    return lowest_per_row(score.reshape(1, -1), count).view(score.shape)


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the `n` smallest scores in every `m` consecutive columns."""
    assert score.shape[-1] % m == 0, f"{score.shape[-1]} columns are not a multiple of {m}"
    groups = score.reshape(*score.shape[:-1], -1, m)
    columns = [groups[..., i] for i in range(m)]
    ranks = [0] * m  # rank of a column: how many of its group come before it
    for right in range(m):
        for left in range(right):
            left_first = columns[left] <= columns[right]
            ranks[right] = ranks[right] + left_first
            ranks[left] = ranks[left] + ~left_first
    mask = groups.new_empty(groups.shape).bool()
    for i, rank in enumerate(ranks):
        mask[..., i] = rank < n
    return mask.view(score.shape)
