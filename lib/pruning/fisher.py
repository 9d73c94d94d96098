"""How much the outputs of every linear matter to what the model predicts.

Let an error e be added to a linear's outputs y (tokens, out). To second order, the divergence of
the model's next-token distributions from what they were, summed over tokens, becomes

    KL = 1/2 e^T F e,   F = E[g g^T],   g = d (-log p(label)) / d y,   label drawn from p itself,

with F Fisher's information. Its diagonal is estimated, one number for each output: the mean over
tokens of g_i^2. One backward pass through the dense model gives those of all linears. Labels of the
text itself would give the empirical Fisher, which also measures how far the model is from the text.

Memory holds the hidden states before every block, of the few windows that this takes, and the
graph of one block at a time; blocks may be fetched one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib.model.blocks import BlockRunner, iter_logits, run_block
from lib.model.linears import watch_outputs
from lib.model.matrix import PrunableLinear
from lib.pruning.inputs import rows
from lib.util.deterministic import deterministic
from lib.util.errors import RunWarning


@dataclass
class FisherDiagonal:
    """Float64 sums of squares over all tokens that reached one linear.

    `inputs` (in,): of what it receives. `grad_sq` (out,): of g.
    """

    inputs: Tensor
    grad_sq: Tensor
    tokens: int = 0

    def add_gradient(self, gradient: Tensor) -> None:
        """Add a gradient (..., out): a hook of autograd's."""
        self.grad_sq += _square_sums(gradient)


class BackwardPass:
    """Windows (n, tokens) taken through the dense model, to come back block by block.

    `uniforms` (n, tokens): in [0, 1), by which labels are drawn. `on_progress(1)` is called after
    each block.
    """

    @torch.no_grad()
    def __init__(
        self,
        runner: BlockRunner,
        windows: Tensor,
        uniforms: Tensor,
        on_progress: Callable[[int], Any] = lambda blocks: None,
    ) -> None:
        self.runner = runner
        self.states = runner.capture(windows)
        self.before: list[Tensor] = []  # hidden states before each block that is still to come
        for index in range(len(runner.blocks)):
            self.before.append(runner.transfer.copy(self.states.hidden))
            with runner.on_device(index):
                runner.advance_(self.states, index)
            on_progress(1)
        # in place of the hidden states after the last block stands the loss's gradient there
        for batch in self.states.batches:
            ids = self.states.windows[batch].to(runner.device)
            last = runner.transfer.fetch(self.states.hidden, batch).detach().requires_grad_()

            def logits(positions: Tensor, ids=ids, last=last) -> Tensor:
                return runner.logits_from_hidden(ids, last, positions)

            with torch.enable_grad():
                sampled_nll_backward_(logits, uniforms[batch].to(runner.device))
            runner.transfer.store_(self.states.hidden, batch, last.grad)

    def through(self, index: int, linears: list[PrunableLinear]) -> dict[str, FisherDiagonal]:
        """Come back through block `index`, the last one first; {linear's name: its sums}.

        Linears that no token reached are among them.
        """
        try:
            with deterministic(self.runner.device, strict=True):
                diagonals = self._through(index, linears)
        except RuntimeError as error:  # of the first batch, before anything was stored
            if "deterministic" not in str(error):
                raise
            line = f"--allocation error: another run may give other weights: {error}"
            warnings.warn(line.split("\n")[0], RunWarning, stacklevel=2)
            diagonals = self._through(index, linears)
        self.before.pop()
        return diagonals

    def _through(self, index: int, linears: list[PrunableLinear]) -> dict[str, FisherDiagonal]:
        runner, transfer, device = self.runner, self.runner.transfer, self.runner.device
        diagonals = {}
        for linear in linears:
            out, width = linear.shape
            zeros = (torch.zeros(n, dtype=torch.float64, device=device) for n in (width, out))
            diagonals[linear.name] = FisherDiagonal(*zeros)

        def see(linear: PrunableLinear, x: Tensor, out: Tensor) -> None:
            diagonal = diagonals[linear.name]
            diagonal.inputs += _square_sums(x.detach())
            diagonal.tokens += len(rows(x))
            if out.requires_grad:
                out.register_hook(diagonal.add_gradient)

        before = replace(self.states, hidden=self.before[-1])
        arriving = transfer.batches(before.hidden, before.batches)
        calls = before.block_args[index]
        with torch.enable_grad(), watch_outputs(linears, see):
            for batch, hidden, call in zip(before.batches, arriving, calls, strict=True):
                start = hidden.detach().requires_grad_()
                end = run_block(runner.blocks[index], start, *call)
                end.backward(transfer.fetch(self.states.hidden, batch))
                transfer.store_(self.states.hidden, batch, start.grad)
        return diagonals


def _square_sums(x: Tensor) -> Tensor:
    """Sum of squares of each channel (channels,) over the tokens of x (..., channels), float64."""
    return rows(x).float().square().sum(0, dtype=torch.float64)


def sampled_nll_backward_(logits: Callable[[Tensor], Tensor], uniforms: Tensor) -> None:
    """Compute gradients of -log p(label), summed over positions, with labels drawn from p.

    `logits(positions)` gives (n, positions, vocabulary); what it is computed from gets its
    gradient, a chunk of positions at a time. A label is the first token at which the cumulative
    probability exceeds `uniforms` (n, positions).
    """
    for positions, chunk in iter_logits(logits, uniforms.shape[1], uniforms.device):
        with torch.no_grad():
            p = chunk.float().softmax(-1)
            drawn = uniforms[:, positions, None].float()
            labels = torch.searchsorted(p.cumsum(-1), drawn, right=True)
            labels.clamp_(max=p.shape[-1] - 1)  # sums end a rounding below 1
            gradient = p.scatter_add_(-1, labels, p.new_full(labels.shape, -1.0))
        chunk.backward(gradient.to(chunk.dtype))
