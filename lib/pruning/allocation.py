"""How sparse each linear becomes, at an equal total: by what its errors do to the predictions.

An error in an output i of a linear costs F_i times its square (lib/pruning/sensitivity.py). With
inputs taken as uncorrelated, as Wanda takes them, dropping W_ij costs F_i W_ij^2 |X_j|^2: so much
for a linear's lowest costs up to a share s of its weights, summed, is D(s). A method that adjusts
the weights it keeps does better than that, the better the more it keeps: at the sparsity asked
for, r, its error is taken to be D(r), and to grow from there as

    C(s) = D(r) (D(s) / D(r))^GROWTH.

Wanted are the s of all linears that minimise the sum of C(s), with as many zeros in all. Both are
sums over linears, so that for a price of a zero every linear decides alone; the price is found by
bisection. What layers make of the errors of layers before them is left to F, which is measured in
the dense model; so no linear goes too far from r.

LSA (Yang et al., ICLR 2026) allocates by the reconstruction errors of layers, which do not tell
what later layers make of them. The diagonal of Fisher's information is as in GroupFisher (Liu et
al. 2021, arXiv 2108.00708) and Guided quantisation (Kim et al. 2025, arXiv 2505.07004).
Run: `python main.py ... --sparsity_ratio 0.7 --allocation error`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lib.distributed.context import DistContext
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.linears import eager_experts
from lib.pruning.inputs import first_names
from lib.pruning.observe import own_windows
from lib.pruning.sensitivity import Sensed, WayBack

GROWTH = 2.0
DOWN = 0.4  # a linear's sparsity is at most so much below the mean, before the total is set right,
LEAST = 1 / 3  # and it keeps at least this share of what it would have kept
STEPS = 200  # of the span, between which sparsities are chosen
WINDOWS = 8  # that go through the model and back
ROUNDS = 60  # of bisection
FAINT = 1e-12  # of all of a linear's cost


@dataclass
class Part:
    """A linear, its weights, and its cost at each sparsity of the span (STEPS + 1,)."""

    name: str
    size: int
    cost: Tensor | float = 0.0


def by_error(
    runner: BlockRunner,
    windows: Tensor,
    batch_size: int,
    ratio: float,
    dist: DistContext,
    state_device: torch.device | str = "cpu",
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda blocks: None,
) -> dict[str, Sparsity]:
    """The sparsity of each linear by name, with what its rows count, from the dense model.

    Reads the first of windows (n, tokens). `state_device`: where hidden states are kept. `seed`:
    draws
    labels. `on_progress(1)` is called after each block, on the way there and on the way back.
    """
    windows = windows[:WINDOWS]
    draw = torch.Generator().manual_seed(seed)
    chances, _ = own_windows(torch.rand(windows.shape, generator=draw), dist)
    mine, idle = own_windows(windows, dist)
    first = first_names(runner)
    parts: dict[str, Part] = {}
    slopes: dict[str, Tensor] = {}
    with eager_experts(runner.model):
        way = WayBack(runner, mine, batch_size, chances, state_device, on_progress)
        for index in reversed(range(len(runner.blocks))):
            with runner.on_device(index):
                linears = runner.linears(index)
                sensed = way.through(index, linears)
                _add_up_(list(sensed.values()), dist, idle)
                for linear in linears:
                    one, name = sensed[linear.name], first[linear.name]
                    if one.tokens:
                        part = parts.setdefault(name, Part(name, prod(linear.shape)))
                        part.cost = part.cost + costs(linear.matrix(), one, ratio)
                        slopes[name] = slopes.get(name, 0) + one.slopes / one.tokens
            on_progress(1)
    chosen = dist.all_gather_object(allocate(list(parts.values()), ratio))[0]
    return {
        name: Sparsity(chosen.get(own, ratio), rows=slopes.get(own)) for name, own in first.items()
    }


def _add_up_(sensed: list[Sensed], dist: DistContext, idle: bool) -> None:
    """Over all processes; `idle`: this one's windows are another's, and don't count."""
    for one in sensed if idle else ():
        one.inputs.zero_()
        one.slopes.zero_()
        one.tokens = 0
    counts = dist.all_gather_object([one.tokens for one in sensed])
    for one, count in zip(sensed, map(sum, zip(*counts, strict=True)), strict=True):
        one.tokens = count
    for handle in dist.all_reduce_([sums for one in sensed for sums in (one.inputs, one.slopes)]):
        handle.wait()


def costs(weight: Tensor, sensed: Sensed, ratio: float) -> Tensor:
    """C(s) of a matrix (out, in) over the span (STEPS + 1,), float64, on the host."""
    each = weight.float().square()
    each *= sensed.inputs.float()  # summed: an expert counts as often as it is asked
    each *= (sensed.slopes / sensed.tokens).float()[:, None]
    sums = each.flatten().sort().values.double().cumsum_(0)
    counts = torch.tensor([int(share * len(sums)) for share in (ratio, *span(ratio))])
    found = sums[(counts - 1).clamp_min(0).to(sums.device)].cpu() * (counts > 0)
    least = max(FAINT * float(sums[-1]), torch.finfo(torch.float64).tiny)
    usual, dropped = found[0].clamp_min(least), found[1:]
    return usual * (dropped / usual) ** GROWTH


def span(ratio: float) -> list[float]:
    """The sparsities to choose from."""
    low, high = max(0.0, ratio - DOWN), 1 - LEAST * (1 - ratio)
    return [low + (high - low) * step / STEPS for step in range(STEPS + 1)]


def allocate(parts: list[Part], ratio: float) -> dict[str, float]:
    """Sparsities by name that minimise the parts' cost; their mean, by weights, is `ratio`."""
    sizes = torch.tensor([part.size for part in parts], dtype=torch.float64)
    prices = torch.stack([part.cost for part in parts]) / sizes[:, None]  # (parts, STEPS + 1)
    choices = torch.tensor(span(ratio), dtype=torch.float64)

    def at(price: float) -> Tensor:
        """What each part takes where a zero is worth so much."""
        return choices[(prices - price * choices).argmin(1)]

    low, high = 0.0, float(prices.max() * STEPS / (choices[-1] - choices[0]).clamp_min(1e-9)) or 1.0
    for _ in range(ROUNDS):
        price = (low + high) / 2
        enough = (at(price) * sizes).sum() >= ratio * sizes.sum()
        low, high = (low, price) if enough else (price, high)
    found = at(high)
    found += ratio - (found * sizes).sum() / sizes.sum()
    return dict(zip((part.name for part in parts), found.clamp(0, 1).tolist(), strict=True))
