"""Choose llama.cpp's type of each tensor for a file of a given size, by its effect on predictions.

An error D in a matrix costs 1/2 sum_ij D_ij^2 M_ij, where M_ij is the sum of (g_i x_j)^2 over
tokens, with inputs x and slopes g of the loss (fisher.py). M is taken to be the product of its sums
over outputs and the outputs' shares of |g|^2: large inputs may have small slopes, such as those of
the first token. D is the distance from the type's grid, to which some rows are rounded; an error
relative to the matrix is taken to be alike in all rows. A row of an embedding counts as often as
its token occurs, and costs as much as an error in the states before the first block. A head's
outputs are the logits. Error compensation lowers the errors of linear layers and of the head, but
not those of an embedding.

A tensor's types form a curve of cost by size, of which only the lower convex hull is used. All
tensors begin with their smallest type. Larger ones follow in the order of saved cost per byte, as
long as they fit (the greedy solution of the knapsack problem).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.registry import GRIDS, TYPES
from ..model.blocks import BlockRunner, HiddenStates
from ..model.linears import experts_implementation, linears_of, watch_outputs
from ..model.matrix import PrunableLinear
from ..util.deterministic import deterministic
from ..util.errors import UserError, first_line
from .allocation import WINDOWS
from .fisher import FisherDiagonal, backward_pass, empty_diagonal, seeing
from .inputs import rank_windows

CHUNK = 2**13  # rows of a table that are processed at a time
SAMPLED = 64  # rows that show the error of a matrix
COMPENSATED = 0.5  # error of a linear layer's outputs relative to rounding to nearest
Costs = dict[str, dict[str, float]]  # {tensor: {type: nats, or bytes}}


def sizes_of(model: nn.Module, blocks_name: str, rows: int) -> Costs:
    """Return the bytes of every type that a tensor may have; tables get so many rows.

    The model needs no weights.
    """
    sizes: Costs = {}
    every = {id(weight): name for name, weight in reversed([*model.named_parameters()])}
    for linear in linears_of(model.get_submodule(blocks_name), blocks_name):
        parameter = getattr(linear.module, linear.parameter)
        name = every[id(parameter)]
        sizes[name] = _sizes(name, parameter.numel(), linear.shape[1], "layers")
    for name, table in tables_of(model).items():
        sizes[name] = _sizes(name, rows * table.shape[1], table.shape[1], "tables")
    return {name: types for name, types in sizes.items() if types}


def _sizes(name: str, count: int, width: int, to: str) -> dict[str, float]:
    fitting = (form for form in TYPES.values() if form.of(name, width) is form)
    offered = [form for form in fitting if to in form.offered]
    offered.sort(key=lambda form: form.bits_per_weight)
    return {form.name: count * form.bits_per_weight / 8 for form in offered}


def measure(
    runner: BlockRunner,
    windows: Tensor,
    sizes: Costs,
    seed: int = 0,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> Costs:
    """Return what each type of the tensors in `sizes` costs, in nats over all tokens.

    The first of the windows (n, tokens) are used; `seed` draws labels. `on_progress(1)` is called
    after each block, forward and back.
    """
    windows, dist, model = windows[:WINDOWS], runner.dist, runner.model
    generator = torch.Generator().manual_seed(seed)
    uniforms, _ = rank_windows(torch.rand(windows.shape, generator=generator), dist)
    local, idle = rank_windows(windows, dist)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first: dict[int, str] = {}  # a parameter has one type, however many names it has
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first.setdefault(id(each), name) for name, each in every}
    table = embedding.weight
    slopes = torch.zeros(table.shape[1], dtype=torch.float64, device=runner.device)
    seen = torch.zeros(len(table), dtype=torch.float64, device=runner.device)  # by token

    def at_start(states: HiddenStates, gradient: Tensor) -> None:
        for batch in states.batches:
            ids = states.windows[batch].to(table.device)
            growth = states.hidden[batch].float().norm() / table[ids].float().norm()
            slope = gradient[batch].float() * growth  # some models scale their embeddings
            slopes.add_(slope.square().sum((0, 1), dtype=torch.float64))
            seen.add_(torch.bincount(ids.flatten(), minlength=len(table)))

    logits = PrunableLinear("head", head)
    of_head = {logits: empty_diagonal(logits, runner.device)}
    found: Costs = {}

    def add(name: str, matrix: Tensor, sums: FisherDiagonal, share: float = 1.0) -> None:
        costs = found.setdefault(name, {})
        for kind, cost in rounding_costs(matrix, sums, sizes.get(name, ())).items():
            costs[kind] = costs.get(kind, 0.0) + share * cost

    with (
        deterministic(runner.device, strict=False),
        experts_implementation(model, "eager"),
        watch_outputs([logits], seeing(of_head)),
    ):
        for diagonals in backward_pass(runner, local, uniforms, on_progress, at_start):
            dist.sum_([each for one in diagonals.values() for each in vars(one).values()], idle)
            for linear, sums in diagonals.items():
                add(names[linear.parameter_name], linear.matrix(), sums, COMPENSATED)
    by_head = of_head[logits]
    dist.sum_([*vars(by_head).values(), slopes, seen], idle)
    add(first[id(head.weight)], head.weight, by_head, COMPENSATED)
    inputs = by_head.inputs if head.weight is table else torch.ones_like(slopes)
    add(first[id(table)], table, FisherDiagonal(inputs, seen, seen.sum(), slopes))
    return dist.all_gather_object(found)[0]


def rounding_costs(matrix: Tensor, sums: FisherDiagonal, kinds: Iterable[str]) -> dict[str, float]:
    """Return the nats that rounding a matrix (out, in) to each type costs, over all tokens."""
    least = torch.finfo(torch.float32).tiny
    inputs, weighted = sums.inputs.float(), sums.weighted.float()
    outputs = (sums.grad_sq / sums.grad_sq.sum().clamp_min(least)).float()
    parts = zip(outputs.split(CHUNK), matrix.split(CHUNK), strict=True)
    each = (out @ (part.float().square().to(out.device) @ weighted) for out, part in parts)
    whole = sum(map(float, each))
    rows = matrix[:: -(-len(matrix) // SAMPLED)].float().to(inputs.device)
    total = (rows.square() @ weighted).sum().clamp_min(least)
    found = {}
    for kind in kinds:
        form = TYPES[kind]
        values = form.round_to(rows, form.fit_scales(rows, inputs))
        error = ((values - rows).square() @ weighted).sum() / total
        found[kind] = whole * float(error) / 2
    return found


def choose(costs: Costs, sizes: Costs, budget: float) -> dict[str, str]:
    """Return {tensor: type} for a budget of bytes; the smallest types if even they exceed it."""
    chosen, steps, left = {}, [], budget
    for name, size in sizes.items():
        cost = dict.fromkeys(size, 0.0) | costs.get(name, {})  # no token reached it
        kind = chosen[name] = min(size, key=size.get)
        left -= size[kind]
        while True:  # to the next corner of the lower convex hull
            prices = {
                each: (cost[kind] - cost[each]) / (size[each] - size[kind])
                for each in size
                if size[each] > size[kind] and cost[each] < cost[kind]
            }
            if not prices:
                break
            larger = max(prices, key=prices.get)
            steps.append((prices[larger], size[larger] - size[kind], name, larger))
            kind = larger
    full = set()  # tensors whose next type does not fit
    for _, more, name, kind in sorted(steps, reverse=True):
        if name in full or more > left:
            full.add(name)
        else:
            chosen[name], left = kind, left - more
    return chosen


def read_types(file: str, model: nn.Module, blocks_name: str) -> dict[str, str]:
    """Return {tensor: type} of a JSON file for a model, whose weights are not read.

    Raises UserError if it names another tensor or type, or one that the rows do not fit.
    """
    flag = f"--quantize {file}"
    try:
        types = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        problem = f"it is not JSON ({first_line(error)})"
        raise UserError(flag, problem, "Name another") from error
    widths = {
        linear.parameter_name: linear.shape[1]
        for linear in linears_of(model.get_submodule(blocks_name), blocks_name)
    } | {name: weight.shape[1] for name, weight in tables_of(model).items()}
    fix = "Give {tensor: type} of this model"
    if not isinstance(types, dict) or not types:
        raise UserError(flag, "it holds no {tensor: type}", fix)
    for name, kind in types.items():
        if name not in widths:
            raise UserError(flag, f"it names {name}, which is no linear layer or table", fix)
        if kind not in TYPES:
            raise UserError(flag, f"{name} is {kind!r}", f"Give one of {', '.join(TYPES)}")
        if kind in GRIDS and GRIDS[kind].of(name, widths[name]) is not GRIDS[kind]:
            problem = f"{name} has rows of {widths[name]}, which {kind} does not fit"
            raise UserError(flag, problem, "Give another type")
    return types


def tables_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model's embedding and, if it is another one, of its head, by name."""
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(module.weight) for module in modules if module is not None}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in tables}
