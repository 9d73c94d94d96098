"""Linears that share an input, with the statistics of it: the unit that is observed and solved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from lib.methods.base import PruningMethod
from lib.methods.magnitude import Magnitude
from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda
from lib.model.blocks import BlockRunner
from lib.model.linears import find_linears
from lib.model.matrix import PrunableLinear
from lib.util.errors import UserError


@dataclass
class Group:
    """Linears that share an input, and the method's statistics of that input."""

    linears: list[PrunableLinear]
    method: PruningMethod

    @property
    def names(self) -> str:
        return ", ".join(linear.name for linear in self.linears)

    @property
    def width(self) -> int:
        return self.linears[0].shape[1]

    @property
    def cost(self) -> float:
        """What solving it costs, up to a factor: one factorisation, then every row against it."""
        return self.width**2 * (self.width + sum(linear.shape[0] for linear in self.linears))

    def reset_(self) -> None:
        for statistic in self.method.statistics():
            statistic.zero_()
        self.method.tokens = 0

    @property
    def fallback(self) -> str | None:
        """The simpler method by which an expert is pruned that saw too few tokens, or None.

        No token: by magnitude. Fewer than it has inputs: X^T X is singular and what is read from
        its inverse is mostly damping, so Wanda's score is taken, from X^T X's diagonal.
        """
        if self.linears[0].expert is None:
            return None
        if self.method.tokens == 0:
            return "magnitude"
        few = self.method.inverts_gram and self.method.tokens < self.width
        return "wanda" if few else None

    def solver(self) -> PruningMethod:
        """The method that prunes the group: its own, or the fallback with the same statistics."""
        if self.fallback == "magnitude":
            return Magnitude(self.width, torch.device("cpu"))
        if self.fallback == "wanda":
            wanda = Wanda(self.width, self.method.device)
            wanda.square_sum = self.method.square_sums().clone()
            return wanda
        return self.method


def merge(
    groups: list[Group],
    stage: list[PrunableLinear],
    method: type[PruningMethod],
    runner: BlockRunner,
) -> list[Group]:
    """The groups that any process has, in one order, with empty statistics where this one lacks it.

    Experts of `stage` that no token reached get a group too. UserError where none was reached.
    """
    own = {group.names: group for group in groups}
    by_name = {linear.name: linear for linear in stage}
    members: dict[str, list[str]] = {}
    tokens: Counter = Counter()
    for of_process in runner.dist.all_gather_object(
        [([linear.name for linear in group.linears], group.method.tokens) for group in groups]
    ):
        for names, count in of_process:
            members.setdefault(", ".join(names), names)
            tokens[", ".join(names)] += count
    reached = {name for names in members.values() for name in names}
    experts = [linear.name for linear in stage if linear.expert is not None]
    if experts and not reached.intersection(experts):
        raise UserError(
            f"{experts[0]} and all experts beside it: no calibration token was routed to them; "
            "use more or other text (--calibration_data, --nsamples)"
        )
    members |= {name: [name] for name in experts if name not in reached}
    merged = []
    for key, names in members.items():
        linears = [by_name[name] for name in names]
        group = own.get(key) or Group(linears, method(linears[0].shape[1], runner.device))
        group.method.tokens = tokens[key]
        merged.append(group)
    return merged


class SharedWeights:
    """Weights that several blocks share: each is pruned once, where tokens reach it first."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        count = Counter(id(p) for block in blocks for p in block.parameters())
        self.shared = {key for key, times in count.items() if times > 1}
        self.pruned: set[tuple[int, int | None]] = set()

    def is_pruned(self, linear: PrunableLinear) -> bool:
        return weight_key(linear) in self.pruned

    def mark_pruned(self, linear: PrunableLinear) -> None:
        if weight_key(linear)[0] in self.shared:
            self.pruned.add(weight_key(linear))


def weight_key(linear: PrunableLinear) -> tuple[int, int | None]:
    """A key that is equal for linears that share their weight, while their parameters exist."""
    return id(getattr(linear.module, linear.parameter)), linear.expert


def first_names(runner: BlockRunner) -> dict[str, str]:
    """{name of a linear: the first name of its weight}, which several blocks may share."""
    names: dict[tuple[int, int | None], str] = {}
    first = {}
    for index in range(len(runner.blocks)):
        for linear in runner.linears(index):
            first[linear.name] = names.setdefault(weight_key(linear), linear.name)
    return first


def check_widths(blocks: nn.ModuleList, blocks_name: str, sparsity: Sparsity) -> None:
    """UserError naming the first linear that can't carry the N:M pattern; needs no weights."""
    for index, block in enumerate(blocks) if sparsity.m else ():
        for linear in find_linears(block, f"{blocks_name}.{index}")[0]:
            if linear.shape[1] % sparsity.m:
                raise UserError(
                    f"--sparsity_type {sparsity.pattern}: {linear.name} has {linear.shape[1]} "
                    f"inputs, not a multiple of {sparsity.m}; use --sparsity_type unstructured"
                )
