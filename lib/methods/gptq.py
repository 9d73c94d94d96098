"""Quantise kept weights column by column, and let those that are left make up for it.

A pruned matrix W (out, in) becomes Q on a grid of lib/packed/formats.py, zero where W is zero. As
in ADMM it aims at what the untouched model computes, which is here the model before it is
quantised: wanted is the least tr(Q A Q^T) - 2 tr(B Q^T) of lib/methods/least_squares.py. There are
three steps.

 1. Conjugate gradients take W to the best real values on its mask, for the inputs have changed.
 2. Columns are rounded from left to right, and those to the right make up for each as far as the
    inverse of A says (GPTQ, Frantar et al. 2023, arXiv 2210.17323). With A = R R^T, R upper
    triangular, and C = R / diag(R) this is SparseGPT's recursion (lib/methods/sparsegpt.py,
    equation (*)) with a grid in place of a mask. A pruned weight takes part: it receives, and what
    it has received is an error when its turn comes, since it is rounded to 0. A group of inputs
    gets the scales that suit the values which it has when it is reached, where an error in the
    weights of input j counts diag(X^T X)_j.
 3. Column by column once more, every kept weight moves to the point of the grid that is best with
    all others as they are: from where it is r / A_jj away, where r is its row of B - A Q
    (coordinate descent). The mask is exact here, which it is not in step 2.

Linears that share the input are solved side by side, transposed to (in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lib.methods.damping import cholesky
from lib.methods.least_squares import LeastSquares, conjugate_gradients_
from lib.methods.sparsegpt import unit_inverse
from lib.packed.formats import FORMATS, Q4_0, Int4


class GPTQ(LeastSquares):
    """The sums of one input of a block, and what quantises the linears that receive it."""

    fmt: ClassVar[Int4] = FORMATS[4]  # whose numbers the weights become
    refinements: ClassVar[int] = 5  # steps of conjugate gradients
    sweeps: ClassVar[int] = 2  # of coordinate descent over all columns

    def quantise_(self, weights: Sequence[Tensor]) -> None:
        """Quantise float32 matrices (out_i, in) in place. UserError where A can't be factored."""
        start, target, hessian, across, *_ = self.problem(weights)
        mask = start == 0
        conjugate_gradients_(start, target, hessian, mask, self.refinements)
        grid = ColumnGrid(self.fmt, across, keep=(~mask).float())
        solution = round_in_order(start, hessian, grid)
        descend_(solution, target, hessian, grid, self.sweeps)
        parts = grid.matrix(solution).split([len(weight) for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.copy_(part)


class GPTQForLlamaCpp(GPTQ):
    """GPTQ to the values of llama.cpp's q4_0."""

    fmt = Q4_0()


class ColumnGrid:
    """The grid of a solution (in, out): columns of integers times scales, times norms of inputs.

    `across` (in, 1) are the norms; `keep` (in, out) is 1.0 where a weight is kept, else 0.0.
    `scales` (groups, out) are 1 until they are fitted, group by group.
    """

    def __init__(self, fmt: Int4, across: Tensor, keep: Tensor) -> None:
        self.fmt, self.across, self.keep = fmt, across, keep
        self.scales = keep.new_ones(fmt.n_groups(len(keep)), keep.shape[1])
        starts = range(0, len(keep), fmt.group)
        self.groups = [slice(start, min(start + fmt.group, len(keep))) for start in starts]

    def fit_(self, values: Tensor, here: slice) -> None:
        """Take the scales that suit the values (inputs, out) of a group of inputs."""
        across = self.across[here]
        matrix = values.mul(self.keep[here]).div_(across).T.contiguous()
        scales = self.fmt.fit_scales(matrix, costs=across.flatten().square())
        self.scales[here.start // self.fmt.group] = scales.flatten()

    def round_column(self, values: Tensor, column: int, out: Tensor) -> None:
        """Write the point of the grid that is nearest to a column's values (out,) into `out`."""
        step = self.scales[column // self.fmt.group] * self.across[column]
        torch.div(values, step, out=out)
        out.round_().clamp_(self.fmt.lowest, self.fmt.highest).mul_(step).mul_(self.keep[column])

    def matrix(self, solution: Tensor) -> Tensor:
        """A solution (in, out) on the grid as the matrix (out, in) that is packed, to the bit."""
        matrix = (solution / self.across).T.contiguous()
        return self.fmt.round_to(matrix, self.scales.T.contiguous())


def round_in_order(ideal: Tensor, hessian: Tensor, grid: ColumnGrid) -> Tensor:
    """Step 2: a solution on the grid, of the best real values (in, out) and A (in, in).

    UserError where A can't be factored.
    """
    factor = cholesky(hessian.flip(0, 1)).flip(0, 1)
    factor.div_(factor.diagonal().clone())  # C
    solution, change = torch.empty_like(ideal), torch.empty_like(ideal)  # Q and D
    for here in grid.groups:
        inverse = unit_inverse(factor[here, here])
        values = ideal[here].clone()
        if here.start:
            push = factor[: here.start, here] @ inverse
            values.addmm_(push.T, change[: here.start])
        grid.fit_(values, here)
        errors = torch.empty_like(values)
        for j, column in enumerate(range(here.start, here.stop)):
            if j:
                values[j].addmv_(errors[:j].T, inverse[:j, j], alpha=-1)
            grid.round_column(values[j], column, out=solution[column])
            torch.sub(values[j], solution[column], out=errors[j])
        torch.sub(ideal[here], solution[here], out=change[here])
    return solution


def descend_(
    solution: Tensor, target: Tensor, hessian: Tensor, grid: ColumnGrid, sweeps: int
) -> None:
    """Step 3: lower tr(Q A Q^T) - 2 tr(B Q^T) from Q = `solution` (in, out) on its grid."""
    residual = torch.addmm(target, hessian, solution, alpha=-1)  # B - A Q
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        for here in grid.groups:
            own = hessian[here, here] / diagonal[here]
            before = solution[here].clone()
            best = (residual[here] / diagonal[here, None]).add_(before)
            changes = torch.empty_like(before)
            for j, column in enumerate(range(here.start, here.stop)):
                if j:
                    best[j].addmv_(changes[:j].T, own[:j, j], alpha=-1)
                grid.round_column(best[j], column, out=solution[column])
                torch.sub(solution[column], before[j], out=changes[j])
            residual.addmm_(hessian[:, here], changes, alpha=-1)
