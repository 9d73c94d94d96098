"""SparseGPT: prune one column after another and adjust the later ones to compensate.

Frantar & Alistarh 2023, arXiv 2301.00774. With inputs X (tokens, in) and H = X^T X, pruning seeks
the masked matrix Q nearest to the weights W (out, in) in the sense of |X (W - Q)^T|^2. It takes the
columns from left to right. Once the columns left of column j are settled, the others may take their
best values (equation 3). Then column j alone is settled, by its mask.

*Between blocks.* Let D = W - Q be the settled change of the columns P. The best values of the free
columns F are W_F + D_P H_PF H_FF^-1. Factor H = R R^T with R upper triangular: one Cholesky
factorization of H with rows and columns reversed. Then H_FF = R_FF R_FF^T and
H_PF = R_PF R_FF^T, hence the best values are W_F + D_P R_PF R_FF^-1. R_FF^-1 is upper triangular
too, so the first few free columns N need only their own corner of it. With C = R / diag(R)

    V_N = W_N + D_P C_PN C_NN^-1                                                            (*)

This inverts not H but only the diagonal blocks of its factor. The updates of a block of 128 columns
are gathered when it is reached; the paper's algorithm 1 pushes them into all later columns.

*Within a block.* By (*) again, column j takes the value w_j = V_j + D_P C_Pj, where P are here the
block's earlier columns. In terms of the errors e_j = w_j - q_j, which are e_j = D_j + D_P C_Pj
or E = D C, this reads w_j = V_j - E_P B_Pj with B = C_NN^-1: the paper's update. It is done in
steps of 16 columns, after a product with the columns before the step.

*The masks.* The error of pruning w_j is w_j^2 / [H_FF^-1]_jj (equation 2), and [H_FF^-1]_jj is
1 / R_jj^2: the score is (w_j R_jj)^2. Unstructured masks prune the lowest scores of a layer's block
of 128 columns, chosen from V when the block is reached (section 3.2). In N:M masks a step is one
group, and its mask is chosen when it is reached.

Layers that share the input share R, and are solved side by side, transposed to (in, out), so that
a column of weights is contiguous.
Run: `python main.py --model MODEL --prune_method sparsegpt`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import PruningMethod
from .gram import add_upper_gram_, damped_cholesky_, inverse_, mirror_
from .obs import choose_rows, solve_rows
from .sparsity import Sparsity, n_of_first

STEP = 16  # columns; a step of a few thousand rows fits in the cache


class SparseGPT(PruningMethod):
    """X^T X of one input of a block, in float32, and the solver for its linear layers.

    `damping`: share of the mean of H's diagonal that is added to the diagonal.
    `block_size`: number of columns among which an unstructured mask is chosen.
    """

    inverts_gram = True
    workspace = [(2, 0, 0), (1, 2, 0), (1, 1, 640)]
    neuron_workspace = [(2, 2.7, 0)]
    damping = 0.01
    block_size = 128

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.hessian = torch.zeros(width, width, device=device)  # (in, in), upper triangle

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        add_upper_gram_(self.hessian, x)

    def statistics(self) -> list[Tensor]:
        return [self.hessian]

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        """Prune float32 matrices (out_i, in) in place. UserError if H cannot be factored."""
        factor, scale, dead = factorise(self.hessian, self.damping)
        rows = [len(weight) for weight in weights]
        change = torch.cat(list(weights)).T.contiguous()  # (in, out): W, and D left of the block
        change.masked_fill_(dead[:, None], 0)
        for start in range(0, len(change), self.block_size):
            here = slice(start, start + self.block_size)
            inverse = unit_inverse(factor[here, here]).contiguous()
            values = change[here].clone()
            if start:
                push = factor[:start, here] @ inverse
                values.addmm_(push.T, change[:start])
            errors = settle_(values, inverse, scale[here, None], rows, sparsities)
            settled = values.sub_(errors)  # exactly 0 where pruned
            change[here] -= settled
            for weight, part in zip(weights, settled.split(rows, 1), strict=True):
                weight[:, here] = part.T

    def remove_neurons_(self, weight: Tensor, gains: Tensor, count: int) -> Tensor:
        """Remove columns stage by stage (lib/methods/obs.py), keeping the layer's own outputs."""
        hessian = self.hessian.clone()
        mirror_(hessian)
        dead = hessian.diagonal() == 0
        weight[:, dead] = 0
        mean = hessian.diagonal().mean()
        hessian.diagonal().add_(dead)
        inverse = inverse_(damped_cholesky_(hessian, self.damping, mean))
        kept = choose_rows(weight.T.clone(), inverse, count)
        del inverse
        solution = solve_rows(hessian, hessian @ weight.T, kept)
        weight.zero_()[:, kept] = solution.T
        return kept


def factorise(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit upper triangular C (in, in), scale (in,): H + damping = C diag(scale^2) C^T; dead (in,).

    Reads only the upper triangle of H. An input that was always 0 is dead: it gives no information
    on its weights, which are pruned, and does not affect the others.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    reverse = hessian.flip(0, 1)  # its lower triangle is the stored half of H
    reverse.diagonal().add_(dead.flip(0))
    lower = damped_cholesky_(reverse, damping, diagonal.mean())
    del reverse
    factor = lower.flip(0, 1)
    del lower
    scale = factor.diagonal().clone()
    return factor.div_(scale), scale, dead


def unit_inverse(upper: Tensor) -> Tensor:
    """Return the inverse of a unit upper triangular matrix (n, n)."""
    identity = torch.eye(len(upper), device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True, unitriangular=True)


def settle_(
    values: Tensor,
    inverse: Tensor,
    scale: Tensor,
    rows: list[int],
    sparsities: Sequence[Sparsity],
) -> Tensor:
    """Take the columns of V (block, out) one after another to their final values; return E.

    `inverse` (block, block) is B and `scale` (block, 1) is diag(R); `rows` are the numbers of
    outputs of the layers. E (block, out) is the weight where it is pruned, else 0.
    """
    errors, mask = torch.empty_like(values), torch.empty_like(values)  # 1.0 where it is pruned
    m = sparsities[0].m  # all have the same pattern
    if m:
        counts = [torch.full((count,), s.n) for count, s in zip(rows, sparsities, strict=True)]
        n = torch.cat(counts).to(values.device)  # (out,)
    else:  # the lowest scores of each layer's part of the block
        score = (values * scale).square_()
        parts = score.split(rows, 1), mask.split(rows, 1), sparsities
        for part, mask_part, sparsity in zip(*parts, strict=True):
            mask_part.copy_(sparsity.mask(part, overall=True))
    width = m or math.gcd(len(values), STEP)
    for start in range(0, len(values), width):
        step = slice(start, start + width)
        if start:
            values[step].addmm_(inverse[:start, step].T, errors[:start], alpha=-1)
        if m:
            mask[step] = n_of_first((values[step] * scale[step]).square_(), n)
        for j in range(start, start + width):
            if j > start:
                values[j].addmv_(errors[start:j].T, inverse[start:j, j], alpha=-1)
            torch.mul(values[j], mask[j], out=errors[j])
    return errors
