"""What a model's shapes tell before any weight is read: its blocks, and what shares an input."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lib.linears import find_linears, watch_inputs
from lib.matrix import Linear

FAILURES = (RuntimeError, ValueError, TypeError, IndexError)  # of a forward pass without weights


@dataclass
class Inputs:
    """Linears that share an input: its width, and the outputs of each linear."""

    width: int
    outputs: list[int]
    experts: int = 0  # how many experts share the tokens that are routed


@dataclass
class Block:
    """A decoder block: its weights, and the inputs of its linears."""

    weights: int
    inputs: list[Inputs]

    @property
    def pruned(self) -> int:
        """Weights of its linears."""
        return sum(each.width * sum(each.outputs) for each in self.inputs)


@dataclass
class Shapes:
    """The blocks that differ in shape, and how many weights there are, shared ones once."""

    blocks: list[Block]
    in_blocks: int
    outside: int
    hidden: int
    vocabulary: int
    routed: int  # experts that each token goes to


def shapes(skeleton: nn.Module, blocks_name: str) -> Shapes:
    """Of a model on the meta device."""
    blocks = skeleton.get_submodule(blocks_name)
    inside = {parameter: parameter.numel() for parameter in blocks.parameters()}
    whole = sum(parameter.numel() for parameter in set(skeleton.parameters()))
    sharing = _sharing(skeleton, blocks)
    config = skeleton.config.get_text_config(decoder=True)
    kinds: dict[tuple, Block] = {}
    for block in blocks:
        key = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        kinds.setdefault(key, Block(sum(map(prod, (k[1] for k in key))), _inputs(block, sharing)))
    return Shapes(
        list(kinds.values()),
        sum(inside.values()),
        whole - sum(inside.values()),
        config.hidden_size,
        config.vocab_size,
        getattr(config, "num_experts_per_tok", None) or 1,
    )


@torch.no_grad()
def _sharing(skeleton: nn.Module, blocks: nn.ModuleList) -> dict[nn.Module, int]:
    """{module of a linear: which input it receives}, as far as tokens without values come."""
    linears = [one for block in blocks for one in find_linears(block, "")[0] if one.expert is None]
    inputs: list[Tensor] = []  # alive, so that none is taken for another
    received: dict[nn.Module, int] = {}

    def see(linear: Linear, x: Tensor) -> None:
        known = next((i for i, other in enumerate(inputs) if other is x), None)
        if known is None:
            inputs.append(x)
        received[linear.module] = len(inputs) - 1 if known is None else known

    with watch_inputs(linears, see):
        try:
            skeleton.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
        except FAILURES:  # routing needs values: what was not reached counts by itself
            return received
    return received


def _inputs(block: nn.Module, sharing: dict[nn.Module, int]) -> list[Inputs]:
    linears, _ = find_linears(block, "")
    experts = {one.stage: 0 for one in linears if one.expert is not None}
    found: dict[object, Inputs] = {}
    for linear in linears:
        if linear.expert is not None:
            experts[linear.stage] += 1
    for linear in linears:
        rows, width = linear.shape
        key = sharing.get(linear.module, linear) if linear.expert is None else linear
        found.setdefault(key, Inputs(width, [], experts.get(linear.stage, 0))).outputs.append(rows)
    return list(found.values())
