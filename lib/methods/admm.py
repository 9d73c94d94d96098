"""ADMM: choose masks and weights together, and aim at what the untouched model computes.

*The problem.* A linear with weights W (out, in) receives X (tokens, in) from the blocks pruned so
far; the untouched model would feed it D (tokens, in). Where its outputs are added to a residual
stream, L (tokens, out) is how far the untouched model's stream is ahead there. Wanted is the masked
matrix Q that minimises

    |X Q^T - X W^T - a ((D - X) W^T + L)|^2 + damping |(Q - W) S|^2                        (1)

With blend a = 0 a linear keeps its own outputs, as in SparseGPT; with a = 1 it also repairs what
the linears before it broke, in its input (asymmetric calibration: GPTAQ, arXiv 2504.02692, and
Qronos, arXiv 2505.11695, both for quantisation) and in the stream it writes to. (1) needs sums over
tokens: A = X^T X, the drift F = (D - X)^T X and the lag G = L^T X. The differences are summed
because they are small: D^T X would drown them in rounding.

*Scaling.* S = diag(A)^1/2 are the norms of the inputs. In terms of W S and S^-1 A S^-1, which has
a unit diagonal, magnitudes of weights compare across inputs as Wanda's scores do. From here on all
is scaled and A includes the damping: (1) is tr(Q A Q^T) - 2 tr(B Q^T) with B = W (A + a F) + a G.

*Damping.* What least squares finds in T tokens that isn't there grows with in / T and with the
share u of an input's variance that the others do not explain, the mean of 1 / (A^-1)_jj: the
damping is FLOOR + `damping` u in / T. A fixed share that suits one model and number of windows
spoils another: drift and lag can be fitted to few tokens all too well.

*The iterations* (Boza 2024, arXiv 2401.02938, section 3). Split Q into a free matrix V and a masked
one Z that must agree, with scaled dual U. In terms of T = V + U an iteration reads

    mask = where |T| is lowest;  Z = T where kept, else 0;  U = T where pruned, else 0
    V = (B + rho (Z - U)) (A + rho I)^-1;  T = V + U

one product and one mask for all linears that share the input, side by side. What differs from the
paper, each because it measured better (the error of linears of two models on held-out text):

  - rho is `rho` times the unexplained share, and STIFFENING times that in the second half. The
    paper's 1 is stiff where inputs are correlated; what suits those lets the masks of uncorrelated
    inputs flap for ever.
  - The mask is complete from the first iteration and chosen in each of them. A sparsity that rises
    along a cubic takes iterations and ends higher.
  - Unstructured masks compare the weights of a whole linear, not of a row.
  - Conjugate gradients on (1) end the solution, every row on its own mask.

Run: `python main.py --model MODEL --prune_method admm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.methods.damping import cholesky, rising
from lib.methods.gram import add_upper_gram_, mirror_
from lib.methods.sparsity import Sparsity, lowest_overall

FLOOR = 0.01  # of an input's variance: the least damping
STIFFENING = 2.5  # of rho in the second half of the iterations: first explore masks, then agree


class Admm:
    """The sums of one input of a block, and the solver for the linears that receive it.

    `iterations` choose the mask, `refinements` steps of conjugate gradients end on it. `rho` is a
    share of an input's unexplained variance, `damping` that share's multiple per token and input,
    `blend` is a in (1), from 0 to 1.
    """

    observes = True
    in_order = True
    dense_stream = True

    def __init__(
        self,
        width: int,
        device: torch.device,
        iterations: int = 20,
        refinements: int = 5,
        rho: float = 1.5,
        damping: float = 6.0,
        blend: float = 1.0,
    ) -> None:
        assert iterations > 0 and rho > 0 and damping >= 0 and 0 <= blend <= 1
        self.hessian = torch.zeros(width, width, device=device)  # A (in, in), upper triangle
        self.drift = torch.zeros(width, width, device=device) if blend else None  # F (in, in)
        self.lag: Tensor | None = None  # G (out, in)
        self.iterations = iterations
        self.refinements = refinements
        self.rho = rho
        self.damping = damping
        self.blend = blend
        self.tokens = 0

    def observe(self, x: Tensor, dense: Tensor | None = None, lag: Tensor | None = None) -> None:
        """Add x (tokens, in), and where known the same tokens in the untouched model.

        `dense` (tokens, in) is its x; `lag` (tokens, out), for a linear that has its input to
        itself, how far its residual stream is ahead where the linear's outputs are added.
        """
        add_upper_gram_(self.hessian, x)
        self.tokens += len(x)
        if self.drift is None:
            return
        x = x.float()
        if dense is not None:
            self.drift.addmm_((dense.float() - x).T, x)
        if lag is not None:
            if self.lag is None:
                self.lag = x.new_zeros(lag.shape[1], x.shape[1])
            self.lag.addmm_(lag.float().T, x)

    def statistics(self) -> list[Tensor]:
        return [sums for sums in (self.hessian, self.drift, self.lag) if sums is not None]

    def bytes_needed(self, rows: list[int]) -> tuple[int, int]:
        """Of the statistics, and beside them for solving linears with `rows` outputs."""
        row = self.hessian.element_size() * len(self.hessian)
        lag = row * rows[0] if len(rows) == 1 else 0  # where the linear adds to the stream
        sums = self.hessian.nbytes + (0 if self.drift is None else self.drift.nbytes) + lag
        # A, A + rho, its factor and its inverse; or A, its inverse, B, V, U, T and Z - U
        return sums, max(2 * sums, sums + 5 * row * sum(rows))

    def prune_(self, weights: list[Tensor], sparsity: Sparsity) -> None:
        """Prune float32 matrices (out_i, in) in place. UserError where A can't be factored."""
        assert self.tokens > 0 and (self.lag is None or len(weights) == 1)
        rows = [len(weight) for weight in weights]
        with record_function("factorisation"):
            share = self.damping * len(self.hessian) / self.tokens
            hessian, unexplained, scale, dead = scaled(self.hessian, share)
        start = torch.cat(weights).mul_(scale)  # W S (out, in)
        target = start @ hessian  # B (out, in)
        if self.drift is not None:
            target.addmm_(start, self.drift / scale / scale[:, None], alpha=self.blend)
        if self.lag is not None:
            target.add_(self.lag / scale, alpha=self.blend)
        start[:, dead] = 0  # an input that was always 0 says nothing of its weights: they go
        target[:, dead] = 0
        choose = partial(lowest, rows=rows, sparsity=sparsity)
        rho = self.rho * unexplained
        solution, mask = alternate(start, target, hessian, rho, self.iterations, choose)
        conjugate_gradients_(solution, target, hessian, mask, self.refinements)
        solution /= scale
        for weight, part in zip(weights, solution.split(rows), strict=True):
            weight.copy_(part)


