"""How sparse each block becomes, at an equal total: more is kept where outliers are.

OWL (Yin et al. 2023, arXiv 2310.05175): D_l is the share of block l's Wanda scores that exceed
M times their mean, in the dense model. The blocks' sparsities follow D, the more outliers the
lower, within an interval of 2 lambda, and average, weighted by size, to the requested ratio. The
paper's lambda = 0.08 and M = 5. Run: `python main.py ... --sparsity_ratio 0.7 --allocation owl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from lib.distributed.context import DistContext
from lib.methods.registry import MethodSpec
from lib.methods.sparsity import ALLOCATION_SPAN
from lib.model.blocks import BlockRunner
from lib.model.linears import eager_experts
from lib.pruning.inputs import Group, first_names
from lib.pruning.observe import observe_together, own_windows

OUTLIER = 5  # M: times the mean score


@torch.no_grad()
def owl(
    runner: BlockRunner,
    windows: Tensor,
    batch_size: int,
    ratio: float,
    dist: DistContext,
    state_device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The sparsity of each block, from the dense model's scores on windows (n, tokens).

    A weight that blocks share counts in the first of them, where it is pruned. `state_device`:
    where hidden states are kept. `on_progress(1)` is called after each block.
    """
    method_spec, shares, sizes = MethodSpec("wanda"), [], []
    own, idle = own_windows(windows, dist)
    first = first_names(runner)
    with eager_experts(runner.model):
        states = runner.capture(own, batch_size, state_device)
        for index in range(len(runner.blocks)):
            with runner.on_device(index):
                linears = runner.linears(index)
                groups = observe_together(
                    runner, states, index, linears, method_spec=method_spec, dist=dist, idle=idle
                )
                shares.append(outlier_share(groups))
                pruned_here = (one for one in linears if first[one.name] == one.name)
                sizes.append(sum(prod(linear.shape) for linear in pruned_here))
                if index + 1 < len(runner.blocks):
                    runner.advance_(states, index)
            states.block_args[index] = []
            if on_progress:
                on_progress(1)
    return interpolate(shares, sizes, ratio)


def outlier_share(groups: Sequence[Group]) -> float:
    """Share of all Wanda scores of the groups' linears that exceed OUTLIER times their mean."""
    total, count, above = 0.0, 0, 0
    for group in groups:
        for linear in group.linears:
            total += group.method.score(linear.matrix()).sum(dtype=torch.float64).item()
            count += prod(linear.shape)
    if not total:  # no token reached the block, or all of its inputs are zero
        return 0.0
    for group in groups:
        for linear in group.linears:
            score = group.method.score(linear.matrix())
            above += int((score > OUTLIER * total / count).count_nonzero())
    return above / count


def interpolate(shares: Sequence[float], sizes: Sequence[int], ratio: float) -> list[float]:
    """Sparsities with mean `ratio`, weighted by `sizes`, falling linearly with `shares`."""
    low, high = min(shares), max(shares)
    if high == low:
        return [ratio] * len(shares)
    below = [ALLOCATION_SPAN * (share - low) / (high - low) for share in shares]
    mean = sum(b * size for b, size in zip(below, sizes, strict=True)) / sum(sizes)
    return [ratio + mean - b for b in below]
