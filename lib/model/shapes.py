"""The shapes of a model and the sizes of a run that its memory depends on.

The model on the meta device gives the shapes of its blocks. Each step of a run states its bytes
beside its code, as a function of a `Workload`: `pruning_bytes`, `recovery_bytes`,
`allocation_bytes`, `packing_bytes`, `evaluation_bytes`; lib/run/memory.py adds them up.
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
BACKWARD = (
    1.2  # bytes of a block's activations kept for the backward pass, over those of the forward
)
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
        """The number of weights of its linears."""
        return sum(each.width * sum(each.outputs) for each in self.inputs)


@dataclass
class Shapes:
    """The distinct shapes of blocks, and numbers of weights, shared ones counted once."""

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
        """The number of weights of the largest linear."""
        inputs = [each for block in self.blocks for each in block.inputs]
        return max((each.width * max(each.outputs) for each in inputs), default=0)

    @property
    def largest_group(self) -> int:
        """The number of weights of the largest group of linears that share an input."""
        inputs = [each for block in self.blocks for each in block.inputs]
        return max((each.width * sum(each.outputs) for each in inputs), default=0)


def shapes(skeleton: nn.Module, blocks_name: str) -> Shapes:
    """Return the shapes of a model on the meta device."""
    blocks = skeleton.get_submodule(blocks_name)
    inside = sum(parameter.numel() for parameter in blocks.parameters())
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    numbers = _input_numbers(skeleton, blocks)
    config = skeleton.config.get_text_config(decoder=True)
    kinds: dict[tuple, BlockShape] = {}
    linears = {}
    for block in blocks:
        for linear in find_linears(block, "")[0]:
            linears[linear.module, linear.parameter, linear.expert] = sum(linear.shape)
        key = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if key not in kinds:
            kinds[key] = BlockShape(sum(prod(shape) for _, shape in key), _inputs(block, numbers))
    return Shapes(
        blocks=list(kinds.values()),
        in_blocks=inside,
        outside=total - inside,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        routed=getattr(config, "num_experts_per_tok", None) or 1,
        count=len(blocks),
        edges=sum(linears.values()),
    )


@torch.no_grad()
def _input_numbers(skeleton: nn.Module, blocks: nn.ModuleList) -> dict[nn.Module, int]:
    """Return {module of a linear: number of its input}, as far as a pass without values gets."""
    linears = [
        linear for block in blocks for linear in find_linears(block, "")[0] if linear.expert is None
    ]
    inputs: list[Tensor] = []  # kept alive, so that identity distinguishes them
    received: dict[nn.Module, int] = {}

    def see(linear: PrunableLinear, x: Tensor) -> None:
        number = next((i for i, other in enumerate(inputs) if other is x), len(inputs))
        if number == len(inputs):
            inputs.append(x)
        received[linear.module] = number

    with watch_inputs(linears, see):
        try:
            skeleton.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=META))
        except FAILURES:  # routing needs values: unreached linears count alone
            return received
    return received


def _inputs(block: nn.Module, numbers: dict[nn.Module, int]) -> list[Inputs]:
    """Group a block's linears by their inputs; every linear of an expert is a group of its own."""
    linears, _ = find_linears(block, "")
    experts = Counter(linear.stage for linear in linears if linear.expert is not None)
    groups: dict[object, Inputs] = {}
    for linear in linears:
        rows, width = linear.shape
        key = numbers.get(linear.module, linear) if linear.expert is None else linear
        groups.setdefault(key, Inputs(width, [], experts[linear.stage])).outputs.append(rows)
    return list(groups.values())


@dataclass(frozen=True)
class PackedLinears:
    """What the linears of a packed checkpoint hold."""

    weights: int  # with the zeros
    kept: int
    bits: int  # of a kept value; 16: in the dtype of the model
    overhead: int  # bytes of masks, scales and offsets

    @classmethod
    def of(cls, linears: Sequence[Sequence[int]], bits: int) -> PackedLinears | None:
        """Sum up linears given as (out, in, kept); return None if there are none."""
        if not linears:
            return None
        outs, widths, kept = zip(*linears, strict=True)
        overhead = sum(
            packed_bytes(out, width, nnz=0, bits=bits)
            for out, width in zip(outs, widths, strict=True)
        )
        offsets = 8 * sum(out + 1 for out in outs)
        weights = sum(map(prod, zip(outs, widths, strict=True)))
        return cls(weights, kept=sum(kept), bits=bits, overhead=overhead + offsets)

    def nbytes(self, size: int) -> int:
        """Return the bytes, with values of `size` bytes unless they are integers."""
        return self.overhead + self.kept * (size * 8 if self.bits == 16 else self.bits) // 8


class StepBytes(NamedTuple):
    """Bytes at the peak of a step, besides the model's weights."""

    hidden: int  # hidden states of all windows between two blocks
    work: int  # temporaries


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
    device: str = "cpu"  # its type

    def hidden_states(self, windows: int) -> int:
        """Return the bytes of the hidden states of `windows` windows."""
        return windows * self.seqlen * self.shapes.hidden * self.working.itemsize

    def activations(self, block: BlockShape | None = None, batch: int | None = None) -> int:
        """Return the bytes of one batch in a block, by default the block that takes most.

        They are every linear's input and output, and the hidden states before and after.
        """
        if block is None:
            return max(self.activations(shape, batch) for shape in self.shapes.blocks)
        channels = 4 * self.shapes.hidden
        for each in block.inputs:
            share = min(1.0, self.shapes.routed / each.experts) if each.experts else 1.0
            channels += int(share * (each.width + sum(each.outputs)))
        batch = batch or min(self.batch_size, max(self.windows, self.tests))
        return batch * self.seqlen * channels * self.working.itemsize

    def logits(self, batch: int) -> int:
        """Return the bytes of the float32 logits of a batch that are in memory at a time."""
        return min(LOGIT_BYTES[self.device], FLOAT * self.shapes.vocabulary * batch * self.seqlen)
