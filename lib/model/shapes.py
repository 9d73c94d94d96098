"""What of a model's shapes and a run's sizes decides how much memory the run takes.

The model on the meta device gives the shapes of its blocks. Each step of a run states its bytes
beside its code, of a `Workload`: `pruning_bytes`, `recovery_bytes`, `allocation_bytes`,
`packing_bytes`, `evaluation_bytes`; lib/run/memory.py adds them up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.model.blocks import LOGIT_BYTES
from lib.model.linears import find_linears, watch_inputs
from lib.model.matrix import PrunableLinear
from lib.packed.layout import packed_bytes

FLOAT = 4  # bytes
BACKWARD = 1.2  # bytes of a block's activations kept for the way back, over those on the way there
META = torch.device("meta")
FAILURES = (RuntimeError, ValueError, TypeError, IndexError)  # of a forward pass without weights


@dataclass
class Inputs:
    """Linears that share an input: its width, and the outputs of each linear."""

    width: int
    outputs: list[int]
    experts: int = 0  # how many experts share the tokens that are routed


@dataclass
class BlockShape:
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

    blocks: list[BlockShape]
    in_blocks: int
    outside: int
    hidden: int
    vocabulary: int
    routed: int  # experts that each token goes to
    count: int  # of blocks
    edges: int  # rows and columns of all linears

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest linear."""
        inputs = [each for block in self.blocks for each in block.inputs]
        return max((each.width * max(each.outputs) for each in inputs), default=0)

    @property
    def largest_group(self) -> int:
        """Weights of the linears that share an input, where these are most."""
        inputs = [each for block in self.blocks for each in block.inputs]
        return max((each.width * sum(each.outputs) for each in inputs), default=0)


def shapes(skeleton: nn.Module, blocks_name: str) -> Shapes:
    """Of a model on the meta device."""
    blocks = skeleton.get_submodule(blocks_name)
    inside = sum(parameter.numel() for parameter in blocks.parameters())
    whole = sum(parameter.numel() for parameter in skeleton.parameters())
    numbers = _input_numbers(skeleton, blocks)
    config = skeleton.config.get_text_config(decoder=True)
    kinds: dict[tuple, BlockShape] = {}
    linears = {}
    for block in blocks:
        for one in find_linears(block, "")[0]:
            linears[one.module, one.parameter, one.expert] = sum(one.shape)
        key = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if key not in kinds:
            kinds[key] = BlockShape(sum(prod(shape) for _, shape in key), _inputs(block, numbers))
    return Shapes(
        list(kinds.values()),
        inside,
        whole - inside,
        config.hidden_size,
        config.vocab_size,
        getattr(config, "num_experts_per_tok", None) or 1,
        len(blocks),
        sum(linears.values()),
    )


@torch.no_grad()
def _input_numbers(skeleton: nn.Module, blocks: nn.ModuleList) -> dict[nn.Module, int]:
    """{module of a linear: which input it receives}, as far as tokens without values come."""
    linears = [one for block in blocks for one in find_linears(block, "")[0] if one.expert is None]
    inputs: list[Tensor] = []  # alive, so that none is taken for another
    received: dict[nn.Module, int] = {}

    def see(linear: PrunableLinear, x: Tensor) -> None:
        known = next((i for i, other in enumerate(inputs) if other is x), None)
        if known is None:
            inputs.append(x)
        received[linear.module] = len(inputs) - 1 if known is None else known

    with watch_inputs(linears, see):
        try:
            skeleton.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=META))
        except FAILURES:  # routing needs values: what was not reached counts by itself
            return received
    return received


def _inputs(block: nn.Module, numbers: dict[nn.Module, int]) -> list[Inputs]:
    """Of a block's linears; every expert's has statistics of its own."""
    linears, _ = find_linears(block, "")
    experts = Counter(one.stage for one in linears if one.expert is not None)
    found: dict[object, Inputs] = {}
    for linear in linears:
        rows, width = linear.shape
        key = numbers.get(linear.module, linear) if linear.expert is None else linear
        found.setdefault(key, Inputs(width, [], experts[linear.stage])).outputs.append(rows)
    return list(found.values())


@dataclass(frozen=True)
class PackedLinears:
    """Of a checkpoint that is packed: what its packed linears hold."""

    weights: int  # that they stand for
    kept: int
    bits: int  # of a kept value; 16: in the dtype of the model
    rest: int  # bytes of masks, scales and offsets

    @classmethod
    def of(cls, linears: Sequence[Sequence[int]], bits: int) -> PackedLinears | None:
        """Of (out, in, kept) of each linear; None where there are none."""
        if not linears:
            return None
        outs, widths, kept = zip(*linears, strict=True)
        rest = sum(packed_bytes(*size, nnz=0, bits=bits) for size in zip(outs, widths, strict=True))
        offsets = 8 * sum(out + 1 for out in outs)
        weights = sum(map(prod, zip(outs, widths, strict=True)))
        return cls(weights, sum(kept), bits, rest + offsets)

    def nbytes(self, size: int) -> int:
        """With values of `size` bytes, where they are not integers."""
        return self.rest + self.kept * (size * 8 if self.bits == 16 else self.bits) // 8


class StepBytes(NamedTuple):
    """Bytes at the worst moment of a step, besides the model's weights."""

    hidden: int  # states of all windows between two blocks
    work: int  # what comes and goes


@dataclass(frozen=True)
class Workload:
    """The sizes of a run, in one process."""

    shapes: Shapes
    seqlen: int
    batch_size: int
    windows: int  # of calibration
    tests: int  # windows of all test sets
    working: torch.dtype  # in which the model computes
    saved: torch.dtype
    device: str = "cpu"  # kind of it

    def hidden_states(self, windows: int) -> int:
        """Bytes of the hidden states of so many windows."""
        return windows * self.seqlen * self.shapes.hidden * self.working.itemsize

    def activations(self, block: BlockShape | None = None, batch: int | None = None) -> int:
        """Bytes of one batch in a block, the one that takes most by default: every linear's input
        and output, and the stream before and after."""
        if block is None:
            return max(self.activations(one, batch) for one in self.shapes.blocks)
        channels = 4 * self.shapes.hidden
        for each in block.inputs:
            share = min(1.0, self.shapes.routed / each.experts) if each.experts else 1.0
            channels += int(share * (each.width + sum(each.outputs)))
        batch = batch or min(self.batch_size, max(self.windows, self.tests))
        return batch * self.seqlen * channels * self.working.itemsize

    def logits(self, batch: int) -> int:
        """Bytes of the float32 logits of a batch that are in memory at a time."""
        return min(LOGIT_BYTES[self.device], FLOAT * self.shapes.vocabulary * batch * self.seqlen)
