"""Sparsity and its pattern, and the only place where a score becomes a mask.

A mask is True where a weight is *pruned*. Ties go to the lower column, so that a mask depends
only on the scores. Importing this file does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

UNSTRUCTURED = "unstructured"
NEURONS, EXPERTS = "neurons", "experts"  # removed whole, which leaves a smaller dense model
SMALLER = (NEURONS, EXPERTS)
RATIO_TYPES = (UNSTRUCTURED, *SMALLER)  # types with a free ratio
TYPES = (UNSTRUCTURED, "2:4", "4:8", *SMALLER)
ALLOCATIONS = ("uniform", "error", "owl")  # or a file with layers' sparsities
SAMPLED = 2**16  # scores; above, a sample first narrows the range for numpy's selection
STRIDE = 31  # between sampled scores; prime, so that all columns are sampled
# bytes per weight of a stable sort on CUDA, for masks of whole matrices: scores, values and
# indices, and those of the last pass
SORTED = 28
MARGIN = 2.5  # times the root of the sample size: at least five standard deviations of a rank


class Passes(NamedTuple):
    """What is measured in the dense model before pruning, for the allocation or the method."""

    outliers: bool  # in one pass through all blocks
    gradients: bool  # in one pass forward and one back, with a few windows

    @classmethod
    def of(cls, rule: str, method: Any) -> Passes:
        """Return the passes for an allocation of ALLOCATIONS or a file, and a class of methods."""
        return cls(rule == "owl", rule == "error" or method.needs_gradients)

    @property
    def count(self) -> int:
        """How often all blocks are passed through."""
        return self.outliers + 2 * self.gradients


@dataclass(frozen=True)
class Sparsity:
    """Share of the weights to prune; with `n` and `m`, n of every m consecutive inputs."""

    ratio: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, kind: str, ratio: float | None) -> Sparsity:
        """Read a type and a ratio in [0, 1), None for that of N:M; UserError if they disagree.

        For `neurons` and `experts` it is their ratio, and does not apply to individual weights.
        """
        if ratio is None:
            if kind not in TYPES or kind in RATIO_TYPES:
                patterns = " or ".join(name for name in TYPES if name not in RATIO_TYPES)
                fix = f"Give one, or {patterns}"
                raise UserError(f"sparsity {kind!r}", "it has no share", fix)
            ratio = int(kind[0]) / int(kind[2])
        if not 0 <= ratio < 1:  # also refuses nan
            meant = f", such as {ratio / 100:g} for {ratio:g}%" if 1 < ratio < 100 else ""
            problem = "it must be at least 0 and below 1"
            raise UserError(f"{{--sparsity_ratio}} {ratio}", problem, f"Give a share{meant}")
        if kind in RATIO_TYPES:
            return cls(ratio)
        n, m = map(int, kind.split(":"))
        if ratio != n / m:
            raise UserError(
                f"{{--sparsity_ratio}} {ratio}",
                f"{{--sparsity_type}} {kind} drops {n} of every {m} weights",
                f"Use {{--sparsity_ratio}} {n / m} or {{--sparsity_type}} {UNSTRUCTURED}",
            )
        return cls(ratio, n, m)

    def mask(self, score: Tensor, overall: bool = False) -> Tensor:
        """Return the mask of the lowest scores in each N:M group or row, or `overall`."""
        if self.m:
            groups = score.unflatten(-1, (-1, self.m)).movedim(-1, 0)  # (m, ...)
            return n_of_first(groups, self.n).movedim(0, -1).reshape(score.shape)
        rows = score.reshape(1, -1) if overall else score
        return lowest_per_row(rows, int(rows.shape[-1] * self.ratio)).view(score.shape)


def lowest_per_row(score: Tensor, count: int) -> Tensor:
    """Mask (rows, columns) of exactly the `count` smallest scores of every row, all >= 0."""
    import numpy
    import torch

    if score.device.type != "cpu":  # avoids synchronizing with the host
        first = score.sort(dim=-1, stable=True).indices[..., :count]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, first, True)
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if score.dtype == torch.bfloat16:  # numpy has no bfloat16
        score = score.float()
    # numpy's selection is about 20 times as fast as torch's on a CPU
    if score[..., 0].numel() == 1:
        threshold = torch.tensor(_select(score.numpy().reshape(-1), count), dtype=score.dtype)
    else:
        ordered = numpy.partition(score.numpy(), count - 1, axis=-1)
        threshold = torch.from_numpy(ordered[..., count - 1 : count])  # (rows, 1)
    mask = score <= threshold
    if numpy.count_nonzero(mask.numpy()) > count * mask[..., 0].numel():
        mask = _lowest_up_to(threshold, score, count)
    return mask


def threshold(score: Tensor, count: int) -> float:
    """Return the `count`-th smallest of all scores, none negative; -1 if `count` is 0."""
    if count == 0:
        return -1.0
    score = score.reshape(-1)
    if score.device.type == "cpu":
        return float(_select(score.numpy(), count))
    # an accelerator selects without sorting
    return score.topk(count, largest=False, sorted=False).values.max().item()


def _select(scores: Any, count: int) -> Any:
    """Return the exact `count`-th smallest of an array, searched near its place in a sample."""
    import numpy

    if len(scores) > SAMPLED:
        sample = scores[::STRIDE]
        rank, margin = count * len(sample) // len(scores), int(MARGIN * len(sample) ** 0.5)
        ends = max(0, rank - margin), min(len(sample) - 1, rank + margin)
        low, high = numpy.partition(sample, ends)[list(ends)]
        below = numpy.count_nonzero(scores < low)
        near = scores[(scores >= low) & (scores <= high)]
        if below < count <= below + len(near):
            return numpy.partition(near, count - 1 - below)[count - 1 - below]
    return numpy.partition(scores, count - 1)[count - 1]


def n_of_first(score: Tensor, n: int | Tensor) -> Tensor:
    """Mask (m, ...) of the `n` smallest scores along the first dimension, which is short.

    `n` may differ along the other dimensions.
    """
    import torch

    score = score if score.stride(-1) == 1 else score.contiguous()
    rank = torch.zeros(score.shape, dtype=torch.uint8, device=score.device)
    if score.device.type != "cpu":
        _add_ranks_(rank, score)
    else:
        score = score.float() if score.dtype == torch.bfloat16 else score  # numpy has no bfloat16
        # numpy's calls cost a fraction of torch's, and the arrays are small
        _add_ranks_(rank.numpy(), score.numpy())
    return rank < n


def _add_ranks_(ranks: Any, scores: Any) -> None:
    """Add to each rank the number of earlier scores in its group (dim 0); tensors or arrays."""
    for right in range(1, len(scores)):
        left_first = scores[:right] <= scores[right]
        ranks[right] += left_first.sum(0, dtype=ranks.dtype)
        ranks[:right] += ~left_first


def _lowest_up_to(threshold: Tensor, score: Tensor, count: int) -> Tensor:
    """Mask the scores below each row's threshold, and the first equal ones: `count` in all."""
    import torch

    mask = score < threshold
    equal = score == threshold
    allowed = count - mask.sum(-1, keepdim=True)
    return mask.logical_or_(equal & (equal.cumsum(-1, dtype=torch.int32) <= allowed))
