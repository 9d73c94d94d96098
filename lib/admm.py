"""ADMM: choose masks and weights together, and aim at what the untouched model computes.

*The problem.* A linear with weights W (out, in) receives X (tokens, in) from the blocks pruned so
far; the untouched model would feed it D (tokens, in). Wanted is the masked matrix Q that minimises

    |X Q^T - ((1 - a) X + a D) W^T|^2 + damping |(Q - W) S|^2                              (1)

With blend a = 0 a linear keeps its own outputs, as in SparseGPT; with a = 1 it also repairs what
the linears before it broke (asymmetric calibration: GPTAQ, arXiv 2504.02692, and Qronos, arXiv
2505.11695, both for quantisation). (1) needs two sums over tokens, A = X^T X and the drift
F = (D - X)^T X. The difference is summed because it is small: D^T X would drown it in rounding.

*Scaling.* S = diag(A)^1/2 are the norms of the inputs. In terms of W S and S^-1 A S^-1, which has
a unit diagonal, magnitudes of weights compare across inputs as Wanda's scores do. From here on all
is scaled and A includes the damping: (1) is tr(Q A Q^T) - 2 tr(B Q^T) with B = W (A + a F).

*The iterations* (Boza 2024, arXiv 2401.02938, section 3). Split Q into a free matrix V and a masked
one Z that must agree, with scaled dual U. In terms of T = V + U an iteration reads

    mask = where |T| is lowest;  Z = T where kept, else 0;  U = T where pruned, else 0
    V = (B + rho (Z - U)) (A + rho I)^-1;  T = V + U

one product and one mask for all linears that share the input, side by side. What differs from the
paper, each because it measured better (the error of linears of two models on held-out text):

  - rho is `rho` times the mean of 1 / (A^-1)_jj, the share of an input's variance that the others
    do not explain, and STIFFENING times that in the second half. The paper's 1 is stiff where
    inputs are correlated; what suits those lets the masks of uncorrelated inputs flap for ever.
  - The mask is complete from the first iteration and chosen in each of them. A sparsity that rises
    along a cubic takes iterations and ends higher.
  - Unstructured masks compare the weights of a whole linear, not of a row.
  - Conjugate gradients on (1) end the solution, every row on its own mask.

Run: `python main.py --model MODEL --prune_method admm`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.gram import add_upper_gram_
from lib.least_squares import alternate, conjugate_gradients_, scaled
from lib.sparsity import Sparsity, lowest_overall


class Admm:
    """X^T X and (D - X)^T X of one input of a block, and the solver for the linears it feeds.

    `iterations` choose the mask, `refinements` steps of conjugate gradients end on it. `rho` and
    `damping` are shares, of an input's unexplained and of its whole variance. `blend` is a in (1),
    from 0 to 1; without `dense_stream` it has no effect. `in_order` is for the caller: whether it
    observes each input of a block after the linears before it are pruned.
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
        damping: float = 0.03,
        blend: float = 0.5,
        in_order: bool = True,
        dense_stream: bool = True,
    ) -> None:
        assert iterations > 0 and rho > 0 and damping > 0 and 0 <= blend <= 1
        self.hessian = torch.zeros(width, width, device=device)  # (in, in), upper triangle
        self.drift = torch.zeros(width, width, device=device) if dense_stream and blend else None
        self.iterations = iterations
        self.refinements = refinements
        self.rho = rho
        self.damping = damping
        self.blend = blend
        self.tokens = 0

    def observe(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add x (tokens, in), and `dense`: the same tokens in the untouched model, where known."""
        add_upper_gram_(self.hessian, x)
        if dense is not None and self.drift is not None:
            x = x.float()
            self.drift.addmm_((dense.float() - x).T, x)
        self.tokens += len(x)

    def statistics(self) -> list[Tensor]:
        return [self.hessian] if self.drift is None else [self.hessian, self.drift]

    def prune_(self, weights: list[Tensor], sparsity: Sparsity) -> None:
        """Prune float32 matrices (out_i, in) in place. UserError where A can't be factored."""
        rows = [len(weight) for weight in weights]
        with record_function("factorisation"):
            hessian, unexplained, scale, dead = scaled(self.hessian, self.damping)
        start = torch.cat(weights).mul_(scale)  # (out, in)
        target = start @ hessian
        if self.drift is not None:
            target.addmm_(start, self.drift / scale / scale[:, None], alpha=self.blend)
        start[:, dead] = 0  # an input that was always 0 says nothing of its weights: they go
        target[:, dead] = 0
        rho = self.rho * unexplained
        choose = partial(lowest, rows=rows, sparsity=sparsity)
        solution, mask = alternate(start, target, hessian, rho, self.iterations, choose)
        with record_function("refinement"):
            conjugate_gradients_(solution, target, hessian, mask, self.refinements)
        solution /= scale
        for weight, part in zip(weights, solution.split(rows), strict=True):
            weight.copy_(part)


def lowest(total: Tensor, rows: list[int], sparsity: Sparsity) -> Tensor:
    """Mask of the lowest |T| (out, in): in every N:M group, or in each linear of `rows` outputs."""
    with record_function("masks"):
        score = total.abs()
        if sparsity.m:
            return sparsity.mask(score)
        parts = score.split(rows)
        counts = [int(part.numel() * sparsity.ratio) for part in parts]
        return torch.cat([lowest_overall(*both) for both in zip(parts, counts, strict=True)])
