"""Choose the sparsity of each linear layer, at an equal total, by its effect on the predictions.

An error in output i of a linear layer costs F_i times its square (lib/calibration/fisher.py). If
inputs are taken as uncorrelated, as in Wanda, pruning W_ij costs F_i W_ij^2 |X_j|^2. D(s) is the
sum of the lowest of these costs, up to a share s of the layer's weights. A method that adjusts the
kept weights does better, and the more weights it keeps, the better. At the requested sparsity r its
error is taken to be D(r), and to grow from there as

    C(s) = D(r) (D(s) / D(r))^GROWTH.

The s of all layers minimize the sum of C(s) at the requested total number of zeros. Both are sums
over layers, so at a given price per zero each layer decides alone. Bisection finds the price.
F is measured in the dense model and ignores how later layers change the errors of earlier ones.
Therefore no layer's sparsity may differ too much from r.

LSA (Yang et al., ICLR 2026) allocates by the reconstruction errors of layers, which ignore the
effect of later layers. The diagonal Fisher information is as in GroupFisher (Liu et
al. 2021, arXiv 2108.00708) and guided quantization (Kim et al. 2025, arXiv 2505.07004).
Run: `python main.py ... --sparsity_ratio 0.7 --allocation error`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import PruningMethod
from ..methods.sparsity import ALLOCATIONS, Passes, Sparsity
from ..model.blocks import BlockRunner
from ..model.linears import experts_implementation, linears_of
from ..util.deterministic import deterministic
from ..util.errors import UserError, first_line
from ..util.resume import ALLOCATION
from .fisher import FisherDiagonal, backward_pass
from .inputs import first_names, rank_windows, weight_key
from .owl import by_outliers

GROWTH = 2.0
MAX_DECREASE = 0.4  # largest decrease of a layer's sparsity below r, before renormalization
LEAST_KEPT = 1 / 3  # least kept weights of a layer, relative to those at sparsity r
STEPS = 200  # intervals between the candidate sparsities
WINDOWS = 8  # calibration windows in the backward pass
ROUNDS = 60  # bisection steps
FAINT = 1e-12  # lower bound of a cost, relative to the layer's total cost
TOTAL_TOLERANCE = 1e-3  # allowed difference between the total of an allocation file and the request


@dataclass(frozen=True)
class Allocation:
    """The sparsity of each linear layer, by its full name.

    `output_costs`, if known: by the same names, the cost of a squared error in each of the
    layer's outputs (out,).
    """

    sparsity: dict[str, Sparsity]
    output_costs: dict[str, Tensor] = field(default_factory=dict)


def uniform(runner: BlockRunner, sparsity: Sparsity) -> Allocation:
    """Give all linear layers of the blocks the same sparsity."""
    return Allocation(dict.fromkeys(first_names(runner), sparsity))


def by_error(
    runner: BlockRunner,
    windows: Tensor,
    ratio: float,
    seed: int = 0,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> Allocation:
    """Allocate by the dense model's predictions on the first of the windows (n, tokens).

    `seed` draws the labels. `on_progress(1)` is called after each block, in the forward pass and in
    the backward pass.
    """
    windows, dist = windows[:WINDOWS], runner.dist
    generator = torch.Generator().manual_seed(seed)
    uniforms, _ = rank_windows(torch.rand(windows.shape, generator=generator), dist)
    local, idle = rank_windows(windows, dist)
    first = first_names(runner)
    sizes: dict[str, int] = {}  # number of weights, by the first name
    weight_costs: dict[str, Tensor] = {}  # cost at each sparsity of the span (STEPS + 1,)
    output_costs: dict[str, Tensor] = {}  # (out,)
    with deterministic(runner.device, strict=False), experts_implementation(runner.model, "eager"):
        for diagonals in backward_pass(runner, local, uniforms, on_progress):
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
    """Return C(s) of a matrix (out, in) over the span (STEPS + 1,), float64, on the host."""
    each = weight.float().square()
    each *= diagonal.inputs.float()  # sums, not means: an expert counts in proportion to its use
    each *= (diagonal.grad_sq / diagonal.tokens).float()[:, None]
    lowest = each.flatten().sort().values
    # part by part, since one running sum over all weights is not reproducible on a GPU
    parts = lowest.tensor_split([int(share * len(lowest)) for share in span(ratio)])
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu().cumsum(0)
    least = max(FAINT * float(sums[-1]), torch.finfo(torch.float64).tiny)
    usual = lowest[: int(ratio * len(lowest))].sum(dtype=torch.float64).cpu().clamp_min(least)
    return usual * (sums[:-1] / usual) ** GROWTH


def span(ratio: float) -> list[float]:
    """Return the candidate sparsities."""
    low, high = max(0.0, ratio - MAX_DECREASE), 1 - LEAST_KEPT * (1 - ratio)
    return [low + (high - low) * step / STEPS for step in range(STEPS + 1)]


def choose(costs: dict[str, Tensor], sizes: dict[str, int], ratio: float) -> dict[str, float]:
    """Return {name: sparsity} that minimizes the sum of `costs`; the mean, by size, is `ratio`."""
    size = torch.tensor([sizes[name] for name in costs], dtype=torch.float64)
    prices = torch.stack(list(costs.values())) / size[:, None]  # (n, STEPS + 1)
    choices = torch.tensor(span(ratio), dtype=torch.float64)

    def at(price: float) -> Tensor:
        """Return the choice of each weight matrix at this price per zero (n,)."""
        return choices[(prices - price * choices).argmin(1)]

    low, high = 0.0, float(prices.max() * STEPS / (choices[-1] - choices[0]).clamp_min(1e-9)) or 1.0
    for _ in range(ROUNDS):
        price = (low + high) / 2
        enough = (at(price) * size).sum() >= ratio * size.sum()
        low, high = (low, price) if enough else (price, high)
    chosen = at(high)
    chosen += ratio - (chosen * size).sum() / size.sum()
    return dict(zip(costs, chosen.clamp(0, 1).tolist(), strict=True))


def allocate(
    runner: BlockRunner,
    windows: Tensor | None,
    sparsity: Sparsity,
    rule: str = "uniform",
    seed: int = 0,
    on_progress: Callable[[int], Any] = lambda blocks: None,
    method: type[PruningMethod] = PruningMethod,
) -> Allocation:
    """Choose the sparsity of each linear layer: by a rule at an equal total, or from a file.

    A resumed run uses its stored allocation (`kept_allocation`). If the method needs gradients,
    the costs of errors in outputs are computed too, which rule `error` always does.
    `on_progress(1)` is called for each block in each of the `Passes`.
    """
    allocation, passes = uniform(runner, sparsity), Passes.of(rule, method)
    if passes.outliers:
        allocation = Allocation(by_outliers(runner, windows, sparsity, on_progress))
    elif rule not in ALLOCATIONS:
        allocation = Allocation(read_layers(rule, runner.blocks, runner.name, sparsity))
    if passes.gradients:
        measured = by_error(runner, windows, sparsity.ratio, seed, on_progress)
        layers = measured.sparsity if rule == "error" else allocation.sparsity
        allocation = Allocation(layers, measured.output_costs)
    if passes.count:
        keep_allocation(runner, allocation)
    return allocation


def read_layers(
    file: str, blocks: nn.ModuleList, blocks_name: str, sparsity: Sparsity
) -> dict[str, Sparsity]:
    """Return the sparsity of every linear layer by name, from a JSON file {name: share of zeros}.

    The blocks need no weights. Raises UserError if the file does not fit them, the N:M pattern, or
    the total.
    """
    flag = f"{{--allocation}} {file}"
    try:
        shares = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        problem = f"it is not JSON ({first_line(error)})"
        raise UserError(flag, problem, "Name another") from error
    linears = linears_of(blocks, blocks_name)
    names, m = [linear.name for linear in linears], sparsity.m
    if not isinstance(shares, dict) or set(shares) != set(names):
        shares = shares if isinstance(shares, dict) else {}
        wrong = next((name for name in names if name not in shares), None)
        problem = f"lacks {wrong}" if wrong else f"names {next(iter(set(shares) - set(names)))}"
        raise UserError(flag, f"it {problem}", "Give {layer: share of zeros} of this model")
    for name, share in shares.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share < 1 or (m and share * m != int(share * m)):
            must = f"a multiple of 1/{m}" if m else "a number"
            fix = f"Give {must} of at least 0 and below 1"
            raise UserError(flag, f"{name} is {share!r}", fix)
    sizes = {weight_key(one): (shares[one.name], prod(one.shape)) for one in reversed(linears)}
    total = sum(size for _, size in sizes.values())
    mean = sum(share * size for share, size in sizes.values()) / total
    if abs(mean - sparsity.ratio) > TOTAL_TOLERANCE:
        asked = f"{{--sparsity_ratio}} is {sparsity.ratio:g}"
        problem = f"it prunes {mean:.4g} of all weights, but {asked}"
        raise UserError(flag, problem, "Make them equal")
    if m:
        return {name: Sparsity(share, int(share * m), m) for name, share in shares.items()}
    return {name: Sparsity(float(share)) for name, share in shares.items()}


def keep_allocation(runner: BlockRunner, allocation: Allocation) -> None:
    """Write an allocation to the files of --resume."""
    if runner.weights.finished:
        sparsity = {name: [*vars(each).values()] for name, each in allocation.sparsity.items()}
        runner.weights.finished.write(ALLOCATION, allocation.output_costs, {"sparsity": sparsity})


def kept_allocation(runner: BlockRunner) -> Allocation | None:
    """Return the allocation that `keep_allocation` wrote in an interrupted run, or None.

    Finished and remaining blocks then fit together. Every process has to call this."""
    kept = runner.weights.read_kept(ALLOCATION)
    if kept is None:
        return None
    costs, facts = kept
    sparsity = {name: Sparsity(*each) for name, each in facts["sparsity"].items()}
    return Allocation(sparsity, dict(costs))
