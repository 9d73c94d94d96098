"""The runner that passes windows through a model's decoder blocks, one block after another.

Pruning and evaluation both use it. First every block records the arguments that the model calls
*it* with (sliding-window and full-attention blocks get different masks and rotary tables). It then
returns its input unchanged, so this pass costs only an embedding look-up. Then the blocks run one
by one over all windows, and their outputs replace their inputs in one buffer. Last, the model's own
forward runs with the blocks replaced by the buffer's contents, which gives exact logits.

Models that cannot be run block by block are evaluated with their own forward. The buffer then holds
the decoder's last hidden state.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..data.samples import Windows, as_windows
from ..util.errors import UserError
from ..util.ranks import DistContext
from .linears import find_linears
from .matrix import PrunableLinear
from .store import BlockStore

# float32 logits computed at a time: fits into a CPU's cache, or keeps a GPU busy
LOGIT_BYTES, GPU_LOGIT_BYTES = 2**24, 2**29
# with fewer positions in a product, reading the head takes longer than the arithmetic
HEAD_POSITIONS = 128
PROBE_TOKENS = 16
PROBE_TOLERANCE = 0.02  # share of the logits' norm; rounding in bfloat16 stays below it


@dataclass
class HiddenStates:
    """Windows and their hidden states at the input of the next block."""

    windows: Tensor  # (windows, tokens) token ids
    batch_size: int
    hidden: Tensor | None = None  # (windows, tokens, hidden)
    # [block][batch]: a block's arguments besides its hidden states
    block_args: list[list[tuple[tuple, dict]]] = field(default_factory=list)

    def put(self, batch: slice, hidden: Tensor, device: torch.device | str) -> None:
        """Store a batch's hidden states (n, tokens, hidden) in a buffer for all, on `device`."""
        if self.hidden is None:
            # a GPU copies pinned memory several times as fast
            pinned = hidden.device.type != "cpu" and torch.device(device).type == "cpu"
            shape = len(self.windows), *hidden.shape[1:]
            self.hidden = torch.empty(shape, dtype=hidden.dtype, device=device, pin_memory=pinned)
        self.hidden[batch] = hidden

    def copy(self) -> HiddenStates:
        """Return the same windows with a copy of the hidden states."""
        pinned = self.hidden.is_pinned()
        hidden = torch.empty_like(self.hidden, pin_memory=pinned).copy_(self.hidden)
        return replace(self, hidden=hidden)

    @property
    def batches(self) -> list[slice]:
        starts = range(0, len(self.windows), self.batch_size)
        return [slice(start, min(start + self.batch_size, len(self.windows))) for start in starts]


