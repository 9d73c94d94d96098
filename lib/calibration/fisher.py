"""Estimate how much the outputs of every linear layer matter to the model's predictions.

Let an error e be added to a linear layer's outputs y (tokens, out). To second order, the KL
divergence of the new next-token distributions from the old ones, summed over tokens, is

    KL = 1/2 e^T F e,   F = E[g g^T],   g = d (-log p(label)) / d y,   label drawn from p itself,

with the Fisher information F. Its diagonal is estimated, one number per output: the mean over
tokens of g_i^2. One backward pass through the dense model gives it for all layers. Labels from the
text itself would give the empirical Fisher, which also measures how far the model is from the text.

Memory holds the hidden states at the input of every block, for a few windows, and the graph of one
block at a time. Blocks may be fetched one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.blocks import BlockRunner, HiddenStates, iter_logits, run_block
from ..model.linears import watch_outputs
from ..model.matrix import PrunableLinear
from ..util.deterministic import deterministic
from ..util.errors import RunWarning
from .inputs import rows

CHUNK = 1024  # tokens of the vocabulary whose probabilities are summed at once


@dataclass
class FisherDiagonal:
    """Float64 sums over all tokens that reached one linear layer.

    `inputs` (in,): squares of its inputs. `grad_sq` (out,): squares of g. `tokens` (): their
    number. `weighted` (in,): squares of inputs, each token's times |g|^2.
    """

    inputs: Tensor
    grad_sq: Tensor
    tokens: Tensor
    weighted: Tensor


@torch.no_grad()
def backward_pass(
    runner: BlockRunner,
    windows: Tensor,
    uniforms: Tensor,
    on_progress: Callable[[int], Any] = lambda blocks: None,
    at_start: Callable[[HiddenStates, Tensor], Any] = lambda states, gradient: None,
) -> Iterator[dict[PrunableLinear, FisherDiagonal]]:
    """Take windows (n, tokens) through the dense model and back, and yield each block's sums.

    The last block comes first. Its sums stay on the device until the next one, and include layers
    that no token reached. `uniforms` (n, tokens): numbers in [0, 1) that draw the labels.
    `on_progress(1)` is called after each block, forward and back. `at_start` gets the states before
    the first block, and g there.
    """
    states, before = runner.capture(windows), []
    for index in range(len(runner.blocks)):
        before.append(states.copy())
        with runner.on_device(index):
            runner.advance_(states, index)
        on_progress(1)
    gradient = states.hidden  # gradient of the loss, in place of the last block's outputs
    for batch in states.batches:
        ids = states.windows[batch].to(runner.device)
        last = gradient[batch].to(runner.device).detach().requires_grad_()
        logits = partial(runner.logits_from_hidden, ids, last)
        with torch.enable_grad():
            sampled_nll_backward_(logits, uniforms[batch].to(runner.device))
        gradient[batch] = last.grad
    for index in reversed(range(len(runner.blocks))):
        with runner.on_device(index):
            given = before.pop()
            try:
                with deterministic(runner.device, strict=True):
                    diagonals = _through_(runner, index, given, gradient)
            except RuntimeError as error:  # raised in the first batch, before anything was stored
                if "deterministic" not in str(error):
                    raise
                line = f"--allocation error: another run may give other weights: {error}"
                warnings.warn(line.split("\n")[0], RunWarning, stacklevel=2)
                diagonals = _through_(runner, index, given, gradient)
            yield diagonals
        on_progress(1)
    at_start(given, gradient)


def _through_(
    runner: BlockRunner, index: int, states: HiddenStates, gradient: Tensor
) -> dict[PrunableLinear, FisherDiagonal]:
    """Return the sums of block `index` on `states`; `gradient` becomes that at its input."""
    device = runner.device
    diagonals = {linear: empty_diagonal(linear, device) for linear in runner.linears(index)}
    with torch.enable_grad(), watch_outputs([*diagonals], seeing(diagonals)):
        for batch, (args, kwargs) in zip(states.batches, states.block_args[index], strict=True):
            start = states.hidden[batch].to(runner.device).detach().requires_grad_()
            end = run_block(runner.blocks[index], start, args, kwargs)
            end.backward(gradient[batch].to(runner.device))
            gradient[batch] = start.grad
    return diagonals


def empty_diagonal(linear: PrunableLinear, device: torch.device) -> FisherDiagonal:
    """Return sums for a layer before any token."""
    sizes = linear.shape[1], linear.shape[0], (), linear.shape[1]
    sums = (torch.zeros(size, dtype=torch.float64, device=device) for size in sizes)
    return FisherDiagonal(*sums)


def seeing(diagonals: dict[PrunableLinear, FisherDiagonal]) -> Callable[..., None]:
    """Return a function for `watch_outputs` that adds to the sums, in a pass and its backward."""

    def see(linear: PrunableLinear, x: Tensor, out: Tensor) -> None:
        diagonal = diagonals[linear]
        diagonal.inputs += _square_sums(x.detach())
        diagonal.tokens += len(rows(x))

        def add(slope: Tensor) -> None:
            diagonal.grad_sq += _square_sums(slope)
            norms = rows(slope).float().norm(dim=1, keepdim=True)
            diagonal.weighted += _square_sums(rows(x.detach()) * norms)

        if out.requires_grad:
            out.register_hook(add)

    return see


def _square_sums(x: Tensor) -> Tensor:
    """Sum the squares of each channel (channels,) over the tokens of x (..., channels), float64."""
    return rows(x).float().square().sum(0, dtype=torch.float64)


def sampled_nll_backward_(logits: Callable[[Tensor], Tensor], uniforms: Tensor) -> None:
    """Compute gradients of -log p(label), summed over positions, with labels drawn from p.

    `logits(positions)` gives (n, positions, vocabulary); the tensor behind it gets its gradient,
    one chunk of positions at a time. A label is the first token at which the cumulative
    probability exceeds `uniforms` (n, positions).
    """
    for positions, chunk in iter_logits(logits, uniforms.shape[1], uniforms.device):
        with torch.no_grad():
            p = chunk.float().softmax(-1)
            labels = draw(p, uniforms[:, positions])
            gradient = p.scatter_(-1, labels, p.gather(-1, labels) - 1)
        chunk.backward(gradient.to(chunk.dtype))


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token (..., 1) at which cumulative p (..., vocabulary) exceeds `uniforms`.

    An accelerator's sum along one long dimension may differ from run to run. Therefore it sums
    chunks; the host cumulates these sums, and the probabilities within one chunk.
    """
    chunks = F.pad(p, (0, -p.shape[-1] % CHUNK)).unflatten(-1, (-1, CHUNK))
    drawn = uniforms[..., None].float().cpu()
    ends = chunks.sum(-1).cpu().cumsum(-1)
    place = torch.searchsorted(ends, drawn, right=True).clamp_(max=ends.shape[-1] - 1)
    start = ends.gather(-1, (place - 1).clamp_min(0)) * (place > 0)
    index = place.to(p.device)[..., None].expand(*place.shape, CHUNK)
    within = chunks.gather(-2, index).squeeze(-2).cpu().cumsum(-1) + start
    labels = place * CHUNK + torch.searchsorted(within, drawn, right=True).clamp_(max=CHUNK - 1)
    return labels.clamp_(max=p.shape[-1] - 1).to(p.device)  # sums may end slightly below 1
