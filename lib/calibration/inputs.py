"""Groups of linear layers that share an input, with its statistics.

Statistics belong to an input, not to a layer: q, k and v share one, gate and up another. A pass
over a block stops at the last input wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..methods.base import PruningMethod
from ..methods.magnitude import Magnitude
from ..methods.sparsity import Sparsity
from ..methods.wanda import Wanda
from ..model.blocks import BlockRunner, Stop
from ..model.linears import linears_of, watch_inputs
from ..model.matrix import PrunableLinear
from ..util.errors import UserError
from ..util.ranks import DistContext
from .output_error import TOKENS, TokenSample


@dataclass
class Group:
    """Linear layers that share an input, and the method's statistics of that input.

    `sample`: this process's sample of tokens; `rows` (n, in): that of all processes.
    `output_squares`, if the method needs them: sums over outputs by layer (out,), float64.
    `name`: of a module of experts, a group without linear layers.
    """

    linears: list[PrunableLinear]
    method: PruningMethod
    sample: TokenSample = field(default_factory=TokenSample)
    rows: Tensor | None = None
    output_squares: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""

    def observe(self, x: Tensor, **target: Tensor) -> None:
        """Add x (tokens, in) to the sample and to the method's sums (lib/methods/base.py)."""
        self.method.observe(x, **target)
        self.sample.add(x)

    def observe_output(self, linear: PrunableLinear, x: Tensor) -> None:
        """Add the squares of a layer's outputs on x (tokens, in)."""
        sums = (x.float() @ linear.matrix().T).square().sum(0, dtype=torch.float64)
        self.output_squares[linear.name] = self.output_squares.get(linear.name, 0) + sums

    @property
    def names(self) -> str:
        return self.name or ", ".join(linear.name for linear in self.linears)

    @property
    def cost(self) -> float:
        """Cost of solving it, up to a factor: one factorization, then every row against it."""
        width = self.method.width
        return width**2 * (width + sum(linear.shape[0] for linear in self.linears))

    @property
    def fallback(self) -> str | None:
        """The simpler method for an expert that received too few tokens, or None.

        Without tokens: magnitude. With fewer tokens than inputs X^T X is singular, and its
        inverse mostly damping, so Wanda's score is used, from the diagonal of X^T X.
        """
        if not self.linears or self.linears[0].expert is None:
            return None
        if self.method.tokens == 0:
            return "magnitude"
        few = self.method.inverts_gram and self.method.tokens < self.method.width
        return "wanda" if few else None

    def solver(self) -> PruningMethod:
        """Return the method that prunes the group, or the fallback with the same statistics."""
        if self.fallback == "magnitude":
            return Magnitude(self.method.width, torch.device("cpu"))
        if self.fallback == "wanda":
            wanda = Wanda(self.method.width, self.method.device)
            wanda.square_sum = self.method.hessian.diagonal().clone()
            return wanda
        return self.method


def by_input(linears: list[PrunableLinear], run: Callable[[], object]) -> list[list[str]]:
    """Return the names of layers' parameters by the input that they receive in a pass, in order."""
    reached: list[tuple[Tensor, list[str]]] = []

    def see(linear: PrunableLinear, x: Tensor) -> None:
        if any(linear.parameter_name in names for _, names in reached):
            return
        names = next((names for tensor, names in reached if same(tensor, x)), None)
        if names is None:
            reached.append((x, [linear.parameter_name]))
        else:
            names.append(linear.parameter_name)

    with watch_inputs(linears, see), suppress(Stop):
        run()
    return [names for _, names in reached]


def rank_windows(windows: Tensor, dist: DistContext) -> tuple[Tensor, bool]:
    """Return this process's part of windows (n, tokens), and whether it is idle.

    An idle process has no windows and runs a dummy window, whose statistics are not counted.
    """
    local = windows[dist.shard(len(windows))]
    idle = not len(local)
    return windows[:1] if idle else local, idle