class BlockRunner:
    """A model's decoder blocks, run one at a time on `device`.

    `name` is the blocks' name in the model, such as `model.layers`; `flag` is the flag that named
    the model, which must be in eval mode. Patches are undone after exceptions too.

    It holds the settings of every pass. `dist`: the processes that share the work. `batch_size`:
    windows per forward pass. `state_device`: holds hidden states between two blocks.
    `cache_inputs`: whether memory suffices to cache a block's inputs, which saves passes.
    `checkpointed`: whether training recomputes a block's activations. `most_windows`: windows
    measured at a time if blocks are fetched, in whole batches (None: all). `weights` has the dtype
    in which the model will be saved. With `whole` all blocks run at once, for models that cannot be
    run block by block.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        weights: BlockStore | None = None,
        flag: str = "--model",
        *,
        dist: DistContext | None = None,
        batch_size: int = 1,
        state_device: torch.device | None = None,
        cache_inputs: bool = True,
        checkpointed: bool = False,
        whole: bool = False,
        most_windows: int | None = None,
    ) -> None:
        self.model = model
        self.weights = weights or BlockStore(model, device)
        self.name, self.blocks = self.weights.name, self.weights.blocks
        self.device = device
        self.dist = dist or DistContext(device, alone=True)
        self.flag = flag
        self.batch_size = batch_size
        self.state_device = state_device or device
        self.cache_inputs = cache_inputs
        self.checkpointed = checkpointed
        self.whole = whole
        self.most_windows = most_windows
        self.output: type | None = None  # the decoder's output class, if `whole`
        self.tuples = self._probe()

    @property
    def save_dtype(self) -> torch.dtype | None:
        """The dtype in which the model will be saved; None: unchanged."""
        return self.weights.saved.dtype

    def on_device(self, index: int, write_back: bool = False) -> AbstractContextManager:
        """Keep block `index` on the device; `write_back` keeps changes of its weights."""
        return self.weights.on_device(index, write_back)

    def linears(self, index: int) -> list[PrunableLinear]:
        """Return the prunable and packed linear layers of block `index`, with their full names."""
        return find_linears(self.blocks[index], f"{self.name}.{index}")[0]

    def each_linear(self) -> Iterator[PrunableLinear]:
        """Yield every linear layer of the blocks, on the device until the next one."""
        for index in range(len(self.blocks)):
            with self.on_device(index):
                yield from self.linears(index)

    def check_finite(self) -> None:
        """Raise UserError naming the first linear layer whose weight holds nan or inf."""
        for linear in self.each_linear():
            linear.check_finite(self.named)

    @torch.no_grad()
    def capture(
        self,
        windows: Tensor | Windows,
        batch_size: int | None = None,
        state_device: torch.device | str | None = None,
    ) -> HiddenStates:
        """Embed the windows (n, tokens) and record every block's arguments for each batch."""
        batch_size = batch_size or self.batch_size
        state_device = state_device or self.state_device
        windows = as_windows(windows)
        states = HiddenStates(windows.ids, batch_size, block_args=[[] for _ in self.blocks])
        tensors: dict[tuple, list[Tensor]] = {}
        known: dict[int, tuple[Tensor, Tensor]] = {}  # per call of the model
        received: list[Tensor] = []  # hidden states that the blocks of this batch received

        def recorder(index: int, batch: slice) -> Callable:
            def forward(hidden_states, *args, **kwargs):
                received.append(hidden_states)
                if len(received) != index + 1 or hidden_states is not received[0]:
                    raise self._unsupported("does something between its decoder blocks")
                if index == 0:
                    shape = states.windows[batch].shape
                    if hidden_states.dim() != 3 or hidden_states.shape[:2] != shape:
                        raise self._unsupported(
                            "has hidden states of another shape than its windows"
                        )
                    states.put(batch, hidden_states, state_device)
                unique = partial(first_equal, tensors, known)
                states.block_args[index].append(tree_map(unique, (args, kwargs)))
                if index == len(self.blocks) - 1:
                    raise Stop
                return self._block_output(index, hidden_states)

            return forward

        for batch in states.batches:
            received.clear()
            known.clear()
            recorders = {block: recorder(i, batch) for i, block in enumerate(self.blocks)}
            with replaced(recorders):
                self._call_model(windows[batch])
        return states

    def iter_batches(
        self, states: HiddenStates, index: int, block: nn.Module | None = None
    ) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
        """Yield for each batch its slice and a function for its output (n, tokens, hidden).

        `block`, if given, replaces block `index`.
        """
        block = block or self.blocks[index]
        for batch, block_args in zip(states.batches, states.block_args[index], strict=True):
            hidden = states.hidden[batch].to(self.device)
            yield batch, partial(run_block, block, hidden, *block_args)

    @torch.no_grad()
    def advance_(self, states: HiddenStates, index: int, block: nn.Module | None = None) -> None:
        """Replace the hidden states by block `index`'s outputs, in place."""
        for batch, run in self.iter_batches(states, index, block):
            states.hidden[batch] = run()

    def run_blocks(
        self,
        sets: Sequence[Tensor | Windows],
        on_block: Callable[[int], None] = lambda index: None,
        state_device: torch.device | str | None = None,
    ) -> list[HiddenStates]:
        """Return hidden states after the last block for each set of windows (n, tokens).

        Each block is fetched once. `on_block` is called with its index when it is done.
        """
        if self.whole:
            state_device = state_device or self.state_device
            all_states = [self._whole_states(as_windows(each), state_device) for each in sets]
            for index in range(len(self.blocks)):
                on_block(index)
            return all_states
        all_states = [self.capture(windows, state_device=state_device) for windows in sets]
        for index in range(len(self.blocks)):
            with self.on_device(index):
                for states in all_states:
                    self.advance_(states, index)
            on_block(index)
        return all_states

    @torch.no_grad()
    def _whole_states(self, windows: Windows, state_device: torch.device | str) -> HiddenStates:
        """Return the decoder's own output for windows (n, tokens), all blocks in one call."""
        states = HiddenStates(windows.ids, self.batch_size)

        def see(decoder: nn.Module, args: tuple, out: Any) -> None:
            hidden, self.output = out.last_hidden_state, type(out)
            states.put(batch, hidden, state_device)
            raise Stop

        with self._decoder.register_forward_hook(see):
            for batch in states.batches:
                self._call_model(windows[batch])
        return states

    @property
    def _decoder(self) -> nn.Module:
        return self.model.get_submodule(self.name.rpartition(".")[0])

    def iter_final_states(
        self,
        sets: Sequence[Tensor | Windows],
        on_progress: Callable[[int], None] = lambda windows: None,
    ) -> Iterator[tuple[int, int, HiddenStates]]:
        """Yield hidden states after the last block: number of the set, first window, states.

        If fetching a block costs nothing, each batch goes through all blocks and few states are
        kept. If blocks are fetched, each block sees up to `most_windows` windows before the next
        one. `on_progress` is called with the number of finished windows.
        """
        resident, blocks = self.weights.zero_copy, len(self.blocks)
        most = self.batch_size if resident else self.most_windows or max(1, sum(map(len, sets)))
        groups: list[list[tuple[int, slice]]] = [[]]
        room = most
        for number, each in enumerate(sets):
            start = 0
            while start < len(each):
                # batches begin where they would alone, which keeps results equal
                room -= room % self.batch_size if room < len(each) - start else 0
                if not room or (resident and groups[-1]):
                    groups.append([])
                    room = most
                stop = min(start + room, len(each))
                groups[-1].append((number, slice(start, stop)))
                room -= stop - start
                start = stop
        groups = [group for group in groups if group]
        if self.weights.collective:  # every rank fetches each block equally often
            most = max(self.dist.all_gather_object(len(groups)))
            groups += [[]] * (most - len(groups))
        for group in groups:
            windows = [sets[number][part] for number, part in group]
            total = sum(map(len, windows))

            def on_block(index: int, total=total) -> None:
                on_progress(total * (index + 1) // blocks - total * index // blocks)

            where = self.device if resident else self.state_device
            every = self.run_blocks(windows, on_block, where)
            for (number, part), states in zip(group, every, strict=True):
                yield number, part.start, states

    @torch.no_grad()
    def logits(self, states: HiddenStates, batch: slice) -> Callable[[Tensor], Tensor]:
        """Return a function from positions to a batch's logits (n, len(positions), vocabulary).

        The batch's hidden states after the last block are fetched once.
        """
        ids = states.windows[batch].to(self.device)
        last = states.hidden[batch].to(self.device)
        return torch.no_grad()(lambda positions: self.logits_from_hidden(ids, last, positions))

    def logits_from_hidden(self, ids: Tensor, last: Tensor, positions: Tensor) -> Tensor:
        """Return logits (n, len(positions), vocabulary) of windows `ids` (n, tokens).

        `last` are their hidden states (n, tokens, hidden) after the last block, which receive
        gradients.
        """

        def forward(index, hidden_states, *args, **kwargs):
            is_last = index == len(self.blocks) - 1
            return self._block_output(index, last if is_last else hidden_states)

        if self.whole:
            played = {self._decoder: lambda *_, **__: self.output(last_hidden_state=last)}
        else:
            played = {block: partial(forward, i) for i, block in enumerate(self.blocks)}
        with replaced(played):
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
        return logits if logits.shape[1] == len(positions) else logits[:, positions]

    @torch.no_grad()
    def verify(self) -> None:
        """Raise UserError if the runner does not give the model's own logits on a few tokens."""
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None]
        try:
            (states,) = self.run_blocks([ids], state_device=self.device)
            logits = self.logits(states, slice(0, 1))(ids[0]).float()
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._unsupported("has blocks that depend on each other") from error
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        comparable = expected.isfinite().all(-1)  # (1, tokens); nan is reported later, per layer
        logits, expected = logits[comparable], expected[comparable]
        if not (logits - expected).norm() <= PROBE_TOLERANCE * expected.norm():  # also rejects nan
            raise self._unsupported("computes more than its decoder blocks one after another")

    @property
    def named(self) -> str:
        """The model's name in messages: `--model NAME`."""
        return f"{self.flag} {self.model.name_or_path}"

    def _unsupported(self, what: str) -> UserError:
        kind = type(self.model).__name__
        return UserError(
            f"{self.named} ({kind})", f"this architecture {what}", "It cannot be pruned"
        )

    def _block_output(self, index: int, hidden: Tensor) -> Tensor | tuple:
        """Return hidden states in the form of block `index`'s output."""
        length = self.tuples[type(self.blocks[index])]
        return (hidden, *[None] * (length - 1)) if length else hidden

    @torch.no_grad()
    def _probe(self) -> dict[type, int]:
        """Return the length of the tuple that each class of block returns; 0 for a tensor."""
        lengths: dict[type, int] = {}
        classes = {type(block) for block in self.blocks}

        def see(block: nn.Module, _: tuple, out: Any) -> None:
            lengths[type(block)] = len(out) if isinstance(out, tuple) else 0
            if len(lengths) == len(classes):
                raise Stop

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.enter_context(block.register_forward_hook(see))
            self._call_model(Windows(torch.zeros(1, 2, dtype=torch.long)))
        return lengths

    def _call_model(self, windows: Windows) -> None:
        """Call the model, with positions if documents share a window and it takes positions.

        Its own code then separates the documents' masks, in most architectures with attention.
        """
        more, positions = {}, windows.positions
        if positions is not None and not positions[:, 1:].all():
            if "position_ids" in signature(self.model.forward).parameters:
                more["position_ids"] = positions.to(self.device)
        try:
            self.model(input_ids=windows.ids.to(self.device), use_cache=False, **more)
        except Stop:
            return
        raise self._unsupported("does not go through its last decoder block")


