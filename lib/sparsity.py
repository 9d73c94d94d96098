"""How sparse, in which pattern, and the only place where a score becomes a mask.

A mask is True where a weight is *pruned*. Ties go to the lower column, so that a mask depends on
the scores alone. Importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNSTRUCTURED = "unstructured"
TYPES = (UNSTRUCTURED, "2:4", "4:8")
ALLOCATIONS = ("uniform", "owl")
ALLOCATION_SPAN = 0.16  # between the sparsest and the densest block, 2 lambda of OWL


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


def per_block(sparsity: Sparsity | Sequence[Sparsity], blocks: int) -> list[Sparsity]:
    """One for each block, from one for all or as many as there are."""
    several = [sparsity] * blocks if isinstance(sparsity, Sparsity) else list(sparsity)
    assert len(several) == blocks
    return several


def lowest_per_row(score: Tensor, count: int) -> Tensor:
    """Mask (rows, columns) of exactly the `count` smallest scores of every row."""
    import numpy
    import torch

    assert 0 <= count <= score.shape[-1]
    if score.device.type != "cpu":
        return _first_when_sorted(score, count)
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if score.dtype == torch.bfloat16:  # unknown to numpy
        score = score.float()
    # numpy's selection is some twenty times as fast as torch's on a CPU
    ordered = numpy.partition(score.numpy(), count - 1, axis=-1)
    threshold = torch.from_numpy(ordered[..., count - 1 : count])  # (rows, 1)
    mask = score <= threshold
    if numpy.count_nonzero(mask.numpy()) > count * mask[..., 0].numel():
        # scores equal to the threshold: only the first of them go
        equal = score == threshold
        allowed = equal.sum(-1, keepdim=True) - mask.sum(-1, keepdim=True) + count
        mask &= ~equal | (equal.cumsum(-1) <= allowed)
    return mask


def lowest_overall(score: Tensor, count: int) -> Tensor:
    """Mask of exactly the `count` smallest scores of the whole matrix."""
    return lowest_per_row(score.reshape(1, -1), count).view(score.shape)


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Mask (rows, columns) of the `n` smallest scores in every `m` consecutive columns."""
    assert score.shape[-1] % m == 0, f"{score.shape[-1]} columns are not a multiple of {m}"
    groups = score.reshape(*score.shape[:-1], -1, m)
    return n_of_first(groups.movedim(-1, 0), n).movedim(0, -1).reshape(score.shape)


def n_of_first(score: Tensor, n: int) -> Tensor:
    """Mask (m, ...) of the `n` smallest scores along the first dimension, which is short."""
    import torch

    if score.device.type != "cpu":
        return _first_when_sorted(score.movedim(0, -1), n).movedim(-1, 0)
    score = score.contiguous()
    if score.dtype == torch.bfloat16:  # unknown to numpy
        score = score.float()
    rank = torch.zeros_like(score, dtype=torch.uint8)  # how many of its group come before it
    # numpy's operations cost a fraction of torch's to call, and the arrays are small
    scores, ranks = score.numpy(), rank.numpy()
    for right in range(1, len(scores)):
        left_first = scores[:right] <= scores[right]
        ranks[right] += left_first.sum(0, dtype=ranks.dtype)
        ranks[:right] += ~left_first
    return rank < n


def _first_when_sorted(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` smallest along the last dimension, without the host looking at it."""
    import torch

    first = score.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, first, True)
