"""The dense model's hidden states on test windows, for comparison with the pruned model.

    reference = DenseReference(tail_of(runner), dense_states(runner, tests))  # before pruning
    perplexities(runner, tests, reference=reference)                          # afterwards

The host keeps the states after the last block, in the model's dtype. Their logits, which would be
`vocabulary / hidden` times as many numbers, are recomputed when needed. They are computed with the
dense model's embedding, final norm and head, even if the pruned model's change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.samples import spread
from ..util.files import PARTIAL
from ..util.ranks import DistContext
from .blocks import BlockRunner
from .pretrained import fresh_copy
from .skeleton import decoder_blocks

COMPARED_WINDOWS = 64  # maximum per test set
COMPARED_POSITIONS = 64  # positions of a window compared before and after packing

States = list[dict[int, Tensor]]  # for each test set {window: hidden states (tokens, hidden)}


def compared_windows(count: int) -> list[int]:
    """Return the numbers of the compared windows, evenly spaced over the `count` of a test set."""
    return spread(count, COMPARED_WINDOWS)


def local_windows(count: int, dist: DistContext) -> list[int]:
    """Return the compared windows that belong to this rank."""
    indices = range(count)[dist.shard(count)]
    return [window for window in compared_windows(count) if window in indices]


@torch.no_grad()
def some_logits(model: nn.Module, window: Tensor) -> Tensor:
    """Return logits (1, positions, vocabulary) at the last positions of a window (1, tokens)."""
    kept = min(COMPARED_POSITIONS, window.shape[1])
    return model(input_ids=window, use_cache=False, logits_to_keep=kept).logits[:, -kept:]


@dataclass
class DenseReference:
    """Computes the dense model's logits on the compared windows."""

    tail: BlockRunner  # its blocks have no weights
    states: States

    def logits(
        self, test: int, numbers: Sequence[int], ids: Tensor
    ) -> tuple[list[int], Callable[[Tensor], Tensor]]:
        """Return which windows of `ids` (n, tokens) are compared, and a function for their logits.

        `numbers` are the windows' numbers in their test set. The function takes positions and
        returns logits (compared, len(positions), vocabulary).
        """
        states = self.states[test]
        rows = [row for row, number in enumerate(numbers) if number in states]
        if not rows:
            return rows, lambda positions: ids.new_empty(0)
        hidden = torch.stack([states[numbers[row]] for row in rows]).to(ids.device)
        tail, compared = self.tail, ids[rows]
        return rows, torch.no_grad()(lambda at: tail.logits_from_hidden(compared, hidden, at))


def dense_states(
    runner: BlockRunner,
    tests: Sequence[Tensor],
    on_progress: Callable[[int], None] = lambda windows: None,
) -> States:
    """Compute hidden states after the last block, on the host, of this rank's compared windows.

    `runner` holds the dense model; `tests` are windows (n, tokens) of each test set.
    """
    chosen = [local_windows(len(test), runner.dist) for test in tests]
    local = [test[indices] for test, indices in zip(tests, chosen, strict=True)]
    hidden: States = [{} for _ in tests]
    for number, start, states in runner.iter_final_states(local, on_progress):
        indices = chosen[number][start : start + len(states.windows)]
        hidden[number] |= zip(indices, states.hidden.cpu(), strict=True)
    return hidden


def shared_states(folder: Path, key: str, compute: Callable[[], States]) -> States:
    """Return the states that another run stored in `folder` under `key`, or compute them."""
    file = folder / f"dense-{key}.pt"
    if not file.is_file():
        folder.mkdir(exist_ok=True)
        torch.save(compute(), file.with_suffix(PARTIAL))
        file.with_suffix(PARTIAL).replace(file)
    return torch.load(file)


def tail_of(runner: BlockRunner) -> BlockRunner:
    """Return a runner with a copy of the model whose blocks have no weights."""
    tail = copy.copy(runner)
    tail.weights = None  # they hold the dense model's blocks, which the caller may free
    tail.model = fresh_copy(runner.model, with_blocks=False)
    tail.blocks = decoder_blocks(tail.model)[1]
    return tail
