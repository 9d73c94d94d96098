"""How sparse every linear becomes, by its full name: the one form in which that is handed on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.pruning.inputs import first_names

FILE = "allocation"  # among those of --resume


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


def keep_allocation(runner: BlockRunner, allocation: Allocation) -> None:
    """Write an allocation to the files of --resume."""
    if runner.weights.finished:
        ratios = {name: sparsity.ratio for name, sparsity in allocation.sparsity.items()}
        runner.weights.finished.write(FILE, allocation.output_costs, {"ratios": ratios})


def kept_allocation(runner: BlockRunner) -> Allocation | None:
    """What `keep_allocation` wrote in an interrupted run, so that blocks that it finished and those
    still to come fit together; None where it wrote nothing. Every process has to call this.
    """
    kept = runner.weights.read_kept(FILE)
    if kept is None:
        return None
    costs, facts = kept
    ratios = {name: Sparsity(ratio) for name, ratio in facts["ratios"].items()}
    return Allocation(ratios, dict(costs))
