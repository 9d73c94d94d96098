"""Perplexity by the published rule, and how far a model is from the dense one on the same text.

Both come from the same logits, which are computed in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.distributed.context import DistContext
from lib.model.blocks import (
    HEAD_POSITIONS,
    LOGIT_BYTES,
    BlockRunner,
    HiddenStates,
    iter_logits,
    positions_at_once,
    rows_at_once,
)
from lib.model.finite import first_overflow
from lib.model.shapes import FLOAT, StepBytes, Workload
from lib.quality.reference import DenseReference, compared_windows
from lib.util.errors import UserError

FIGURES = "loss", "kl", "agreement"  # of each window
COMPARED_POSITIONS = 64  # of a window, before and after linears are packed
TRIED_WINDOWS, TRIED_TOKENS = 4, 256  # to see whether the model needs its BOS token


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the dense one, over all predicted positions of `windows` windows."""

    kl: float  # mean KL(dense || model), nats a token
    kl_standard_error: float  # from the spread over windows, as below; nan for a single window
    top1_agreement: float  # share of positions where both have the same most likely token
    top1_agreement_standard_error: float
    windows: int


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of each window's mean negative log-likelihood, in nats."""

    value: float
    standard_error: float  # of `value`, from the spread over windows
    nats: float  # negative log-likelihood of all predicted tokens together
    divergence: Divergence | None = None  # where it was compared with the dense model

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
    reference: DenseReference | None = None,
) -> list[Perplexity]:
    """Perplexity of each test set, windows (n, tokens), and with `reference` its divergence.

    Where bringing a block costs nothing, each batch goes through all blocks and no hidden states
    are kept; where blocks are fetched, each sees all sets before the next one is, and
    `state_device` is where hidden states are. The processes of `dist` share the windows, as they
    did for `reference`. `on_progress` is called with the number of windows that are done.
    UserError where a loss is not finite.
    """
    dist = dist or DistContext(runner.device, alone=True)
    zeros = partial(torch.zeros, dtype=torch.float64, device=runner.device)
    figures = [zeros(len(FIGURES), len(test)) for test in tests]
    shares = [range(len(test))[dist.share(len(test))] for test in tests]
    resident = runner.weights.zero_copy
    step = batch_size if resident else max(map(len, tests))
    parts = [
        (number, slice(start, min(start + step, mine.stop)))
        for number, mine in enumerate(shares)
        for start in mine[::step]
    ]
    for group in [[part] for part in parts] if resident else [parts]:
        if not group:  # more processes than windows: no block need be fetched
            continue
        done = [(cut.stop - cut.start) * len(tests[i]) // len(shares[i]) for i, cut in group]
        own = _figures_of(
            runner,
            [(number, cut.start, tests[number][cut]) for number, cut in group],
            batch_size,
            runner.device if resident else state_device,
            _split_progress(on_progress, sum(done), len(runner.blocks) + 1),
            reference,
        )
        for (number, cut), by_window in zip(group, own, strict=True):
            figures[number][:, cut] = by_window
    dist.barrier()
    for handle in dist.all_reduce_(figures):
        handle.wait()
    return [
        _mean(runner, test, *by_window, compared=reference is not None)
        for test, by_window in zip(tests, figures, strict=True)
    ]


def _mean(
    runner: BlockRunner,
    windows: Tensor,
    losses: Tensor,
    kl: Tensor,
    agreement: Tensor,
    *,
    compared: bool,
) -> Perplexity:
    """Means over windows (n, tokens) of their figures (n,) each."""
    mean = losses.mean().item()
    if not math.isfinite(mean):
        where = first_overflow(runner, windows[~losses.isfinite().cpu()][:1])
        raise UserError(f"{where}: activations are not finite; try --dtype float32")
    value = math.exp(mean) if mean < 700 else math.inf
    nats = mean * len(losses) * (windows.shape[1] - 1)
    divergence = None
    if compared:
        chosen = compared_windows(len(windows))
        kl, agreement = kl[chosen], agreement[chosen]
        divergence = Divergence(
            kl=kl.mean().item(),
            kl_standard_error=_standard_error(kl),
            top1_agreement=agreement.mean().item(),
            top1_agreement_standard_error=_standard_error(agreement),
            windows=len(chosen),
        )
    return Perplexity(value, value * _standard_error(losses), nats, divergence)


def _standard_error(values: Tensor) -> float:
    """Of the mean of values (n,); nan for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _split_progress(
    on_progress: Callable[[int], None], windows: int, steps: int
) -> Callable[[], None]:
    """A function for `steps` calls, which tell `on_progress` of parts of `windows` windows."""
    ends = iter(range(1, steps + 1))

    def advance() -> None:
        step = next(ends)
        on_progress(windows * step // steps - windows * (step - 1) // steps)

    return advance


def _figures_of(
    runner: BlockRunner,
    sets: list[tuple[int, int, Tensor]],
    batch_size: int,
    state_device: torch.device | str,
    advance: Callable[[], None],
    reference: DenseReference | None,
) -> list[Tensor]:
    """FIGURES (figures, n) of each set of windows: number of its test set, that of its first
    window, and the windows (n, tokens). `advance` is called after each block, and after the head.
    """
    several = runner.run_blocks(
        [windows for *_, windows in sets], batch_size, state_device, lambda block: advance()
    )
    figures = []
    for (number, first, _), states in zip(sets, several, strict=True):
        parts = []
        for batch in states.batches:
            compare = reference and partial(reference.logits, number, first + batch.start)
            parts.append(_figures(runner, states, batch, compare))
        figures.append(torch.cat(parts, 1).double())
    advance()
    return figures


def _figures(
    runner: BlockRunner,
    states: HiddenStates,
    batch: slice,
    compare: Callable[[Tensor], tuple[list[int], Callable[[Tensor], Tensor]]] | None,
) -> Tensor:
    """FIGURES of each window in the batch, (figures, n): means over its predicted positions.

    `compare`, of ids (n, tokens): the rows to compare, and what gives their dense logits. Figures
    of the other rows stay 0.
    """
    ids = states.windows[batch].to(runner.device)  # (n, tokens)
    predicted = ids.shape[1] - 1
    vocabulary = runner.model.config.get_text_config(decoder=True).vocab_size
    chunk = positions_at_once(runner.device, vocabulary, len(ids), HEAD_POSITIONS)
    losses, kl, agreement = total = torch.zeros(len(FIGURES), len(ids), device=runner.device)
    rows, dense_logits = compare(ids) if compare else ([], None)
    logits_at = runner.logits(states, batch)
    for positions, logits in iter_logits(logits_at, predicted, runner.device, chunk):
        loss = cross_entropy(logits.flatten(0, 1), ids[:, positions + 1].flatten())
        losses += loss.view(len(ids), -1).sum(1)
        if rows:
            own = logits if len(rows) == len(ids) else logits[rows]
            del logits
            divergence, same = compare_logits(
                dense_logits(positions).flatten(0, 1), own.flatten(0, 1)
            )
            kl[rows] += divergence.view(len(rows), -1).sum(1)
            agreement[rows] += same.view(len(rows), -1).sum(1)
            del own
        else:
            del logits  # before the next ones come
    return total / predicted


def compare_logits(dense: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || own) in nats, and whether the most likely token is the same, (rows,) each.

    Both are logits (rows, vocabulary), softmaxed in float32, as many rows at a time as LOGIT_BYTES
    allows.
    """
    step = rows_at_once(own.device, own.shape[-1])
    divergences, same = [], []
    for q, p in zip(dense.split(step), own.split(step), strict=True):
        same.append(q.argmax(-1) == p.argmax(-1))
        log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        divergences.append((log_q.exp() * log_p.neg_().add_(log_q)).sum(-1))
    return torch.cat(divergences), torch.cat(same)


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


def evaluation_bytes(load: Workload, block_by_block: bool, compared: bool) -> StepBytes:
    """Memory of perplexities: hidden states, of all windows if each block comes once for all, and
    the larger of a batch in a block and its logits with their softmax, taken in pieces.

    `compared`: beside the dense model's logits.
    """
    batch = min(load.batch_size, load.tests)
    row = FLOAT * load.shapes.vocabulary
    rows = max(batch, HEAD_POSITIONS, LOGIT_BYTES[load.device] // row)
    rows = min(rows, batch * load.seqlen)
    piece = min(max(row, LOGIT_BYTES[load.device]), row * rows)
    pieces = piece if load.working == torch.float32 else 2 * piece  # in float32, and their softmax
    logits = rows * load.shapes.vocabulary * load.working.itemsize
    work = logits + pieces + (logits + piece if compared else 0)
    hidden = load.hidden_states(load.tests if block_by_block else batch)
    return StepBytes(hidden, max(work, load.activations()))
