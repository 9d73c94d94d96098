"""Perplexity by the published rule, and divergence from the dense model on the same text.

Both are computed from the same logits, in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .data.samples import Windows, as_windows, prepend
from .model.blocks import (
    HEAD_POSITIONS,
    BlockRunner,
    HiddenStates,
    iter_logits,
    positions_at_once,
    rows_at_once,
)
from .model.reference import DenseReference, compared_windows, local_windows
from .util.errors import UserError
from .util.statistics import quantiles

REVISION = 2  # incremented when the same model and text give other figures
FIGURES = "loss", "dense_loss", "kl", "agreement"  # per window, as named in the losses file
TRIED_WINDOWS, TRIED_TOKENS = 4, 256  # for testing whether the model needs its BOS token
COLLAPSE = 1.5  # least ratio of perplexities without and with BOS at which a model needs it


def perplexity(runner: BlockRunner, windows: Tensor | Windows) -> float:
    """Return the perplexity of windows (n, tokens)."""
    return perplexities(runner, [windows])[0]["perplexity"]


def perplexities(
    runner: BlockRunner,
    tests: Sequence[Tensor | Windows],
    on_progress: Callable[[int], None] = lambda windows: None,
    reference: DenseReference | None = None,
    only_compared: bool = False,
) -> list[dict[str, Any]]:
    """Return the figures of each test set, windows (n, tokens), with masks of counted tokens.

    All means are per counted token, not per window. `perplexity`: exp of the mean negative
    log-likelihood, with its `standard_error` (nan for a single window or dialogue). `nats`: the sum
    over all counted tokens. With `reference`, over `compared_windows` windows: `dense_nats` and
    `model_nats`, both models' mean negative log-likelihood. `dense_sum_nats`: the dense model's
    sum. `loss_change`: the difference of the two. `kl`: the mean KL(dense || model) in nats.
    `top1_agreement`: the share of positions with the same most likely token. The last three have
    standard errors. `kl_of_tokens`: quantiles of the KL of single tokens (`quantiles`).
    `only_compared`: all figures are for these windows. `by_window`: means of each window, {one of
    FIGURES: float32 (windows,)}, nan for windows that were not compared, and their counted
    `tokens`, int32 (windows,).

    The ranks of `runner.dist` share the windows, as they did for `reference`. `on_progress` is
    called with the number of this rank's finished windows. Raises UserError if a loss is not
    finite.
    """
    dist, tests = runner.dist, [as_windows(test) for test in tests]
    counted = [test.counted for test in tests]
    shards = [list(range(len(test))[dist.shard(len(test))]) for test in tests]
    chosen = [slice(None) for _ in tests]
    if only_compared:
        shards = [local_windows(len(test), dist) for test in tests]
        chosen = [compared_windows(len(test)) for test in tests]
    figures = [
        torch.zeros(len(FIGURES), len(test), dtype=torch.float64, device=runner.device)
        for test in tests
    ]
    apart = [torch.zeros(each[:, 1:].shape, device=runner.device) for each in counted]  # KL
    local = [test[shard] for test, shard in zip(tests, shards, strict=True)]
    for number, start, states in runner.iter_final_states(local, on_progress):
        for batch in states.batches:
            which = shards[number][start + batch.start : start + batch.stop]
            compare = reference and partial(reference.logits, number, which)
            weights = counted[number][which, :-1]
            means, divergences = _figures(runner, states, batch, weights, compare)
            figures[number][:, which], apart[number][which] = means.double(), divergences
    dist.sum_([*figures, *(apart if reference else ())])
    return [
        _means(runner, test[of], by_window[:, of].cpu(), kl[of].cpu() if reference else None)
        for test, by_window, kl, of in zip(tests, figures, apart, chosen, strict=True)
    ]


def _means(
    runner: BlockRunner, windows: Windows, by_window: Tensor, apart: Tensor | None
) -> dict[str, Any]:
    """Average FIGURES (figures, n), the means of each of n windows, over all counted tokens.

    `apart` (n, positions) is the KL of each, None if nothing was compared.
    """
    losses, dense, *divergences = by_window
    counts, documents = windows.counted[:, :-1].sum(1), windows.documents
    mean, error = ratio_mean(losses, counts, documents)
    if not math.isfinite(mean):
        fix = "Use --dtype float32, or download the model again"
        raise UserError(runner.named, "activations are not finite", fix)
    value = exp(mean)
    means = {
        "perplexity": value,
        "standard_error": value * error,
        "nats": (losses * counts).sum().item(),
        "by_window": {"tokens": counts.int(), "loss": losses.float()},
    }
    if apart is not None:
        chosen = compared_windows(len(counts))
        values = apart[chosen][windows.counted[chosen, :-1]].numpy()
        means["kl_of_tokens"] = quantiles(values)
        for name, values in zip(FIGURES[1:], by_window[1:], strict=True):
            kept = torch.full((len(counts),), math.nan)
            kept[chosen] = values[chosen].float()
            means["by_window"][name] = kept
        figures = {"loss_change": losses - dense}
        figures |= zip(("kl", "top1_agreement"), divergences, strict=True)
        figures |= {"dense_nats": dense, "model_nats": losses}
        documents = documents if documents is None else documents[chosen]
        for name, values in figures.items():
            mean, error = ratio_mean(values[chosen], counts[chosen], documents)
            means |= {name: mean} | ({} if "nats" in name else {f"{name}_standard_error": error})
        means["compared_windows"] = len(chosen)
        means["dense_sum_nats"] = (dense * counts)[chosen].sum().item()
    return means


def ratio_mean(
    values: Tensor, counts: Tensor, documents: Tensor | None = None
) -> tuple[float, float]:
    """Return the mean per token of `values` (n,), means of windows of `counts` (n,) tokens each,
    and its standard error; nan for a single document.

    The mean is a ratio of two sums, over windows that are drawn with their document: the error is
    that of the linearized ratio, clustered by `documents` (n,), by default each window (Cochran,
    Sampling Techniques, 1977, chapters 6 and 9A). If all windows count equally and are documents,
    both are those of a plain mean, to the bit.
    """
    weights = counts / counts.double().mean()
    mean = (weights * values).mean()
    of, number = torch.arange(len(counts)), len(counts)
    if documents is not None:
        _, of = documents.unique(return_inverse=True)
        number = int(of.max()) + 1

    def sums(each: Tensor) -> Tensor:  # of each document, over a document's mean number of windows
        return torch.zeros(number).double().index_add_(0, of, each) * (number / len(counts))

    spread = sums(weights * values) - mean * (sums(weights) - 1)
    error = spread.std().item() / math.sqrt(number) if number > 1 else math.nan
    return mean.item(), error


def exp(nats: float) -> float:
    """Return the perplexity of a mean loss; inf if it exceeds a float."""
    return math.exp(nats) if nats < 700 else math.inf


def _figures(
    runner: BlockRunner,
    states: HiddenStates,
    batch: slice,
    weights: Tensor,
    compare: Callable[[Tensor], tuple[list[int], Callable[[Tensor], Tensor]]] | None,
) -> tuple[Tensor, Tensor]:
    """Return FIGURES of each window in the batch, (figures, n): means over predicted positions.

    Also the KL at each, (n, positions).

    `weights` (n, positions) is False for positions that do not count. `compare` takes ids
    (n, tokens) and returns the rows to compare and a function for their dense logits. Figures of
    the other rows stay 0.
    """
    ids = states.windows[batch].to(runner.device)  # (n, tokens)
    weights = weights.to(ids.device)
    vocabulary = runner.model.config.get_text_config(decoder=True).vocab_size
    chunk = positions_at_once(runner.device, vocabulary, len(ids), HEAD_POSITIONS)
    losses, dense, kl, agreement = total = torch.zeros(len(FIGURES), len(ids), device=ids.device)
    apart = torch.zeros(weights.shape, device=ids.device)
    rows, dense_logits = compare(ids) if compare else ([], None)
    chosen = torch.tensor(rows, device=ids.device)  # copied once, since the host waits for it
    logits_at = runner.logits(states, batch)
    for positions, logits in iter_logits(logits_at, weights.shape[1], runner.device, chunk):
        targets = ids[:, positions + 1]
        counts = weights[:, positions]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        losses += (loss.view(len(ids), -1) * counts).sum(1)
        if rows:
            compared = logits if len(rows) == len(ids) else logits[chosen]
            del logits
            expected = dense_logits(positions).flatten(0, 1)
            divergence, same = compare_logits(expected, compared.flatten(0, 1))
            loss = cross_entropy(expected, targets[chosen].flatten())
            for figure, values in ((dense, loss), (kl, divergence), (agreement, same)):
                figure[chosen] += (values.view(len(rows), -1) * counts[chosen]).sum(1)
            apart[chosen[:, None], positions] = divergence.view(len(rows), -1)
            del compared, expected
        else:
            del logits  # before the next chunk is computed
    return total / weights.sum(1), apart


def compare_logits(dense: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(dense || model) in nats, and whether the most likely tokens agree, (rows,) each.

    Both are logits (rows, vocabulary), with softmax in float32, as many rows at a time as
    LOGIT_BYTES allows.
    """
    step = rows_at_once(model.device, model.shape[-1])
    divergences, same = [], []
    for q, p in zip(dense.split(step), model.split(step), strict=True):
        same.append(q.argmax(-1) == p.argmax(-1))
        log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        divergences.append((log_q.exp() * log_p.neg_().add_(log_q)).sum(-1))
    return torch.cat(divergences), torch.cat(same)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood (rows,) of `targets` under logits (rows, vocabulary).

    Computed in float32, from as many rows at a time as LOGIT_BYTES allows.
    """
    step = rows_at_once(logits.device, logits.shape[-1])
    pieces = zip(logits.split(step), targets.split(step), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in pieces])


def needs_bos(runner: BlockRunner, windows: Tensor, bos: int) -> bool:
    """Return whether perplexity on the first of windows (n, tokens) collapses without BOS."""
    bare = windows[:TRIED_WINDOWS, 1 : 1 + TRIED_TOKENS].clone()  # a text's first token may be BOS
    begun = prepend(bare[:, :-1], bos)
    without, begun = (perplexity(runner, ids) for ids in (bare, begun))
    return without > COLLAPSE * begun
