"""Perplexity by the published rule, through the same sweep, with logits in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import UserError
from lib.finite import first_overflow
from lib.parallel import Team
from lib.sweep import Stream, Sweep

COMPARED_POSITIONS = 64  # of a window, before and after linears are packed
LOGIT_BYTES = 2**24  # of float32 logits that stand at a time


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of each window's mean negative log-likelihood, in nats."""

    value: float
    standard_error: float  # of `value`, from the spread over windows
    nats: float  # negative log-likelihood of all predicted tokens together

    def bits_per_byte(self, size: int) -> float:
        """Of a text of `size` bytes: comparable between tokenizers, which perplexity is not."""
        return self.nats / math.log(2) / size


def perplexity(sweep: Sweep, windows: Tensor, batch_size: int) -> Perplexity:
    """Perplexity of windows (n, tokens)."""
    return perplexities(sweep, [windows], batch_size)[0]


def perplexities(
    sweep: Sweep,
    tests: Sequence[Tensor],
    batch_size: int,
    team: Team | None = None,
    advanced: Callable[[int], None] = lambda windows: None,
) -> list[Perplexity]:
    """Perplexity of each test set, windows (n, tokens).

    Where the model stands on the device, each batch goes through all blocks and no hidden states
    are kept; where blocks are fetched, each sees all sets before the next one is. Processes of
    a `team` share the windows. `advanced` is called with the number of windows that are done.
    """
    team = team or Team(sweep.device, alone=True)
    losses = [torch.zeros(len(test), dtype=torch.float64, device=sweep.device) for test in tests]
    shares = [range(len(test))[team.share(len(test))] for test in tests]
    resident = sweep.placement is None
    step = batch_size if resident else max(map(len, tests))
    parts = [
        (number, slice(start, min(start + step, mine.stop)))
        for number, mine in enumerate(shares)
        for start in mine[::step]
    ]
    for lot in [[part] for part in parts] if resident else [parts]:
        if not lot:  # more processes than windows: no block need be fetched
            continue
        done = [(cut.stop - cut.start) * len(tests[i]) // len(shares[i]) for i, cut in lot]
        sets = [tests[number][cut] for number, cut in lot]
        found = _losses_of(sweep, sets, batch_size, sum(done), advanced)
        for (number, cut), its in zip(lot, found, strict=True):
            losses[number][cut] = its
    for handle in team.sum_(losses):
        handle.wait()
    return [_mean(sweep, *both) for both in zip(tests, losses, strict=True)]


def _mean(sweep: Sweep, windows: Tensor, losses: Tensor) -> Perplexity:
    """Of windows (n, tokens) with these losses (n,); UserError where they are not finite."""
    mean = losses.mean().item()
    if not math.isfinite(mean):
        where = first_overflow(sweep, windows[~losses.isfinite().cpu()][:1])
        raise UserError(f"{where}: activations are not finite; try --dtype float32")
    value = math.exp(mean) if mean < 700 else math.inf
    spread = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return Perplexity(value, value * spread, mean * len(losses) * (windows.shape[1] - 1))


def _losses_of(
    sweep: Sweep,
    sets: list[Tensor],
    batch_size: int,
    shown: int,
    advanced: Callable[[int], None],
) -> list[Tensor]:
    """Mean negative log-likelihood of each window (n,), of each set.

    `advanced` is told `shown` in all: a part after each block, and the last when all is done.
    """
    keep_on = sweep.device if sweep.placement is None else "cpu"
    streams = [sweep.record(windows, batch_size, keep_on) for windows in sets]
    steps = len(sweep.blocks) + 1  # the head is one
    for index in range(steps - 1):
        with sweep.at_hand(index):
            for stream in streams:
                sweep.advance_(stream, index)
        advanced(shown * (index + 1) // steps - shown * index // steps)
    losses = [
        torch.cat([_losses(sweep, stream, batch) for batch in stream.batches]).double()
        for stream in streams
    ]
    advanced(shown - shown * (steps - 1) // steps)
    return losses


def _losses(sweep: Sweep, stream: Stream, batch: slice) -> Tensor:
    """Mean negative log-likelihood of each window in the batch, (n,)."""
    ids = stream.windows[batch].to(sweep.device)  # (n, tokens)
    predicted = ids.shape[1] - 1
    vocabulary = sweep.model.config.get_text_config(decoder=True).vocab_size
    chunk = max(1, LOGIT_BYTES // (4 * vocabulary * len(ids)))
    total = torch.zeros(len(ids), device=sweep.device)
    for start in range(0, predicted, chunk):
        positions = torch.arange(start, min(start + chunk, predicted), device=sweep.device)
        logits = sweep.logits(stream, batch, positions).float()  # (n, chunk, vocabulary)
        targets = ids[:, positions + 1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        total += loss.view(len(ids), -1).sum(1)
    return total / predicted


@torch.no_grad()
def some_logits(model: nn.Module, window: Tensor) -> Tensor:
    """Logits (1, positions, vocabulary) at the last positions of a window (1, tokens)."""
    kept = min(COMPARED_POSITIONS, window.shape[1])
    return model(input_ids=window, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
