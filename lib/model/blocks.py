"""The one runner: windows through a model's decoder blocks, one block after another.

Used for pruning and for evaluation. First every block records the arguments that the model calls
*it* with (sliding-window and full-attention blocks get different masks and rotary tables) and
hands its input on unchanged, so a pass costs an embedding look-up. Then the blocks run one by one
over all windows, their outputs written over their inputs in one buffer. Last, the model's own
forward runs with the blocks replaced by the buffer's contents, which gives exact logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lib.model.placement import BlockPlacement
from lib.model.transfer import Transfer
from lib.util.errors import UserError

# of float32 logits that stand at a time: what lies in a CPU's cache, what keeps a GPU busy
LOGIT_BYTES = {"cpu": 2**24, "cuda": 2**29}
# with fewer in a product, reading the head from memory takes longer than the arithmetic
HEAD_POSITIONS = 128
PROBE_TOKENS = 16
PROBE_TOLERANCE = 0.02  # of the logits' norm; rounding in bfloat16 stays below


@dataclass
class HiddenStates:
    """Windows on their way through the blocks: hidden states before the next block."""

    windows: Tensor  # (windows, tokens) of ids
    batch_size: int
    hidden: Tensor | None = None  # (windows, tokens, hidden)
    calls: list[list[tuple[tuple, dict]]] = field(default_factory=list)  # [block][batch]

    @property
    def batches(self) -> list[slice]:
        starts = range(0, len(self.windows), self.batch_size)
        return [slice(start, min(start + self.batch_size, len(self.windows))) for start in starts]


class BlockRunner:
    """A model's decoder blocks, run one at a time on `device`.

    The model must be in eval mode. Nothing stays patched, whatever is raised.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        device: torch.device,
        placement: BlockPlacement | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.device = device
        self.placement = placement
        self.transfer = Transfer(device)
        self.tuples = self._probe()

    def on_device(self, index: int, write_back: bool = False) -> AbstractContextManager:
        """Inside, block `index` is on the device; `write_back` stores changes of its weights."""
        return self.placement.on_device(index, write_back) if self.placement else nullcontext()

    def materialized(self, blocks_name: str) -> AbstractContextManager:
        """Inside, the whole model can be saved, wherever its blocks are."""
        given = self.placement and self.placement.materialized(self.model, blocks_name)
        return given or nullcontext()

    @torch.no_grad()
    def capture(
        self, windows: Tensor, batch_size: int, state_device: torch.device | str
    ) -> HiddenStates:
        """Embed the windows (n, tokens) and note every block's own arguments for each batch.

        `state_device`: where the hidden states between two blocks are kept.
        """
        states = HiddenStates(windows, batch_size, calls=[[] for _ in self.blocks])
        known = TensorDeduplicator()
        handed_on: list[Tensor] = []  # hidden states that the blocks of this batch received

        def recorder(index: int, batch: slice) -> Callable:
            def forward(*args, **kwargs):
                hidden, args, kwargs = take_hidden(args, kwargs)
                handed_on.append(hidden)
                if len(handed_on) != index + 1 or hidden is not handed_on[0]:
                    raise self._refused("does something between its decoder blocks")
                if index == 0:
                    if hidden.dim() != 3 or hidden.shape[:2] != windows[batch].shape:
                        raise self._refused("has hidden states of another shape than its windows")
                    if states.hidden is None:
                        states.hidden = self.transfer.buffer(len(windows), hidden, state_device)
                    states.hidden[batch] = hidden  # the host waits, and may then read it
                states.calls[index].append((known.like(args), known.like(kwargs)))
                if index == len(self.blocks) - 1:
                    raise Stop
                return self._handed_on(index, hidden)

            return forward

        for batch in states.batches:
            handed_on.clear()
            known.start_call()
            with replaced(self.blocks, lambda index, batch=batch: recorder(index, batch)):
                self._call_model(windows[batch].to(self.device))
        assert all(len(calls) == len(states.batches) for calls in states.calls)
        return states

    def runs(
        self, states: HiddenStates, index: int, block: nn.Module | None = None
    ) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
        """For each batch, its slice and a call that runs the block on it: (n, tokens, hidden).

        `block` stands in for block `index` where given.
        """
        block = block or self.blocks[index]
        arriving = self.transfer.batches(states.hidden, states.batches)
        calls = states.calls[index]
        for batch, hidden, (args, kwargs) in zip(states.batches, arriving, calls, strict=True):

            def run(hidden=hidden, args=args, kwargs=kwargs) -> Tensor:
                return run_block(block, hidden, args, kwargs)

            yield batch, run

    @torch.no_grad()
    def advance_(self, states: HiddenStates, index: int, block: nn.Module | None = None) -> None:
        """Write block `index`'s outputs over its inputs, in its buffer."""
        with record_function("forward"):
            for batch, run in self.runs(states, index, block):
                self.transfer.store_(states.hidden, batch, run())

    @torch.no_grad()
    def logits(self, states: HiddenStates, batch: slice) -> Callable[[Tensor], Tensor]:
        """What gives a batch's logits (n, len(positions), vocabulary) after the last block, by the
        model's own tail; its hidden states come to the device once."""
        ids = states.windows[batch].to(self.device)
        last = self.transfer.fetch(states.hidden, batch)
        return torch.no_grad()(lambda positions: self.tail(ids, lambda: last, positions))

    def tail(self, ids: Tensor, last: Callable[[], Tensor], positions: Tensor) -> Tensor:
        """Logits (n, len(positions), vocabulary) of windows `ids` (n, tokens).

        `last` gives their hidden states (n, tokens, hidden) after the last block; gradients reach
        these.
        """

        def player(index: int) -> Callable:
            def forward(*args, **kwargs):
                hidden, *_ = take_hidden(args, kwargs)
                if index == len(self.blocks) - 1:
                    hidden = last()
                return self._handed_on(index, hidden)

            return forward

        with replaced(self.blocks, player):
            kept = self.model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
        return kept if kept.shape[1] == len(positions) else kept[:, positions]

    @torch.no_grad()
    def verify(self) -> None:
        """See on a few tokens that the blocks give the model's own logits; UserError if not."""
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None]
        states = self.capture(ids, 1, self.device)
        try:
            for index in range(len(self.blocks)):
                with self.on_device(index):
                    self.advance_(states, index)
            swept = self.logits(states, slice(0, 1))(ids[0]).float()
        except (TypeError, ValueError) as error:
            raise self._refused("has blocks that depend on each other") from error
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        if (swept - own).norm() > PROBE_TOLERANCE * own.norm():
            raise self._refused("computes more than its decoder blocks one after another")

    def _refused(self, what: str) -> UserError:
        name = f"{self.model.name_or_path} ({type(self.model).__name__})"
        return UserError(f"--model {name}: this architecture {what}; it can't be pruned")

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
        raise self._refused("does not go through its last decoder block")


