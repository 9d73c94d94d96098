"""How sparse every linear becomes, by its full name: the one form in which that is handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib.distributed.context import DistContext
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.work_folder import WorkFolder
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


def keep_allocation(folder: WorkFolder, allocation: Allocation, record: Any) -> None:
    """Write an allocation, and its record for results.json, into the folder of --resume."""
    ratios = {name: sparsity.ratio for name, sparsity in allocation.sparsity.items()}
    facts = {"ratios": ratios, "record": record}
    folder.write("allocation", allocation.output_costs, facts, "the allocation")


def kept_allocation(folder: WorkFolder | None, dist: DistContext) -> tuple[Allocation, Any] | None:
    """What `keep_allocation` wrote in an interrupted run, so that blocks that it finished and those
    still to come fit together; None where it wrote nothing.

    `folder`: in the main process; every process has to call this.
    """
    found = folder.read("allocation", "it is computed again") if folder else None
    tensors, facts = found or ({}, None)
    header = {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()}
    header, facts = dist.all_gather_object((header, facts))[0]
    if facts is None:
        return None
    costs = {}
    for name, (shape, dtype) in header.items():
        tensor = tensors[name] if tensors else torch.empty(shape, dtype=dtype)
        costs[name] = dist.broadcast_(tensor, 0)
    sparsity = {name: Sparsity(ratio) for name, ratio in facts["ratios"].items()}
    return Allocation(sparsity, costs), facts["record"]
