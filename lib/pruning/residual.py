"""The linears that add to the residual stream, in blocks of any architecture.

With the outputs of a linear and of all linears after it replaced by zeros, a block returns the
stream as it stands where the linear's outputs are added: if it adds them as they are. Whether it
does, one batch shows: a norm behind the linear or a factor on its outputs (Gemma 2, Granite) would.

Two things more are tried, for they save passes. Does the stream stand there as the block received
it? And is there a module, as attention, that ends in the linear and hands its outputs on? Then
what the module would compute again can be read from what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.distributed.context import DistContext
from lib.model.blocks import BlockRunner, HiddenStates, replaced
from lib.model.linears import first_argument, watch_inputs
from lib.model.matrix import PrunableLinear

ROUNDINGS = 8  # of the stream's dtype, that a sum may be off by


@dataclass(frozen=True)
class Writer:
    """What was found of a linear that adds its outputs, as they are, to the residual stream."""

    last: bool  # of the block's linears
    exact: bool  # the block's sum is the stream plus the outputs, to the last bit
    ends: str | None = None  # the module in the block that hands on the linear's outputs
    length: int = 0  # of the tuple that this module returns; 0 for a tensor


class Writers:
    """Which linears add to the residual states: tried once for each class of blocks."""

    def __init__(self, runner: BlockRunner, dist: DistContext) -> None:
        self.runner = runner
        self.dist = dist
        self.known: dict[tuple[type, str, bool], Writer | None] = {}

    @torch.no_grad()
    def find(
        self,
        states: HiddenStates,
        index: int,
        lot: list[PrunableLinear],
        later: list[PrunableLinear],
    ) -> Writer | None:
        """What `lot`, of block `index`, is as a writer; `later` are the linears after it.

        None where it is more than one linear, or an expert, or adds nothing to the stream; or where
        the stream is neither the block's input there nor, after it, the block's output.
        """
        linear = lot[0]
        if len(lot) > 1 or linear.expert is not None:
            return None
        block = self.runner.blocks[index]
        key = type(block), linear.name.split(f".{index}.", 1)[-1], not later
        if key not in self.known:
            _, run = next(self.runner.iter_batches(states, index))
            try:
                found = as_writer(block, run, linear, later, states.hidden[states.batches[0]])
            except RuntimeError as error:  # a block whose shapes depend on what the linears give
                if out_of_memory(error):
                    raise
                found = None
            self.known[key] = self.dist.all_gather_object(found)[
                0
            ]  # rounding could divide processes
        return self.known[key]


def as_writer(
    block: nn.Module,
    run: Callable[[], Tensor],
    linear: PrunableLinear,
    later: Sequence[PrunableLinear],
    hidden: Tensor,
) -> Writer | None:
    """What `linear` is as a writer in a block that `run` takes `hidden` through."""
    found = adds_to_stream(run, linear, later)
    if found is None:
        return None
    before, exact = found
    if not later:
        return Writer(True, exact)
    if not torch.equal(before.cpu(), hidden.cpu()):
        return None
    return Writer(False, exact, *module_ending_in(block, run, linear))


def adds_to_stream(
    run: Callable[[], Tensor], linear: PrunableLinear, later: Sequence[PrunableLinear]
) -> tuple[Tensor, bool] | None:
    """The stream that the block adds the linear's outputs to, as they are; None if it does not.

    Also whether the sum is exact: whether the block adds nothing else after it.
    """
    outputs: list[Tensor] = []
    handle = linear.module.register_forward_hook(lambda _, args, out: outputs.append(out))
    try:
        with silenced(later):
            total = run()
    finally:
        handle.remove()
    if len(outputs) != 1 or outputs[0].shape != total.shape:
        return None
    with silenced([linear, *later]):
        stream = run()
    after, before, added = total.float(), stream.float(), outputs[0].float()
    off = (after - before - added).abs()
    bound = ROUNDINGS * torch.finfo(stream.dtype).eps * (after.abs() + before.abs() + added.abs())
    if not bool((off <= bound).all() and added.any()):
        return None
    return stream, torch.equal(stream + outputs[0], total)


def module_ending_in(
    block: nn.Module, run: Callable[[], Tensor], linear: PrunableLinear
) -> tuple[str | None, int]:
    """The outermost module inside the block that hands on the linear's outputs, and how.

    Its name and the length of the tuple in which these come first, 0 for a tensor alone. None
    where there is no such module, or where the block returns something else without it.
    """
    returned: dict[str, Tensor | tuple] = {}
    paths = [path for path, inner in block.named_modules() if path and _holds(inner, linear)]
    handles = [
        block.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: returned.update({path: out})
        )
        for path in paths
    ]
    try:
        whole = run()
    finally:
        for handle in handles:
            handle.remove()
    *outer, innermost = paths  # from the outside inwards, the linear's module at the end
    own = returned[innermost]
    for path in outer:
        out = returned.get(path)
        first, length = (out[0], len(out)) if isinstance(out, tuple) else (out, 0)
        if isinstance(first, Tensor) and first.shape == own.shape and torch.equal(first, own):
            with handing_on(block, {path: (own, length)}):
                if torch.equal(run(), whole):
                    return path, length
    return None, 0


def _holds(module: nn.Module, linear: PrunableLinear) -> bool:
    return any(inner is linear.module for inner in module.modules())


@contextmanager
def handing_on(block: nn.Module, outputs: dict[str, tuple[Tensor, int]]) -> Iterator[None]:
    """Inside, modules of `block` by name hand on a tensor, in a tuple of that length if not 0."""
    given = list(outputs.values())

    def make(index: int) -> Callable:
        out, length = given[index]
        return lambda *args, **kwargs: (out, *[None] * (length - 1)) if length else out

    with replaced([block.get_submodule(path) for path in outputs], make):
        yield


def stream_at(
    run: Callable[[], Tensor], linear: PrunableLinear, later: Sequence[PrunableLinear] = ()
) -> tuple[Tensor, Tensor]:
    """The linear's input (..., in), and the stream (..., hidden) that its outputs are added to."""
    inputs: list[Tensor] = []
    with watch_inputs([linear], lambda _, x: inputs.append(x)), silenced([linear, *later]):
        stream = run()
    return inputs[0], stream


@contextmanager
def silenced(linears: Sequence[PrunableLinear]) -> Iterator[None]:
    """Inside, the modules of `linears` return zeros; afterwards they are their own again."""
    first = {id(linear.module): linear for linear in reversed(linears)}
    parameters: dict[int, set[str]] = {}
    for linear in linears:
        parameters.setdefault(id(linear.module), set()).add(linear.parameter)

    def make(index: int) -> Callable:
        linear = list(first.values())[index]
        whole = len(parameters[id(linear.module)]) > 1  # experts, from hidden states to the same

        def forward(*args, **kwargs) -> Tensor:
            x = first_argument(args, kwargs)
            return x.new_zeros(*x.shape[:-1], x.shape[-1] if whole else linear.shape[0])

        return forward

    with replaced([linear.module for linear in first.values()], make):
        yield


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or (told in words alone) on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error)