class Stop(Exception):
    """Ends a forward pass early."""


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Replace the forwards of modules, and restore them afterwards."""
    with ExitStack() as patches:
        for module, forward in forwards.items():
            patches.enter_context(mock.patch.object(module, "forward", forward))
        yield


def run_block(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """Return a block's hidden states (n, tokens, hidden), without its other outputs."""
    out = block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def first_equal(
    tensors: dict[tuple, list[Tensor]], known: dict[int, tuple[Tensor, Tensor]], value: Any
) -> Any:
    """Return the first tensor that equals `value`; other objects are returned unchanged.

    `tensors` has earlier tensors by shape, dtype and device, and collects new ones: most arguments
    of blocks are the same in all batches. `known` caches results by tensor id within one call of
    the model, because a comparison reads both tensors and waits for a GPU.
    """
    if isinstance(value, UserDict):  # keys and values that blocks pass to later blocks
        return copy.copy(value)
    if not isinstance(value, Tensor):
        return value
    if id(value) not in known:
        alike = tensors.setdefault((value.shape, value.dtype, value.device), [])
        first = next((each for each in alike if torch.equal(value, each)), value)
        if first is value:
            alike.append(value)
        known[id(value)] = value, first
    return known[id(value)][1]


def iter_logits(
    logits: Callable[[Tensor], Tensor],
    length: int,
    device: torch.device,
    chunk: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions 0 to `length` in chunks, with their logits (n, chunk, vocabulary).

    Without `chunk`, the first is one position, whose logits give the number within LOGIT_BYTES.
    """
    start, size = 0, chunk or 1
    while start < length:
        positions = torch.arange(start, min(start + size, length), device=device)
        chunk_logits = logits(positions)
        size = chunk or positions_at_once(device, chunk_logits.shape[-1], len(chunk_logits))
        start += len(positions)
        yield positions, chunk_logits
        del chunk_logits  # freed before the next chunk


def positions_at_once(device: torch.device, vocabulary: int, windows: int, least: int = 1) -> int:
    """Return how many positions of `windows` windows have their logits in memory at a time.

    Over all windows these are at least `least` positions, even beyond LOGIT_BYTES.
    """
    return max(1, max(rows_at_once(device, vocabulary), least) // windows)


def rows_at_once(device: torch.device, vocabulary: int) -> int:
    """Return how many float32 rows of logits (vocabulary,) fit into LOGIT_BYTES, at least one."""
    size = LOGIT_BYTES if device.type == "cpu" else GPU_LOGIT_BYTES
    return max(1, size // (4 * vocabulary))
