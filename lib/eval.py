"""Perplexity by the published rule, through the same sweep, with logits in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def perplexity(
    sweep: Sweep,
    windows: Tensor,
    batch_size: int,
    team: Team | None = None,
    advanced: Callable[[int], None] = lambda windows: None,
) -> Perplexity:
    """Perplexity of windows (n, tokens).

    Where the model stands on the device, each batch goes through all blocks and no hidden states
    are kept; where blocks are fetched, each sees all windows before the next one is. Processes of
    a `team` share the windows. `advanced` is called with the number of windows that are done.
    """
    team = team or Team(sweep.device, alone=True)
    losses = torch.zeros(len(windows), dtype=torch.float64, device=sweep.device)
    mine = range(len(windows))[team.share(len(windows))]
    step = batch_size if sweep.placement is None else max(1, len(mine))
    for start in mine[::step]:
        part = slice(start, min(start + step, mine.stop))
        losses[part] = _losses_of(sweep, windows[part], batch_size)
        advanced((part.stop - part.start) * len(windows) // len(mine))
    for handle in team.sum_([losses]):
        handle.wait()
    mean = losses.mean().item()
    if not math.isfinite(mean):
        where = first_overflow(sweep, windows[~losses.isfinite().cpu()][:1])
        raise UserError(f"{where}: activations are not finite; try --dtype float32")
    value = math.exp(mean) if mean < 700 else math.inf
    spread = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return Perplexity(value, value * spread, mean * len(losses) * (windows.shape[1] - 1))


def _losses_of(sweep: Sweep, windows: Tensor, batch_size: int) -> Tensor:
    """Mean negative log-likelihood of each window, (n,)."""
    whole = sweep.placement is None
    stream = sweep.record(windows, batch_size, sweep.device if whole else "cpu")
    for index in range(len(sweep.blocks)):
        with sweep.at_hand(index):
            sweep.advance_(stream, index)
    return torch.cat([_losses(sweep, stream, batch) for batch in stream.batches]).double()


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
