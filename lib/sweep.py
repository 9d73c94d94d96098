"""The one sweep: windows through a model's decoder blocks, one block after another.

Used for pruning and for evaluation. First every block records the arguments that the model calls
*it* with (sliding-window and full-attention blocks get different masks and rotary tables) and
hands its input on unchanged, so a pass costs an embedding look-up. Then the blocks run one by one
over all windows, their outputs written over their inputs in one buffer. Last, the model's own
forward runs with the blocks replaced by the buffer's contents, which gives exact logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lib.errors import UserError


class Stop(Exception):
    """Ends a forward pass whose rest is not wanted."""


@dataclass
class Stream:
    """Windows on their way through the blocks: hidden states before the next block."""

    windows: Tensor  # (windows, tokens) of ids
    batch_size: int
    hidden: Tensor | None = None  # (windows, tokens, hidden)
    calls: list[list[tuple[tuple, dict]]] = field(default_factory=list)  # [block][batch]

    @property
    def batches(self) -> list[slice]:
        starts = range(0, len(self.windows), self.batch_size)
        return [slice(start, min(start + self.batch_size, len(self.windows))) for start in starts]


class Sweep:
    """A model's decoder blocks, run one at a time on `device`.

    The model must be in eval mode. Nothing stays patched, whatever is raised.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
        self.model = model
        self.blocks = blocks
        self.device = device
        self.tuples = self._probe()

    @torch.no_grad()
    def record(self, windows: Tensor, batch_size: int, keep_on: torch.device | str) -> Stream:
        """Embed the windows (n, tokens) and note every block's own arguments for each batch.

        `keep_on`: where the hidden states between two blocks are kept.
        """
        stream = Stream(windows, batch_size, calls=[[] for _ in self.blocks])
        known: dict[tuple, list[Tensor]] = {}

        def recorder(index: int, batch: slice) -> Callable:
            def forward(*args, **kwargs):
                hidden, args, kwargs = _take_hidden(args, kwargs)
                if index == 0:
                    if stream.hidden is None:
                        shape = (len(windows), *hidden.shape[1:])
                        pinned = self.device.type == "cuda" and torch.device(keep_on).type == "cpu"
                        stream.hidden = torch.empty(
                            shape, dtype=hidden.dtype, device=keep_on, pin_memory=pinned
                        )
                    stream.hidden[batch] = hidden
                stream.calls[index].append((_interned(args, known), _interned(kwargs, known)))
                if index == len(self.blocks) - 1:
                    raise Stop
                return self._handed_on(index, hidden)

            return forward

        for batch in stream.batches:
            with replaced(self.blocks, lambda index, batch=batch: recorder(index, batch)):
                self._call_model(windows[batch].to(self.device))
        assert all(len(calls) == len(stream.batches) for calls in stream.calls)
        return stream

    def runs(
        self, stream: Stream, index: int, block: nn.Module | None = None
    ) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
        """For each batch, its slice and a call that runs the block on it: (n, tokens, hidden).

        `block` stands in for block `index` where given.
        """
        block = block or self.blocks[index]
        for batch, (args, kwargs) in zip(stream.batches, stream.calls[index], strict=True):
            hidden = stream.hidden[batch].to(self.device, non_blocking=True)

            def run(hidden=hidden, args=args, kwargs=kwargs) -> Tensor:
                out = block(hidden, *args, **kwargs)
                return out[0] if isinstance(out, tuple) else out

            yield batch, run

    @torch.no_grad()
    def advance_(self, stream: Stream, index: int, block: nn.Module | None = None) -> None:
        """Write block `index`'s outputs over its inputs, in the stream's buffer."""
        with record_function("forward"):
            for batch, run in self.runs(stream, index, block):
                stream.hidden[batch] = run()

    @torch.no_grad()
    def logits(self, stream: Stream, batch: slice, positions: Tensor) -> Tensor:
        """Logits (n, len(positions), vocabulary) after the last block, by the model's own tail."""

        def player(index: int) -> Callable:
            def forward(*args, **kwargs):
                hidden, *_ = _take_hidden(args, kwargs)
                if index == len(self.blocks) - 1:
                    hidden = stream.hidden[batch].to(self.device)
                return self._handed_on(index, hidden)

            return forward

        with replaced(self.blocks, player):
            ids = stream.windows[batch].to(self.device)
            return self.model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits

    def _handed_on(self, index: int, hidden: Tensor) -> Tensor | tuple:
        length = self.tuples[type(self.blocks[index])]
        return (hidden, *[None] * (length - 1)) if length else hidden

    @torch.no_grad()
    def _probe(self) -> dict[type, int]:
        """Length of the tuple that each class of block returns; 0 for a tensor."""
        lengths: dict[type, int] = {}

        def prober(index: int) -> Callable:
            block = self.blocks[index]
            original = block.forward

            def forward(*args, **kwargs):
                out = original(*args, **kwargs)
                lengths[type(block)] = len(out) if isinstance(out, tuple) else 0
                if len(lengths) == len({type(b) for b in self.blocks}):
                    raise Stop
                return out

            return forward

        with replaced(self.blocks, prober):
            self._call_model(torch.zeros(1, 2, dtype=torch.long, device=self.device))
        return lengths

    def _call_model(self, ids: Tensor) -> None:
        try:
            self.model(input_ids=ids, use_cache=False)
        except Stop:
            return
        raise UserError(
            f"--model {type(self.model).__name__}: its forward pass does not go through its last "
            "decoder block; this architecture can't be pruned"
        )


@contextmanager
def replaced(blocks: nn.ModuleList, make: Callable[[int], Callable]) -> Iterator[None]:
    """Inside, block i's forward is `make(i)`; afterwards it is its own again."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _take_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """A block's hidden states, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


def _interned(value, known: dict[tuple, list[Tensor]]):
    """`value` with equal tensors replaced by one: most arguments are the same in all batches."""
    if isinstance(value, dict):
        return {key: _interned(item, known) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_interned(item, known) for item in value)
    if not isinstance(value, Tensor):
        return value
    alike = known.setdefault((value.shape, value.dtype, value.device), [])
    for other in alike:
        if value is other or torch.equal(value, other):
            return other
    alike.append(value)
    return value
