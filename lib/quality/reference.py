"""The dense model's hidden states on test windows, which a pruned model is compared with.

    # before pruning
    reference = DenseReference(tail_of(runner), dense_states(runner, tests, batch_size))
    # afterwards
    perplexities(runner, tests, batch_size, reference=reference)

The host keeps the states after the last block, in the model's dtype. Their logits are computed
again when they are needed: `vocabulary / hidden` times as many numbers. The embedding, the final
norm and the head that do so are those of the dense model, whatever becomes of the pruned one's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.distributed.context import DistContext
from lib.model.blocks import BlockRunner
from lib.model.pretrained import decoder_blocks

COMPARED_WINDOWS = 64  # of each test set, at most

States = list[dict[int, Tensor]]  # for each test set {window: hidden states (tokens, hidden)}


def compared_windows(count: int) -> list[int]:
    """Return the numbers of the compared windows, spread evenly over the `count` of a test set."""
    chosen = min(count, COMPARED_WINDOWS)
    return [index * count // chosen for index in range(chosen)]


def reference_bytes(counts: Sequence[int], window: int, dist: DistContext) -> int:
    """Return the bytes of host memory that the states take in this process.

    `counts`: windows of each test set; `window`: bytes of one window's hidden states.
    """
    return window * sum(len(own_windows(count, dist)) for count in counts)


def own_windows(count: int, dist: DistContext) -> list[int]:
    """Return the compared windows that belong to this process."""
    indices = range(count)[dist.share(count)]
    return [window for window in compared_windows(count) if window in indices]


@dataclass
class DenseReference:
    """Computes the dense model's logits on the compared windows."""

    tail: BlockRunner  # its blocks have no weights
    states: States

    def logits(
        self, test: int, first: int, ids: Tensor
    ) -> tuple[list[int], Callable[[Tensor], Tensor]]:
        """Return which of windows `ids` (n, tokens) are compared, and a function for their logits.

        `first`: the number of the first window in its test set. The second value turns positions
        into logits (compared, len(positions), vocabulary).
        """
        states = self.states[test]
        rows = [row for row in range(len(ids)) if first + row in states]
        if not rows:
            return rows, lambda positions: ids.new_empty(0)
        hidden = torch.stack([states[first + row] for row in rows]).to(ids.device)
        compared = ids[rows]

        @torch.no_grad()
        def logits(positions: Tensor) -> Tensor:
            return self.tail.logits_from_hidden(compared, lambda: hidden, positions)

        return rows, logits


def dense_states(
    runner: BlockRunner,
    tests: Sequence[Tensor],
    batch_size: int,
    dist: DistContext | None = None,
    on_progress: Callable[[int], None] = lambda windows: None,
    state_device: torch.device | str = "cpu",
) -> States:
    """Compute hidden states after the last block, on the host, of this process's windows.

    `runner`: of the dense model; `tests`: windows (n, tokens) of each test set. Where blocks are
    fetched, each comes once for all windows, whose states are on `state_device` meanwhile.
    `on_progress` is called with the number of windows that are done.
    """
    dist = dist or DistContext(runner.device, alone=True)
    resident = runner.weights.zero_copy
    chosen = [own_windows(len(test), dist) for test in tests]
    step = batch_size if resident else COMPARED_WINDOWS
    batches = [
        (number, indices[start : start + step])
        for number, indices in enumerate(chosen)
        for start in range(0, len(indices), step)
    ]
    hidden_states: States = [{} for _ in tests]
    where = runner.device if resident else state_device
    for group in [[batch] for batch in batches] if resident or not batches else [batches]:
        windows = [tests[number][indices] for number, indices in group]
        all_states = runner.run_blocks(windows, batch_size, where)
        for (number, indices), states in zip(group, all_states, strict=True):
            hidden_states[number] |= zip(indices, states.hidden.cpu(), strict=True)
        on_progress(sum(map(len, windows)))
    return hidden_states


@torch.no_grad()
def tail_of(runner: BlockRunner) -> BlockRunner:
    """Return a runner with a copy of the model whose blocks have no weights.

    Matrices outside the blocks share memory with the model's; vectors are copied, since they may be
    trained.
    """
    inside = {id(tensor) for block in runner.blocks for tensor in _tensors(block)}
    memo: dict[int, Tensor] = {}
    for tensor in _tensors(runner.model):
        if id(tensor) in inside:
            value = torch.empty_like(tensor, device="meta")
        elif tensor.dim() > 1:
            value = tensor.data
        else:
            continue
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if parameter else value
    tail = copy.copy(runner)
    tail.model = copy.deepcopy(runner.model, memo)
    tail.blocks = decoder_blocks(tail.model)[1]
    return tail


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
