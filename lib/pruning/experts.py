"""Remove whole experts of a mixture, block by block: what is left is a smaller mixture.

Each block is observed with the blocks before it already smaller. The same number goes in every
block that has experts; the gates of those that stay are what the router gives.
Run: `python main.py --model MODEL --prune_method reap --sparsity_type experts ...`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib.model.blocks import Stop, run_block
from lib.model.matrix import PrunableLinear
from lib.model.parts import PartLayout, keep_parts_
from lib.pruning.pruner import PartPruner
from lib.util.errors import UserError

TOLERANCE = 1e-3  # of the outputs' norm; rounding in bfloat16 needs more


def fewest(layout: PartLayout) -> int:
    """How many experts must stay: those that the router chooses, two of a group that is scored."""
    least = max(math.ceil(layout.chosen / layout.open_groups), 2 if layout.groups > 1 else 1)
    return least * layout.groups


def count_left(layout: PartLayout, ratio: float) -> int:
    """How many experts stay in each block: about 1 - `ratio` of them, as many of each group.

    UserError where none goes, or where fewer stay than the router chooses.
    """
    each = layout.count // layout.groups
    goes, most = round(ratio * each), each - fewest(layout) // layout.groups  # of a group
    if 1 <= goes <= most:
        return (each - goes) * layout.groups
    what = f"--sparsity_ratio {ratio:g}: of {layout.count} experts in each block"
    if most < 1:
        raise UserError(
            f"{what} none can go, as the router chooses {layout.chosen} for each token; use "
            "--sparsity_type unstructured"
        )
    raise UserError(
        f"{what} {goes * layout.groups} would go; use {1 / each:.3g} to {most / each:.3g}"
    )


class ExpertPruner(PartPruner):
    """Removes experts of a runner's model, in place."""

    checked: frozenset[type] = frozenset()  # classes of blocks

    def _linears(self, index: int) -> list[PrunableLinear]:
        return []  # no linear is changed by itself

    def _prune_(self, index: int, linears: list[PrunableLinear], ordered: None) -> dict:
        """Score the block's experts, and note which of them stay."""
        if not self.layout.modules[index]:
            return {}
        self._check_once(index)
        method = self.method(self.layout.count, self.runner.device)
        self._observe(index, method.observe)
        self.dist.sum_(method.statistics(), self.idle)
        if self.dist.is_main:
            notes, groups = self.notes[-1], self.layout.groups
            scores = method.scores(self.seed + index).cpu().view(groups, -1)
            best = scores.sort(dim=1, descending=True, stable=True).indices
            best = best[:, : self.left // groups].sort(dim=1).values
            kept = best + torch.arange(groups)[:, None] * scores.shape[1]
            notes.kept = kept.flatten().tolist()
            shares = method.counts / method.counts.sum().clamp(min=1)
            notes.routed = [round(share, 6) for share in shares.tolist()]
        return {}

    def _observe(self, index: int, observe: Callable[[int, Tensor, Tensor], None]) -> None:
        """Call `observe(expert, gates, outputs)` for the tokens that are sent to each expert."""
        name = f"{self.runner.name}.{index}.{self.layout.modules[index]}"
        experts = self.runner.blocks[index].get_submodule(self.layout.modules[index])

        def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, chosen, gates = _routing([*args, *kwargs.values()], name)
            for expert in range(self.layout.count):
                tokens, places = (chosen == expert).nonzero(as_tuple=True)
                if len(tokens):
                    only = torch.full((len(tokens), 1), expert, device=hidden.device)
                    one = torch.ones_like(only, dtype=gates.dtype)
                    outputs = experts.forward(hidden[tokens], only, one)  # without this hook
                    observe(expert, gates[tokens, places], outputs)
            raise Stop

        with experts.register_forward_pre_hook(see, with_kwargs=True):
            for _, run in self.runner.iter_batches(self.states, index):
                with suppress(Stop):
                    run()

    def _check_once(self, index: int) -> None:
        """Check for each class of blocks that experts in another order give the same outputs."""
        block, groups = self.runner.blocks[index], self.layout.groups
        if type(block) in self.checked:
            return
        self.checked |= {type(block)}
        hidden = self.states.hidden[self.states.batches[0]].to(self.runner.device)
        args, kwargs = self.states.block_args[index][0]
        run = partial(run_block, hidden=hidden, args=args, kwargs=kwargs)
        order = torch.arange(self.layout.count).view(groups, -1).flip(1).flatten()
        turned, name = copy.deepcopy(block), f"{self.runner.name}.{index}"
        keep_parts_(turned, self.layout, index, name, order)
        expected, out = run(block).float(), run(turned).float()
        dtype = next(block.parameters()).dtype
        tolerance = max(TOLERANCE, 4 * torch.finfo(dtype).eps)
        if not (out - expected).norm() <= tolerance * expected.norm():
            raise UserError(
                f"--sparsity_type experts: {name}: its outputs depend on the order of its experts, "
                "so that none can be removed; use --sparsity_type unstructured"
            )

    def _finish_(self, index: int) -> None:
        super()._finish_(index)
        self._cut_(index)


def _routing(values: list[Any], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, hidden), chosen experts (n, k) and their gates (n, k), as experts receive them."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) == 3:
        hidden, chosen, gates = tensors
        is_routing = chosen.dim() == 2 and not chosen.is_floating_point()
        if is_routing and chosen.shape == gates.shape and len(hidden) == len(chosen):
            return hidden, chosen, gates
    raise UserError(
        f"--sparsity_type experts: {name} is not called with tokens, chosen experts and gates; "
        "use --sparsity_type unstructured"
    )
