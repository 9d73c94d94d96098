"""Perplexity by the published rule, through the same runner, with logits in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.distributed.context import DistContext
from lib.model.blocks import (
    HEAD_POSITIONS,
    BlockRunner,
    HiddenStates,
    iter_logits,
    positions_at_once,
    rows_at_once,
)
from lib.model.finite import first_overflow
from lib.util.errors import UserError

COMPARED_POSITIONS = 64  # of a window, before and after linears are packed
TRIED_WINDOWS, TRIED_TOKENS = 4, 256  # to see whether the model needs its BOS token


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of each window's mean negative log-likelihood, in nats."""

    value: float
    standard_error: float  # of `value`, from the spread over windows
    nats: float  # negative log-likelihood of all predicted tokens together

    def bits_per_byte(self, size: int) -> float:
        """Of a text of `size` bytes: comparable between tokenizers, which perplexity is not."""
        return self.nats / math.log(2) / size


def perplexity(runner: BlockRunner, windows: Tensor, batch_size: int) -> Perplexity:
    """Perplexity of windows (n, tokens)."""
    return perplexities(runner, [windows], batch_size)[0]


def perplexities(
    runner: BlockRunner,
    tests: Sequence[Tensor],
    batch_size: int,
    dist: DistContext | None = None,
    on_progress: Callable[[int], None] = lambda windows: None,
    state_device: torch.device | str = "cpu",
) -> list[Perplexity]:
    """Perplexity of each test set, windows (n, tokens).

    Where bringing a block costs nothing, each batch goes through all blocks and no hidden states
    are kept; where blocks are fetched, each sees all sets before the next one is, and
    `state_device` is where hidden states are. The processes of `dist` share the windows.
    `on_progress` is called with the
    number of windows that are done.
    """
    dist = dist or DistContext(runner.device, alone=True)
    losses = [torch.zeros(len(test), dtype=torch.float64, device=runner.device) for test in tests]
    shares = [range(len(test))[dist.share(len(test))] for test in tests]
    resident = runner.placement is None or runner.placement.zero_copy
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
        where = runner.device if resident else state_device
        found = _losses_of(runner, sets, batch_size, where, sum(done), on_progress)
        for (number, cut), its in zip(lot, found, strict=True):
            losses[number][cut] = its
    dist.barrier()
    for handle in dist.all_reduce_(losses):
        handle.wait()
    return [_mean(runner, *both) for both in zip(tests, losses, strict=True)]


def _mean(runner: BlockRunner, windows: Tensor, losses: Tensor) -> Perplexity:
    """Of windows (n, tokens) with these losses (n,); UserError where they are not finite."""
    mean = losses.mean().item()
    if not math.isfinite(mean):
        where = first_overflow(runner, windows[~losses.isfinite().cpu()][:1])
        raise UserError(f"{where}: activations are not finite; try --dtype float32")
    value = math.exp(mean) if mean < 700 else math.inf
    spread = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return Perplexity(value, value * spread, mean * len(losses) * (windows.shape[1] - 1))


def _losses_of(
    runner: BlockRunner,
    sets: list[Tensor],
    batch_size: int,
    state_device: torch.device | str,
    shown: int,
    on_progress: Callable[[int], None],
) -> list[Tensor]:
    """Mean negative log-likelihood of each window (n,), of each set.

    `on_progress` is told `shown` in all: a part after each block, and the last when all is done.
    """
    several = [runner.capture(windows, batch_size, state_device) for windows in sets]
    steps = len(runner.blocks) + 1  # the head is one
    for index in range(steps - 1):
        with runner.on_device(index):
            for states in several:
                runner.advance_(states, index)
        on_progress(shown * (index + 1) // steps - shown * index // steps)
    losses = [
        torch.cat([_losses(runner, states, batch) for batch in states.batches]).double()
        for states in several
    ]
    on_progress(shown - shown * (steps - 1) // steps)
    return losses


def _losses(runner: BlockRunner, states: HiddenStates, batch: slice) -> Tensor:
    """Mean negative log-likelihood of each window in the batch, (n,)."""
    ids = states.windows[batch].to(runner.device)  # (n, tokens)
    predicted = ids.shape[1] - 1
    vocabulary = runner.model.config.get_text_config(decoder=True).vocab_size
    chunk = positions_at_once(runner.device, vocabulary, len(ids), HEAD_POSITIONS)
    total = torch.zeros(len(ids), device=runner.device)
    logits_at = runner.logits(states, batch)
    for positions, logits in iter_logits(logits_at, predicted, runner.device, chunk):
        loss = cross_entropy(logits.flatten(0, 1), ids[:, positions + 1].flatten())
        total += loss.view(len(ids), -1).sum(1)
        del logits  # before the next ones come
    return total / predicted


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (rows,) of `targets` (rows,) under logits (rows, vocabulary).

    It is computed in float32, from as many rows at a time as LOGIT_BYTES allows.
    """
    step = rows_at_once(logits.device, logits.shape[-1])
    pieces = zip(logits.split(step), targets.split(step), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in pieces])


@torch.no_grad()
def some_logits(model: nn.Module, window: Tensor) -> Tensor:
    """Logits (1, positions, vocabulary) at the last positions of a window (1, tokens)."""
    kept = min(COMPARED_POSITIONS, window.shape[1])
    return model(input_ids=window, use_cache=False, logits_to_keep=kept).logits[:, -kept:]


COLLAPSE = 1.5  # perplexity without BOS over that with it, from which on a model needs it


def needs_bos(runner: BlockRunner, windows: Tensor, bos: int) -> bool:
    """Whether perplexity on the first of windows (n, tokens) collapses without BOS."""
    bare = windows[:TRIED_WINDOWS, :TRIED_TOKENS].clone()
    begun = torch.cat([bare.new_full((len(bare), 1), bos), bare[:, :-1]], dim=1)
    without, begun = (perplexity(runner, ids, 1).value for ids in (bare, begun))
    return without > COLLAPSE * begun


def check_tasks(names: Sequence[str]) -> None:
    """UserError where lm-eval is not installed or lacks a task; before anything slow."""
    given = ",".join(names)
    if find_spec("lm_eval") is None:
        raise UserError(f"--tasks {given}: lm-eval is not installed; pip install lm-eval")
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    for name in names:
        if not known.match_tasks([name]) and not Path(name).is_file():
            raise UserError(
                f"--tasks {name}: lm-eval has no such task; `lm-eval ls tasks` lists all"
            )


def run_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], batch_size: int
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the model in memory, zero-shot as the tasks define it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(model=wrapped, tasks=list(names))["results"]
    return {
        task: {
            metric: value
            for metric, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in found.items()
    }
