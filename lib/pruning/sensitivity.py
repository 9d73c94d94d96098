"""How much the outputs of every linear matter to what the model predicts.

Let an error e be added to a linear's outputs y (tokens, out). To second order, the divergence of
the model's next-token distributions from what they were, summed over tokens, becomes

    KL = 1/2 e^T F e,   F = E[g g^T],   g = d (-log p(label)) / d y,   label drawn from p itself,

with F Fisher's information. Of it the diagonal is kept, one number for each output: the mean over
tokens of g_i^2. One way back through the dense model gives those of all linears. Labels of the text
itself would give the empirical Fisher, which measures how far the model is from the text as well.

Memory holds the hidden states before every block, of the few windows that this takes, and the
graph of one block at a time; blocks may be fetched one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.model.blocks import BlockRunner, iter_logits, run_block
from lib.model.linears import watch_outputs
from lib.model.matrix import PrunableLinear
from lib.pruning.observe import rows


@dataclass
class Sensed:
    """Of one linear, over all tokens that reached it: float64 sums of squares.

    `inputs` (in,): of what it receives. `slopes` (out,): of g.
    """

    inputs: Tensor
    slopes: Tensor
    tokens: int = 0

    def take(self, slope: Tensor) -> None:
        """Add a slope (..., out), as a hook of autograd's, which keeps it as it is."""
        self.slopes += _squares(slope)


class WayBack:
    """Windows (n, tokens) taken through the dense model, to come back block by block.

    `chances` (n, tokens): in [0, 1), by which labels are drawn. `state_device`: where hidden states
    are
    kept. `on_progress(1)` is called after each block.
    """

    @torch.no_grad()
    def __init__(
        self,
        runner: BlockRunner,
        windows: Tensor,
        batch_size: int,
        chances: Tensor,
        state_device: torch.device | str = "cpu",
        on_progress: Callable[[int], None] = lambda blocks: None,
    ) -> None:
        self.runner = runner
        self.states = runner.capture(windows, batch_size, state_device)
        self.before: list[Tensor] = []  # hidden states before each block that is still to come
        for index in range(len(runner.blocks)):
            self.before.append(runner.transfer.copy(self.states.hidden))
            with runner.on_device(index):
                runner.advance_(self.states, index)
            on_progress(1)
        for batch in self.states.batches:
            self._turn_(batch, chances[batch].to(runner.device))

    def _turn_(self, batch: slice, chances: Tensor) -> None:
        """Put the slopes of the surprise in place of the hidden states after the last block."""
        transfer, hidden = self.runner.transfer, self.states.hidden
        ids = self.states.windows[batch].to(self.runner.device)
        last = transfer.fetch(hidden, batch).detach().requires_grad_()
        with torch.enable_grad():
            surprise_(lambda some: self.runner.logits_from_hidden(ids, lambda: last, some), chances)
        transfer.store_(hidden, batch, last.grad)

    def through(self, index: int, linears: list[PrunableLinear]) -> dict[str, Sensed]:
        """Come back through block `index`, the last one first; what was sensed, by linears' names.

        Linears that no token reached are among them.
        """
        runner, transfer, device = self.runner, self.runner.transfer, self.runner.device
        found = {one.name: _nothing(one, device) for one in linears}

        def see(linear: PrunableLinear, x: Tensor, out: Tensor) -> None:
            one = found[linear.name]
            one.inputs += _squares(x.detach())
            one.tokens += len(rows(x))
            if out.requires_grad:
                out.register_hook(one.take)

        before = replace(self.states, hidden=self.before.pop())
        arriving = transfer.batches(before.hidden, before.batches)
        calls = before.block_args[index]
        with torch.enable_grad(), watch_outputs(linears, see):
            for batch, hidden, call in zip(before.batches, arriving, calls, strict=True):
                start = hidden.detach().requires_grad_()
                end = run_block(runner.blocks[index], start, *call)
                end.backward(transfer.fetch(self.states.hidden, batch))
                transfer.store_(self.states.hidden, batch, start.grad)
        return found


def _nothing(linear: PrunableLinear, device: torch.device) -> Sensed:
    out, width = linear.shape
    sums = (torch.zeros(size, dtype=torch.float64, device=device) for size in (width, out))
    return Sensed(*sums)


def _squares(x: Tensor) -> Tensor:
    """Of each channel (channels,), summed over the tokens of (..., channels)."""
    return rows(x).float().square().sum(0, dtype=torch.float64)


def surprise_(logits: Callable[[Tensor], Tensor], chances: Tensor) -> None:
    """Gradients of -log p(label), summed over positions, with labels drawn from p.

    `logits(some)` gives (n, some positions, vocabulary); what it is computed from gets its
    gradient, a chunk of positions at a time. A label is the first token at which the summed-up
    probabilities exceed `chances` (n, positions).
    """
    for some, own in iter_logits(logits, chances.shape[1], chances.device):
        with torch.no_grad():
            p = own.float().softmax(-1)
            labels = torch.searchsorted(p.cumsum(-1), chances[:, some, None].float(), right=True)
            labels.clamp_(max=p.shape[-1] - 1)  # sums end a rounding below 1
            slope = p.scatter_add_(-1, labels, p.new_full(labels.shape, -1.0))
        own.backward(slope.to(own.dtype))
