"""Round kept weights to integers with scales, and let the others make up for it.

A pruned matrix W (out, in) becomes Q on the grid of lib/packed/grid.py, zero where W is zero. As in
ADMM it aims at what the untouched model computes, which is here the model before rounding: wanted
is the least tr(Q A Q^T) - 2 tr(B Q^T) of lib/methods/least_squares.py. There are three steps.

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
Run: `python main.py --model MODEL --prune_method admm --replace_sparse_layers --pack_bits 4`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.methods.damping import cholesky
from lib.methods.least_squares import LeastSquares, conjugate_gradients_
from lib.methods.sparsegpt import unit_inverse
from lib.packed.grid import GROUP, LIMITS, dequantise, quantise
from lib.util.errors import UserError

BLOCK = 64  # columns that are settled before all others hear of them, where a row has one scale


class Rounding(LeastSquares):
    """The sums of one input of a block, and what rounds the linears that receive it.

    `bits`: 8, with a scale for each row, or 4, with one for each `group` of inputs. `refinements`:
    steps of conjugate gradients; `sweeps`: of coordinate descent over all columns.
    """

    bits = 4
    refinements = 5
    sweeps = 2

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.group = GROUP if self.bits == 4 else width

    def round_(self, weights: Sequence[Tensor]) -> None:
        """Round float32 matrices (out_i, in) in place. UserError where A can't be factored."""
        rows = [len(weight) for weight in weights]
        start, target, hessian, across, *_ = self.problem(weights)
        mask = start == 0
        conjugate_gradients_(start, target, hessian, mask, self.refinements)
        grid = ColumnGrid(across, keep=(~mask).float(), bits=self.bits, group=self.group)
        if self.bits == 8:
            row_scales = [quantise(weight, bits=8)[1] for weight in weights]
            grid.scales.copy_(torch.cat(row_scales).T)
        solution = round_in_order(start, hessian, grid)
        descend_(solution, target, hessian, grid, self.sweeps)
        for weight, part in zip(weights, grid.matrix(solution).split(rows), strict=True):
            weight.copy_(part)


class ColumnGrid:
    """The grid of a solution (in, out): rows of integers times scales, times the norms of inputs.

    `across` (in, 1) are the norms; `keep` (in, out) is 1.0 where a weight is kept, else 0.0;
    `group` inputs share a scale. `scales` (groups, out) are 1 until they are set.
    """

    def __init__(self, across: Tensor, keep: Tensor, bits: int, group: int) -> None:
        self.across, self.keep, self.bits, self.group = across, keep, bits, group
        self.scales = keep.new_ones(-(-len(keep) // group), keep.shape[1])
        size = group if bits == 4 else min(group, BLOCK)
        starts = range(0, len(keep), size)
        self.blocks = [slice(start, min(start + size, len(keep))) for start in starts]

    def fit_(self, values: Tensor, here: slice) -> None:
        """Take the scales that suit the values (inputs, out) of a group of inputs."""
        across = self.across[here]
        matrix = values.mul(self.keep[here]).div_(across).T.contiguous()
        costs = across.flatten().square()
        _, scales = quantise(matrix, bits=self.bits, group=self.group, costs=costs)
        self.scales[here.start // self.group] = scales.flatten()

    def round_column(self, values: Tensor, column: int, out: Tensor) -> None:
        """Write the point of the grid that is nearest to a column's values (out,) into `out`."""
        step = self.scales[column // self.group] * self.across[column]
        torch.div(values, step, out=out)
        out.round_().clamp_(*LIMITS[self.bits]).mul_(step).mul_(self.keep[column])

    def matrix(self, solution: Tensor) -> Tensor:
        """A solution (in, out) on the grid as the matrix (out, in) that is packed, to the bit."""
        scales = self.scales.T.contiguous()
        matrix = (solution / self.across).T.contiguous()
        codes, _ = quantise(matrix, bits=self.bits, group=self.group, scales=scales)
        return dequantise(codes, scales, self.group)


def round_in_order(ideal: Tensor, hessian: Tensor, grid: ColumnGrid) -> Tensor:
    """Step 2: a solution on the grid, of the best real values (in, out) and A (in, in).

    UserError where A can't be factored.
    """
    with record_function("factorisation"):
        lower = cholesky(hessian.flip(0, 1))
        if lower is None:
            raise UserError("X^T X can't be factored; use more calibration tokens (--nsamples)")
        factor = lower.flip(0, 1)
        factor.div_(factor.diagonal().clone())  # C
    solution, change = torch.empty_like(ideal), torch.empty_like(ideal)  # Q and D
    for here in grid.blocks:
        inverse = unit_inverse(factor[here, here])
        values = ideal[here].clone()
        if here.start:
            push = factor[: here.start, here] @ inverse
            values.addmm_(push.T, change[: here.start])
        if grid.bits == 4 and here.start % grid.group == 0:
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
        for here in grid.blocks:
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
