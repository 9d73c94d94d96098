"""How sparse every linear becomes, by its full name: the one form in which that is handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.pruning.inputs import first_names


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


def of_blocks(runner: BlockRunner, ratios: Sequence[float]) -> Allocation:
    """Each linear has the ratio of its block, or of the first block that has its weight."""
    of_block = {
        linear.name: Sparsity(ratio)
        for index, ratio in enumerate(ratios)
        for linear in runner.linears(index)
    }
    first = first_names(runner)
    return Allocation({name: of_block[first[name]] for name in first})