class Stop(Exception):
    """Ends a forward pass whose rest is not wanted."""


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


def run_block(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """A block's outputs (n, tokens, hidden), without what else it returns."""
    out = block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def take_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """A block's hidden states, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


class TensorDeduplicator:
    """Tensors of which equal ones are one: most arguments of blocks are the same in all batches."""

    def __init__(self) -> None:
        self.known: dict[tuple, list[Tensor]] = {}
        self.start_call()

    def start_call(self) -> None:
        """What the model makes from now on is new; within a call it hands on the same tensors."""
        self.met: dict[int, tuple[Tensor, Tensor]] = {}  # by id: (a tensor, the one equal to it)

    def like(self, value):
        """`value` with known tensors in place of equal ones."""
        if isinstance(value, dict):
            return {key: self.like(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.like(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.met:  # comparing waits for the device
            self.met[id(value)] = value, self._equal(value)
        return self.met[id(value)][1]

    def _equal(self, value: Tensor) -> Tensor:
        alike = self.known.setdefault((value.shape, value.dtype, value.device), [])
        for other in alike:
            if value is other or torch.equal(value, other):
                return other
        alike.append(value)
        return value


def chunks_of(
    logits: Callable[[Tensor], Tensor],
    length: int,
    device: torch.device,
    chunk: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields positions 0 to `length` in chunks, with their logits (n, chunk, vocabulary).

    Without `chunk`, the first has one position, whose logits tell how many may stand at a time.
    """
    start, size = 0, chunk or 1
    while start < length:
        positions = torch.arange(start, min(start + size, length), device=device)
        own = logits(positions)
        size = chunk or positions_at_once(device, own.shape[-1], len(own))
        start += len(positions)
        yield positions, own
        del own  # before the next logits come


def positions_at_once(device: torch.device, vocabulary: int, windows: int, least: int = 1) -> int:
    """Returns of how many positions of `windows` windows the logits stand at a time.

    `least`: of how many, over all windows, also where they take more than LOGIT_BYTES.
    """
    return max(1, max(rows_at_once(device, vocabulary), least) // windows)


def rows_at_once(device: torch.device, vocabulary: int) -> int:
    """Returns how many float32 rows of logits (vocabulary,) fit into LOGIT_BYTES, at least one."""
    return max(1, LOGIT_BYTES[device.type] // (4 * vocabulary))