def scaled(sums: Tensor, share: float) -> tuple[Tensor, float, Tensor, Tensor]:
    """A = S^-1 (sums) S^-1 + damping (in, in), the unexplained share, S (in,), and dead inputs.

    The damping is FLOOR and `share` of the unexplained share, which is that of the damped matrix.
    Reads the upper triangle of `sums`. The floor rises where it must; UserError where that does not
    help.
    """
    hessian = sums.clone()
    mirror_(hessian)
    dead = hessian.diagonal() == 0
    scale = hessian.diagonal().sqrt().masked_fill_(dead, 1)
    hessian /= scale
    hessian /= scale[:, None]
    added = 0.0
    for floor in rising(FLOOR):
        hessian.diagonal().add_(floor - added)
        added, factor = floor, cholesky(hessian)
        if factor is not None:
            break
    unexplained = (1 / torch.cholesky_inverse(factor).diagonal()).mean().item()
    hessian.diagonal().add_(share * unexplained)
    return hessian, (1 + share) * unexplained, scale, dead


def lowest(total: Tensor, rows: list[int], sparsity: Sparsity) -> Tensor:
    """Mask of the lowest |T| (out, in): in every N:M group, or in each linear of `rows` outputs."""
    with record_function("masks"):
        score = total.abs()
        if sparsity.m:
            return sparsity.mask(score)
        parts = score.split(rows)
        counts = [int(part.numel() * sparsity.ratio) for part in parts]
        return torch.cat([lowest_overall(*both) for both in zip(parts, counts, strict=True)])


def alternate(
    start: Tensor,
    target: Tensor,
    hessian: Tensor,
    rho: float,
    iterations: int,
    choose: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Z and its mask (out, in) after `iterations` from V = `start`, which is overwritten."""
    free, total, signed = start, start.clone(), torch.empty_like(start)
    dual = torch.zeros_like(start)
    for iteration in range(iterations):
        if iteration == iterations // 2 and iteration:
            rho *= STIFFENING
            dual /= STIFFENING  # U is in units of rho
        if iteration in (0, iterations // 2):
            with record_function("factorisation"):
                inverse = None  # the one before goes first
                inverse = stiff_inverse(hessian, rho)
        torch.add(free, dual, out=total)
        mask = choose(total)
        torch.mul(total, mask, out=dual)
        torch.add(total, dual, alpha=-2, out=signed)  # Z - U
        torch.mm(signed.mul_(rho).add_(target), inverse, out=free)
    total = free.add_(dual)
    mask = choose(total)
    return total.masked_fill_(mask, 0), mask


def stiff_inverse(hessian: Tensor, rho: float) -> Tensor:
    """(A + rho I)^-1 (in, in), of an A that could be factored without rho."""
    stiff = hessian.clone()
    stiff.diagonal().add_(rho)
    factor = torch.linalg.cholesky(stiff)
    del stiff
    return torch.cholesky_inverse(factor)


def conjugate_gradients_(
    solution: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, steps: int
) -> None:
    """Lower tr(Q A Q^T) - 2 tr(B Q^T) from Q = `solution` (out, in), each row on its own mask."""
    tiny = torch.finfo(solution.dtype).tiny
    keep = (~mask).float()  # cheaper to multiply with than a mask is to fill
    residual = torch.addmm(target, solution, hessian, alpha=-1).mul_(keep)
    direction = residual.clone()
    norm = residual.square().sum(1, keepdim=True)  # (out, 1)
    for _ in range(steps):
        image = direction @ hessian
        curvature = (direction * image).sum(1, keepdim=True)
        step = norm / curvature.clamp_min(tiny)  # 0 where a row is solved or wholly pruned
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1).mul_(keep)
        before, norm = norm, residual.square().sum(1, keepdim=True)
        direction.mul_(norm / before.clamp_min(tiny)).add_(residual)
