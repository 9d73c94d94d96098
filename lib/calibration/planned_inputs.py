"""The inputs of a model's blocks before its weights are read, and the bytes that solving takes.

Which layers share an input is seen in a pass without weights, as calibration sees it with them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import mul
from typing import Any, NamedTuple

from torch import nn

from ..methods.base import PruningMethod
from ..model.blocks import Stop
from ..model.linears import find_linears
from ..model.matrix import FLOAT, PrunableLinear
from ..model.skeleton import text_pass
from .inputs import by_input
from .output_error import TOKENS


class SharedInput(NamedTuple):
    """An input of a block, known before weights are read."""

    width: int
    outputs: int  # of all its layers together
    experts: int = 1  # that have one each
    ends: bool = False  # it is that of a module's last layer

    def statistics(self, method: type[PruningMethod]) -> int:
        """Return the bytes of a method's sums over the input, and of a `TokenSample`."""
        numbers = 2 * TOKENS
        if method.inverts_gram:
            numbers += self.width
        if method.dense_stream:  # the error of a projection or of an input
            numbers += min(self.outputs, self.width) if self.ends else self.width
        return FLOAT * self.experts * self.width * numbers

    def solver(self, workspace: Sequence[tuple[float, float, float]]) -> int:
        """Return the bytes of solving its layers, with a method's `workspace`."""
        parts = self.width**2, self.width * self.outputs, self.outputs
        most = max(sum(map(mul, parts, factors)) for factors in workspace)
        return int(FLOAT * (most + self.width * self.outputs))


def expected_inputs(model: nn.Module, blocks_name: str) -> list[list[SharedInput]]:
    """Return the inputs of each kind of block of a model without weights, by a pass through it.

    If its class cannot take text without weights, layers of a module with equal width count as
    having one input, except the last, which receives the output of the others.
    """
    kinds: dict[tuple, list[PrunableLinear]] = {}
    for index, block in enumerate(model.get_submodule(blocks_name)):
        linears, _ = find_linears(block, str(index))
        kind = tuple((linear.name.partition(".")[2], linear.shape) for linear in linears)
        if kind not in kinds:
            kinds[kind], last = linears, block
    every = [one for linears in kinds.values() for one in linears]
    ends = {one.name.rpartition(".")[0]: one for one in every}.values()  # last of each module
    single = [one for one in every if one.expert is None]

    def end(*_: Any) -> None:
        raise Stop

    try:
        with last.register_forward_hook(end):
            groups = by_input(single, lambda: text_pass(model))
    except Exception:  # a model's class may raise any error
        by_module: dict[tuple, list[str]] = {}
        for one in single:
            key = one.name.rpartition(".")[0], one.shape[1], one in ends
            by_module.setdefault(key, []).append(one.parameter_name)
        groups = [*by_module.values()]
    return [_inputs_of(linears, groups, ends) for linears in kinds.values()]


def _inputs_of(
    linears: list[PrunableLinear], groups: list[list[str]], last: Collection[PrunableLinear]
) -> list[SharedInput]:
    """Return the inputs of a block's layers; those of a group's parameters share one."""
    inputs = []
    for names in groups:
        if group := [linear for linear in linears if linear.parameter_name in names]:
            outputs, ends = sum(one.shape[0] for one in group), any(one in last for one in group)
            inputs.append(SharedInput(group[0].shape[1], outputs, ends=ends))
    stacks = {linear.parameter_name: linear for linear in linears if linear.expert is not None}
    for linear in stacks.values():
        count = len(getattr(linear.module, linear.parameter))
        inputs.append(SharedInput(linear.shape[1], linear.shape[0], count))
    return inputs


def solver_bytes(
    method: type[PruningMethod], kinds: list[list[SharedInput]], neurons: bool = False
) -> dict[str, int]:
    """Return the most that solving a block takes: bytes of `statistics` and of the `solver`.

    A method that takes inputs in order holds the sums of one at a time, or of all experts.
    `neurons`: they are removed, so only the down projection is solved.
    """
    workspace = method.neuron_workspace if neurons else method.workspace
    at_most = {"statistics": 0, "solver": 0}
    for inputs in kinds:
        if neurons:
            inputs = sorted(each for each in inputs if each.ends)[-1:]
        for held in [[each] for each in inputs] if method.dense_stream else [inputs]:
            terms = {
                "statistics": sum(each.statistics(method) for each in held),
                "solver": max((each.solver(workspace) for each in held), default=0),
            }
            at_most = max(at_most, terms, key=lambda each: sum(each.values()))
    return at_most
