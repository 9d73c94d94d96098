"""How sparse attention and MLP of each block become, at an equal total: by the error that it costs.

What pruning breaks in a block counts for what is left of it at the end of the model. So it is
measured there: in the dense model, of one part after another (the attention of a block, or its
MLP), the weights that Wanda would drop go, a few windows run on to the last block, and

    E_p = mean over tokens of |change of the last hidden state|^2 / |last hidden state|^2.

How the error grows with a part's sparsity s is told by Wanda's scores: the sum of the squares of
those dropped, W_ij^2 |X_j|^2, as if inputs were uncorrelated; d_p(s), summed over its linears, with
d_p = 1 at the sparsity asked for. Wanted are s_p that minimise the sum of E_p d_p(s_p), within SPAN
of what was asked, with as many zeros in all. Both are sums over parts, so that for a price of a
zero every part decides alone; the price is found by bisection.

Reconstruction errors inside a block, which LSA (Yang et al., ICLR 2026) allocates by, gave worse
models here: they do not tell what later blocks make of them.
Run: `python main.py ... --sparsity_ratio 0.7 --allocation error`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib.dist.team import Team
from lib.methods.registry import Recipe
from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda
from lib.model.blocks import BlockRunner, HiddenStates
from lib.model.linears import eager_experts, find_linears
from lib.pruning.inputs import Group
from lib.pruning.observe import observe_together, own_windows

SPAN = 0.1  # a part's sparsity is off the mean by at most so much, before the total is set right
STEPS = 200  # of the span, between which sparsities are chosen
WINDOWS = 4  # through the whole model, for each part of each block
ROUNDS = 60  # of bisection


@dataclass
class Part:
    """Linears of one block that become equally sparse, and what that costs.

    `growth` (STEPS + 1,): d_p over the span; `error`: E_p.
    """

    names: list[str]
    size: int
    growth: Tensor
    error: float = 0.0

    @property
    def cost(self) -> Tensor:
        return self.error * self.growth


@torch.no_grad()
def by_error(
    runner: BlockRunner,
    blocks_name: str,
    windows: Tensor,
    batch_size: int,
    ratio: float,
    team: Team,
    keep_on: torch.device | str = "cpu",
    advanced: Callable[[int], None] = lambda blocks: None,
) -> dict[str, Sparsity]:
    """The sparsity of each linear by name, from the dense model on windows (n, tokens).

    `keep_on`: where hidden states are kept. `advanced(1)` is called after each block.
    """
    mine, idle = own_windows(windows, team)
    probed, none = own_windows(windows[:WINDOWS], team)
    names: list[str] = []
    parts: list[Part] = []
    streams: list[HiddenStates] = []  # of the parts that are behind: each with that part pruned
    with eager_experts(runner.model):
        states = runner.capture(mine, batch_size, keep_on)
        probe = runner.capture(probed, batch_size, keep_on)
        for index, block in enumerate(runner.blocks):
            with runner.at_hand(index):
                prefix = f"{blocks_name}.{index}"
                linears, _ = find_linears(block, prefix)
                names += [linear.name for linear in linears]
                groups = observe_together(
                    runner, states, index, linears, Recipe("wanda"), team, idle
                )
                for stream in streams:
                    runner.advance_(stream, index)
                for part, pruned in _parts(groups, block, prefix, ratio):
                    stream = replace(probe, hidden=runner.transfer.copy(probe.hidden))
                    runner.advance_(stream, index, pruned)
                    parts.append(part)
                    streams.append(stream)
                runner.advance_(probe, index)
                runner.advance_(states, index)
            states.calls[index] = probe.calls[index] = []
            advanced(1)
    found = [0.0 if none else _change(stream.hidden, probe.hidden) for stream in streams]
    for part, errors in zip(parts, zip(*team.gathered(found), strict=True), strict=True):
        part.error = sum(errors)
    chosen = allocate(parts, ratio)
    return {name: Sparsity(chosen.get(name, ratio)) for name in names}


def _parts(
    groups: list[Group], block: nn.Module, prefix: str, ratio: float
) -> Iterator[tuple[Part, nn.Module]]:
    """The parts of a block, each with a copy of the block in which it is pruned."""
    wanda: dict[str, Wanda] = {
        linear.name: group.method for group in groups for linear in group.linears
    }
    members: dict[str, list[str]] = {}
    for name in wanda:
        members.setdefault(name.removeprefix(f"{prefix}.").partition(".")[0], []).append(name)
    for names in members.values():
        pruned = copy.deepcopy(block)
        growth = torch.zeros(STEPS + 1, dtype=torch.float64)
        size = 0
        for linear in find_linears(pruned, prefix)[0]:
            if linear.name not in names:
                continue
            weight = linear.matrix()
            score = wanda[linear.name].score(weight)
            growth += dropped(score, ratio)
            size += score.numel()
            linear.store_(linear.wire(weight.masked_fill_(Sparsity(ratio).mask(score), 0)))
        growth /= growth[STEPS // 2].clamp_min(torch.finfo(torch.float64).tiny)
        yield Part(names, size, growth), pruned


def dropped(score: Tensor, ratio: float) -> Tensor:
    """Sum of the squares of the lowest scores (out, in), for STEPS + 1 shares around `ratio`."""
    squares = score.flatten().sort().values.double().square()
    sums = torch.cat([squares.new_zeros(1), squares.cumsum(0)]).cpu()
    return sums[[int(share * score.numel()) for share in span(ratio)]]


def span(ratio: float) -> list[float]:
    """The sparsities to choose from; the middle one is `ratio`."""
    return [ratio + SPAN * (2 * step / STEPS - 1) for step in range(STEPS + 1)]


def _change(hidden: Tensor, dense: Tensor) -> float:
    """Sum over tokens of the square of a stream's change, as a share of the stream's."""
    error, whole = (hidden.float() - dense.float()).square().sum(-1), dense.float().square().sum(-1)
    return (error.double() / whole.double()).sum().item()


def allocate(parts: list[Part], ratio: float) -> dict[str, float]:
    """Sparsities by linears' names that minimise the parts' error; their mean is `ratio`."""
    sizes = torch.tensor([part.size for part in parts], dtype=torch.float64)
    costs = torch.stack([part.cost for part in parts])  # (parts, STEPS + 1)
    choices = torch.tensor(span(ratio), dtype=torch.float64)

    def at(price: float) -> Tensor:
        """What each part takes where a zero of all weights is worth so much."""
        return choices[(costs - price * sizes[:, None] * choices).argmin(1)]

    low = 0.0
    high = float((costs[:, -1] / sizes).max() * STEPS / SPAN) or 1.0
    for _ in range(ROUNDS):
        price = (low + high) / 2
        enough = (at(price) * sizes).sum() >= ratio * sizes.sum()
        low, high = (low, price) if enough else (price, high)
    found = at(high)
    found += ratio - (found * sizes).sum() / sizes.sum()
    shares = zip(parts, found.tolist(), strict=True)
    return {name: share for part, share in shares for name in part.names}
