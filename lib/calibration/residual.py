"""Find the linear layers that add to the residual stream, in blocks of any architecture.

If the outputs of a layer and of all later layers are replaced by zeros, a block returns the stream
to which that layer adds. This requires that it adds its outputs unchanged. One batch shows whether
it does: not if a norm or a factor follows the layer (Gemma 2, Granite).

Also tested, because it saves a pass: whether the stream there is still the block's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..model.blocks import BlockRunner, HiddenStates, replaced
from ..model.linears import first_argument, watch_inputs
from ..model.matrix import PrunableLinear

ROUNDINGS = 8  # allowed error of a sum, in roundings of the stream's dtype


@dataclass(frozen=True)
class ResidualProjection:
    """A linear layer whose outputs are added, unchanged, to the residual stream."""

    last: bool  # whether it is the block's last linear layer
    exact: bool  # whether the block's sum equals stream plus outputs to the last bit


@torch.no_grad()
def find_projection(
    runner: BlockRunner,
    states: HiddenStates,
    index: int,
    stage: list[PrunableLinear],
    later: list[PrunableLinear],
) -> ResidualProjection | None:
    """Return how `stage`, of block `index`, adds to the stream; `later` are the layers after it.

    None if it is more than one layer, or an expert, or adds nothing to the stream. None also if the
    stream is neither the block's input there nor, after it, the block's output.
    """
    if len(stage) > 1 or stage[0].expert is not None:
        return None
    _, run = next(runner.iter_batches(states, index))
    hidden = states.hidden[states.batches[0]]
    try:
        projection = as_residual_projection(runner.blocks[index], run, stage[0], later, hidden)
    except RuntimeError as error:  # a block whose shapes depend on the layers' outputs
        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            raise
        projection = None
    return runner.dist.all_gather_object(projection)[0]  # rounding could differ between processes


def as_residual_projection(
    block: nn.Module,
    run: Callable[[], Tensor],
    linear: PrunableLinear,
    later: Sequence[PrunableLinear],
    hidden: Tensor,
) -> ResidualProjection | None:
    """Return how `linear` adds to the stream when `run` takes `hidden` through a block, or None."""
    outputs: list[Tensor] = []
    hook = linear.module.register_forward_hook(lambda _, args, out: outputs.append(out))
    with hook, zeroed_outputs(later):
        total = run()
    if len(outputs) != 1 or outputs[0].shape != total.shape:
        return None
    with zeroed_outputs([linear, *later]):
        stream = run()
    after, before, added = total.float(), stream.float(), outputs[0].float()
    off = (after - before - added).abs()
    bound = ROUNDINGS * torch.finfo(stream.dtype).eps * (after.abs() + before.abs() + added.abs())
    if not bool((off <= bound).all() and added.any()):
        return None
    exact = torch.equal(stream + outputs[0], total)
    if later and not torch.equal(stream.cpu(), hidden.cpu()):
        return None
    return ResidualProjection(last=not later, exact=exact)


def stream_at(run: Callable[[], Tensor], linear: PrunableLinear) -> tuple[Tensor, Tensor]:
    """Return the last layer's input (..., in), and the stream (..., hidden) that it adds to."""
    inputs: list[Tensor] = []
    with watch_inputs([linear], lambda _, x: inputs.append(x)), zeroed_outputs([linear]):
        stream = run()
    return inputs[0], stream


def zeroed_outputs(linears: Sequence[PrunableLinear]) -> AbstractContextManager[None]:
    """Within this context, the modules of `linears` return zeros."""
    widths: dict[nn.Module, dict[str, int]] = {}  # output width of each parameter
    for linear in linears:
        widths.setdefault(linear.module, {})[linear.parameter] = linear.shape[0]

    def zeros(counts: list[int], *args, **kwargs) -> Tensor:
        x = first_argument(args, kwargs)
        # modules with several parameters (experts) have outputs as wide as their inputs
        return x.new_zeros(*x.shape[:-1], x.shape[-1] if len(counts) > 1 else counts[0])

    forwards = {module: partial(zeros, [*each.values()]) for module, each in widths.items()}
    return replaced(forwards)
