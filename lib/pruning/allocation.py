"""How sparse each linear becomes, at an equal total: by what its errors do to the predictions.

An error in an output i of a linear costs F_i times its square (lib/pruning/fisher.py). With
inputs taken as uncorrelated, as Wanda takes them, dropping W_ij costs F_i W_ij^2 |X_j|^2. The
lowest of these costs, summed up to a share s of a linear's weights, are D(s). A method that adjusts
the weights it keeps does better than that, the better the more it keeps: at the requested sparsity
r its error is taken to be D(r), and to grow from there as

    C(s) = D(r) (D(s) / D(r))^GROWTH.

Wanted are the s of all linears that minimise the sum of C(s), with as many zeros in all. Both are
sums over linears, so that for a price of a zero every linear decides alone; the price is found by
bisection. What layers make of the errors of layers before them is left to F, which is measured in
the dense model; so no linear goes too far from r.

LSA (Yang et al., ICLR 2026) allocates by the reconstruction errors of layers, which ignore what
later layers make of them. The diagonal of Fisher's information is as in GroupFisher (Liu et
al. 2021, arXiv 2108.00708) and Guided quantization (Kim et al. 2025, arXiv 2505.07004).
Run: `python main.py ... --sparsity_ratio 0.7 --allocation error`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..methods.sparsity import Sparsity
from ..model.blocks import BlockRunner
from ..model.linears import experts_by
from ..model.run_folder import ALLOCATION
from ..util.deterministic import deterministic
from .fisher import FisherDiagonal, backward_pass
from .inputs import first_names, own_windows

GROWTH = 2.0
BELOW = 0.4  # a linear's sparsity is at most so much below r, before the total is set right,
LEAST_KEPT = 1 / 3  # and the linear keeps at least this share of what it would have kept
STEPS = 200  # of the span, between which sparsities are chosen
WINDOWS = 8  # that the backward pass takes
ROUNDS = 60  # of bisection
FAINT = 1e-12  # of all of a linear's cost


@dataclass(frozen=True)
class Allocation:
    """The sparsity of each linear, by its full name.

    `output_costs`, where they are known: by the same names, what the square of an error in each of
    a linear's outputs costs (out,).
    """

    sparsity: dict[str, Sparsity]
    output_costs: dict[str, Tensor] = field(default_factory=dict)


def uniform(runner: BlockRunner, sparsity: Sparsity) -> Allocation:
    """All linears of the blocks are as sparse."""
    return Allocation(dict.fromkeys(first_names(runner), sparsity))


def by_error(
    runner: BlockRunner,
    windows: Tensor,
    ratio: float,
    seed: int = 0,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> Allocation:
    """Allocate by the dense model's predictions on the first of windows (n, tokens).

    `seed`: draws labels. `on_progress(1)` is called after each block, in the forward pass and in
    the backward pass.
    """
    windows, dist = windows[:WINDOWS], runner.dist
    generator = torch.Generator().manual_seed(seed)
    uniforms, _ = own_windows(torch.rand(windows.shape, generator=generator), dist)
    own, idle = own_windows(windows, dist)
    first = first_names(runner)
    sizes: dict[str, int] = {}  # of weights, by their first name
    weight_costs: dict[str, Tensor] = {}  # at each sparsity of the span (STEPS + 1,)
    output_costs: dict[str, Tensor] = {}  # (out,)
    with deterministic(runner.device, strict=False), experts_by(runner.model, "eager"):
        for diagonals in backward_pass(runner, own, uniforms, on_progress):
            sums = [tensor for one in diagonals.values() for tensor in vars(one).values()]
            dist.sum_(sums, idle)
            for linear, diagonal in diagonals.items():
                if diagonal.tokens:
                    name = first[linear.name]
                    sizes[name] = prod(linear.shape)
                    cost = costs(linear.matrix(), diagonal, ratio)
                    weight_costs[name] = weight_costs.get(name, 0.0) + cost
                    mean = diagonal.grad_sq / diagonal.tokens
                    output_costs[name] = output_costs.get(name, 0) + mean
    ratios = dist.all_gather_object(choose(weight_costs, sizes, ratio))[0]
    return Allocation(
        {name: Sparsity(ratios.get(first[name], ratio)) for name in first},
        {name: output_costs[first[name]] for name in first if first[name] in output_costs},
    )


def costs(weight: Tensor, diagonal: FisherDiagonal, ratio: float) -> Tensor:
    """C(s) of a matrix (out, in) over the span (STEPS + 1,), float64, on the host."""
    each = weight.float().square()
    each *= diagonal.inputs.float()  # a sum: an expert counts as often as it is asked
    each *= (diagonal.grad_sq / diagonal.tokens).float()[:, None]
    sums = each.flatten().sort().values.double().cumsum_(0)
    counts = torch.tensor([int(share * len(sums)) for share in (ratio, *span(ratio))])
    at_counts = sums[(counts - 1).clamp_min(0).to(sums.device)].cpu() * (counts > 0)
    least = max(FAINT * float(sums[-1]), torch.finfo(torch.float64).tiny)
    usual, dropped = at_counts[0].clamp_min(least), at_counts[1:]
    return usual * (dropped / usual) ** GROWTH


def span(ratio: float) -> list[float]:
    """The sparsities to choose from."""
    low, high = max(0.0, ratio - BELOW), 1 - LEAST_KEPT * (1 - ratio)
    return [low + (high - low) * step / STEPS for step in range(STEPS + 1)]


def choose(costs: dict[str, Tensor], sizes: dict[str, int], ratio: float) -> dict[str, float]:
    """{name: sparsity} that minimises the sum of `costs`; the mean, by size, is `ratio`."""
    size = torch.tensor([sizes[name] for name in costs], dtype=torch.float64)
    prices = torch.stack(list(costs.values())) / size[:, None]  # (n, STEPS + 1)
    choices = torch.tensor(span(ratio), dtype=torch.float64)

    def at(price: float) -> Tensor:
        """What each weight chooses where a zero is worth so much (n,)."""
        return choices[(prices - price * choices).argmin(1)]

    low, high = 0.0, float(prices.max() * STEPS / (choices[-1] - choices[0]).clamp_min(1e-9)) or 1.0
    for _ in range(ROUNDS):
        price = (low + high) / 2
        enough = (at(price) * size).sum() >= ratio * size.sum()
        low, high = (low, price) if enough else (price, high)
    chosen = at(high)
    chosen += ratio - (chosen * size).sum() / size.sum()
    return dict(zip(costs, chosen.clamp(0, 1).tolist(), strict=True))


def keep_allocation(runner: BlockRunner, allocation: Allocation) -> None:
    """Write an allocation to the files of --resume."""
    if runner.weights.finished:
        ratios = {name: sparsity.ratio for name, sparsity in allocation.sparsity.items()}
        runner.weights.finished.write(ALLOCATION, allocation.output_costs, {"ratios": ratios})


def kept_allocation(runner: BlockRunner) -> Allocation | None:
    """What `keep_allocation` wrote in an interrupted run, so that blocks that it finished and those
    still to come fit together; None where it wrote nothing. Every process has to call this.
    """
    kept = runner.weights.read_kept(ALLOCATION)
    if kept is None:
        return None
    costs, facts = kept
    ratios = {name: Sparsity(ratio) for name, ratio in facts["ratios"].items()}
    return Allocation(ratios, dict(costs))
