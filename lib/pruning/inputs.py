"""Linears that share an input, with the statistics of it: the unit that is observed and solved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lib.distributed.context import DistContext
from lib.methods.magnitude import Magnitude
from lib.methods.registry import MethodSpec
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
    method: Any

    @property
    def names(self) -> str:
        return ", ".join(linear.name for linear in self.linears)

    @property
    def width(self) -> int:
        return self.linears[0].shape[1]

    @property
    def cost(self) -> float:
        """Of solving it, up to a factor: one factorisation, then every row against it."""
        return self.width**2 * (self.width + sum(linear.shape[0] for linear in self.linears))

    def forget_(self) -> None:
        """As if nothing had been observed."""
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
        hessian = any(statistic.dim() == 2 for statistic in self.method.statistics())
        return "wanda" if hessian and self.method.tokens < self.width else None

    def solver(self) -> Any:
        """What prunes the group: its method, or the fallback with the same statistics."""
        if self.fallback == "magnitude":
            return Magnitude(self.width, torch.device("cpu"))
        if self.fallback == "wanda":
            hessian = self.method.statistics()[0]
            wanda = Wanda(self.width, hessian.device)
            wanda.square_sum = hessian.diagonal().clone()
            return wanda
        return self.method


def merge(
    groups: list[Group],
    lot: list[PrunableLinear],
    method_spec: MethodSpec,
    device: torch.device,
    dist: DistContext,
) -> list[Group]:
    """The groups that any process has, in one order, with empty statistics where this one lacks it.

    Experts of `lot` that no token reached get a group too. UserError where none was reached.
    """
    mine = {group.names: group for group in groups}
    by_name = {linear.name: linear for linear in lot}
    members: dict[str, list[str]] = {}
    tokens: Counter = Counter()
    for found in dist.all_gather_object(
        [([one.name for one in group.linears], group.method.tokens) for group in groups]
    ):
        for names, count in found:
            members.setdefault(", ".join(names), names)
            tokens[", ".join(names)] += count
    reached = {name for names in members.values() for name in names}
    experts = [linear.name for linear in lot if linear.expert is not None]
    if experts and not reached.intersection(experts):
        raise UserError(
            f"{experts[0]} and all experts beside it: no calibration token was routed to them; "
            "use more or other text (--calibration_data, --nsamples)"
        )
    members |= {name: [name] for name in experts if name not in reached}
    merged = []
    for key, names in members.items():
        linears = [by_name[name] for name in names]
        group = mine.get(key) or Group(linears, method_spec(linears[0].shape[1], device))
        group.method.tokens = tokens[key]
        merged.append(group)
    return merged


class SharedWeights:
    """Weights that several blocks share: each is pruned once, where tokens reach it first."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        count = Counter(id(p) for block in blocks for p in block.parameters())
        self.several = {key for key, times in count.items() if times > 1}
        self.closed: set[tuple[int, int | None]] = set()

    def open(self, linear: PrunableLinear) -> bool:
        """Whether the linear's weight is still to be pruned."""
        return weight_of(linear) not in self.closed

    def close(self, linear: PrunableLinear) -> None:
        if weight_of(linear)[0] in self.several:
            self.closed.add(weight_of(linear))


def weight_of(linear: PrunableLinear) -> tuple[int, int | None]:
    """What linears have in common that share their weight, as long as their parameters stand."""
    return id(getattr(linear.module, linear.parameter)), linear.expert


def first_names(runner: BlockRunner) -> dict[str, str]:
    """{name of a linear: the first name of its weight}, which several blocks may share."""
    names: dict[tuple[int, int | None], str] = {}
    first = {}
    for index in range(len(runner.blocks)):
        for linear in runner.linears(index):
            first[linear.name] = names.setdefault(weight_of(linear), linear.name)
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