@torch.no_grad()
def observe(
    runner: BlockRunner,
    linears: list[PrunableLinear],
    method: type[PruningMethod],
    passes: Iterable[tuple[Callable[[], object], dict[str, Tensor]]],
    shared: bool = False,
) -> list[Group]:
    """Group the layers of one block that `passes` reach by shared input, with its statistics.

    A pass is a function that runs the block over a batch, and {layer's name: its input in the
    dense model}, if wanted. `shared`: all layers receive one input, which the first one shows.
    """
    groups: list[Group] = []
    group_of: dict[PrunableLinear, Group] = {}

    def add(linear: PrunableLinear, x: Tensor) -> None:
        group = group_of.get(linear)
        known = next((one for tensor, one in inputs if same(tensor, x)), None)
        if group is None:
            group = known or Group([], method(linear.shape[1], runner.device))
            if known is None:
                groups.append(group)
            group_of[linear] = group
            group.linears.append(linear)
        if known is not group:
            inputs.append((x, group))
            if linear is group.linears[0]:
                target = {"dense": rows(dense[linear.name])} if linear.name in dense else {}
                group.observe(rows(x), **target)
        if method.needs_outputs:
            group.observe_output(linear, rows(x))
        seen.add(linear)
        if len(seen) == len(linears):
            raise Stop

    def see(linear: PrunableLinear, x: Tensor) -> None:
        for receiver in linears if shared else [linear]:
            add(receiver, x)

    with watch_inputs(linears, see):
        for run, dense_inputs in passes:
            # per pass, since the memory of a previous pass may be in use again
            dense, inputs, seen = dense_inputs, [], set()
            with suppress(Stop):
                run()
    return groups


def merge(
    groups: list[Group],
    stage: list[PrunableLinear],
    method: type[PruningMethod],
    runner: BlockRunner,
    idle: bool,
) -> list[Group]:
    """Return the groups of all processes in one order, with sums over all that are not `idle`.

    Experts of `stage` that no token reached get a group too. Raises UserError if none was reached.
    """
    local = {tuple(linear.name for linear in group.linears): group for group in groups}
    by_name = {linear.name: linear for linear in stage}
    tokens: Counter[tuple[str, ...]] = Counter()  # by the names of layers
    counts = {names: 0 if idle else group.method.tokens for names, group in local.items()}
    for of_process in runner.dist.all_gather_object(counts):
        tokens.update(of_process)
    reached = {name for names in tokens for name in names}
    experts = [linear.name for linear in stage if linear.expert is not None]
    if experts and not reached.intersection(experts):
        raise UserError(
            f"{experts[0]} and all experts beside it",
            "no calibration token was routed to them",
            "Use more or other text ({--calibration_data}, {--nsamples})",
        )
    tokens.update({(name,): 0 for name in experts if name not in reached})
    merged = []
    for names, count in tokens.items():
        linears = [by_name[name] for name in names]
        group = local.get(names) or Group(linears, method(linears[0].shape[1], runner.device))
        group.method.tokens = count
        merged.append(group)
    runner.dist.sum_([sums for group in merged for sums in _sums(group, runner.dist)], idle)
    return merged


def _sums(group: Group, dist: DistContext) -> list[Tensor]:
    """Return the tensors that processes sum: statistics, and sample rows, each filling its own."""
    method, each = group.method, TOKENS // dist.size
    group.rows = torch.zeros(TOKENS, method.width, device=method.device)
    if group.sample.kept:
        local = group.sample.rows(each)
        group.rows[each * dist.rank :][: len(local)] = local
    for linear in group.linears if method.needs_outputs else ():
        zeros = torch.zeros(linear.shape[0], dtype=torch.float64, device=method.device)
        group.output_squares.setdefault(linear.name, zeros)
    return [*method.statistics(), group.rows, *group.output_squares.values()]


def weight_key(linear: PrunableLinear) -> tuple[int, int | None]:
    """Return a key equal for layers that share a weight, while their parameters exist."""
    return id(getattr(linear.module, linear.parameter)), linear.expert


def first_names(runner: BlockRunner) -> dict[str, str]:
    """Return {layer's name: the first name of its weight}, which several blocks may share."""
    names: dict[tuple[int, int | None], str] = {}
    first = {}
    for index in range(len(runner.blocks)):
        for linear in runner.linears(index):
            first[linear.name] = names.setdefault(weight_key(linear), linear.name)
    return first


def check_widths(blocks: nn.ModuleList, blocks_name: str, sparsity: Sparsity) -> None:
    """Raise UserError naming the first layer that cannot have the N:M pattern."""
    for linear in linears_of(blocks, blocks_name) if sparsity.m else ():
        if linear.shape[1] % sparsity.m:
            raise UserError(
                f"{{--sparsity_type}} {sparsity.n}:{sparsity.m}",
                f"{linear.name} has {linear.shape[1]} inputs, not a multiple of {sparsity.m}",
                "Use {--sparsity_type} unstructured",
            )


def rows(x: Tensor) -> Tensor:
    """Reshape (..., in) to (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two live tensors are the same view of the same memory."""
    return _place(a) == _place(b) and a.shape == b.shape and a.stride() == b.stride()


def _place(x: Tensor) -> Any:
    """Return what only tensors that begin in the same memory have in common."""
    if x.is_meta:  # without memory
        return StorageWeakRef(x.untyped_storage()), x.storage_offset()
    return x.data_ptr()
