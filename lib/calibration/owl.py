"""OWL: choose the sparsity of each block by the outliers among its scores (arXiv 2310.05175).

Scores are Wanda's A[i, j] = |W[i, j]| ||X[:, j]|| of all linear layers of a block in the dense
model. An outlier is a score above M times their mean; D is the share of outliers. A
block keeps more weights if its D is larger. As in the authors' code, over all blocks

    1 - S_l = (1 - S) + 2 lambda (d_l - mean(d)),   d = (D - min(D)) / (max(D) - min(D)).

If S +- 2 lambda would leave [0, 1], lambda is smaller. In N:M patterns N differs, by whole
numbers: the authors use 2 lambda = 2 for N of 8. Here the remainders of rounding are distributed
so that no more weights are pruned than with N everywhere. Blocks are compared, whose layers all
share one sparsity, and the mean is weighted by size.
Run: `python main.py ... --sparsity_ratio 0.7 --allocation owl`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import floor, prod
from typing import Any

import torch
from torch import Tensor

from ..methods.sparsity import Sparsity
from ..methods.wanda import Wanda
from ..model.blocks import BlockRunner
from ..model.linears import experts_implementation
from .block_inputs import BlockInputs
from .inputs import Group, first_names

OUTLIER = 5.0  # M: the smallest outlier, as a multiple of the mean
SPREAD = 0.08  # lambda
COUNT_SPREAD = 1.0  # lambda in weights per group, for N:M


@torch.no_grad()
def by_outliers(
    runner: BlockRunner,
    windows: Tensor,
    sparsity: Sparsity,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> dict[str, Sparsity]:
    """Return the sparsity of every layer by name, from windows (n, tokens) in the dense model.

    `on_progress(1)` is called after each block.
    """
    first = first_names(runner)
    shares: dict[int, float] = {}  # D, by block
    sizes: dict[int, int] = {}  # weights that no earlier block shares
    block_of: dict[str, int] = {}
    with experts_implementation(runner.model, "eager"):
        inputs = BlockInputs(runner, windows, Wanda)
        for index in range(len(runner.blocks)):
            with runner.on_device(index):
                inputs.begin(index)
                linears = runner.linears(index)
                [groups] = inputs.observe(linears)
                reached = [group for group in groups if group.method.tokens]
                if reached:
                    shares[index] = outlier_share(partial(_scores, reached))
                    sizes[index] = sum(prod(o.shape) for o in linears if first[o.name] == o.name)
                    block_of |= {one.name: block_of.get(first[one.name], index) for one in linears}
                inputs.advance_()
            on_progress(1)
    each = owl_sparsities([*shares.values()], [*sizes.values()], sparsity)
    chosen = dict(zip(shares, each, strict=True))
    return {name: chosen.get(block_of.get(name), sparsity) for name in first}


def _scores(groups: list[Group]) -> Iterator[Tensor]:
    """Yield Wanda's scores (out, in) of every layer; one of them is in memory at a time."""
    for group in groups:
        for linear in group.linears:
            yield linear.matrix().abs_().mul_(group.method.square_sum.sqrt().float())


def outlier_share(scores: Callable[[], Iterable[Tensor]]) -> float:
    """Return D: the share of scores, which `scores()` yields, above OUTLIER times their mean."""
    sums = [(score.sum(dtype=torch.float64), score.numel()) for score in scores()]
    total, count = (float(sum(each)) for each in zip(*sums, strict=True))
    above = sum((score > OUTLIER * total / count).count_nonzero() for score in scores())
    return float(above) / count


def owl_sparsities(shares: list[float], sizes: list[int], sparsity: Sparsity) -> list[Sparsity]:
    """Return the sparsity of blocks with these sizes (in weights) and shares of outliers."""
    low, high, total = min(shares), max(shares), sum(sizes)
    ratio, m = sparsity.ratio, sparsity.m
    width = COUNT_SPREAD / m if m else min(SPREAD, ratio / 2, (1 - ratio) / 2)
    kept = [2 * width * (share - low) / (high - low or 1) for share in shares]
    mean = sum(more * size for more, size in zip(kept, sizes, strict=True)) / total
    ratios = [ratio - more + mean for more in kept]
    if not m:
        return [Sparsity(each) for each in ratios]
    wanted = [each * m for each in ratios]
    counts = [floor(each + 1e-9) for each in wanted]
    left = sparsity.n * total - sum(n * size for n, size in zip(counts, sizes, strict=True))
    for block in sorted(range(len(counts)), key=lambda block: counts[block] - wanted[block]):
        if sizes[block] <= left and counts[block] < wanted[block]:
            counts[block] += 1
            left -= sizes[block]
    return [Sparsity(n / m, n, m) for n in counts]
