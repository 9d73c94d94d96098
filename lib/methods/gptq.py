"""Quantize kept weights column by column, and adjust the remaining columns to compensate.

A pruned matrix W (out, in) becomes Q on a grid of lib/packed/formats.py, zero where W is
zero. As in ADMM the target is the dense model's output, here that of the model before quantization:
minimize tr(Q A Q^T) - 2 tr(B Q^T) of lib/methods/least_squares.py. There are three steps.

 1. Conjugate gradients move W to the best real values on its mask, because the inputs have changed.
 2. Columns are quantized from left to right, and the columns to the right compensate for each, with
    the inverse of A (GPTQ, Frantar et al. 2023, arXiv 2210.17323). With A = R R^T, R upper
    triangular, and C = R / diag(R) this is SparseGPT's recursion (lib/methods/sparsegpt.py,
    equation (*)) with a grid in place of a mask. Pruned weights take part: corrections to them
    become errors in their turn, since they are set to 0. The scales of a group of inputs are
    fitted when it is reached, to its values at that time. An error in the weights of input j is
    weighted by diag(X^T X)_j.
 3. Column by column once more, every kept weight moves to the best grid point with all others
    fixed (coordinate descent). The ideal move is r / A_jj, where r is its row of B - A Q. This step
    respects the mask exactly, unlike step 2.

Layers that share the input are solved side by side, transposed to (in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..formats.base import ScaledFormat
from ..formats.grids import Grid
from .gram import cholesky
from .least_squares import LeastSquares, conjugate_gradients_
from .sparsegpt import unit_inverse


class MasterWeights(NamedTuple):
    """What the training of a quantized matrix (out, in) begins with; `scales` (out, groups).

    `masters` (out, in), float32, are the values just before quantization. They have the same
    codes, and are near the codes that they may change to. Pruned weights are 0.
    """

    masters: Tensor
    scales: Tensor


class GPTQ(LeastSquares):
    """The sums of one input of a block, and the quantizer for its linear layers."""

    workspace = [(3, 3.4, 0), (1, 9.4, 0)]
    damping = 18.0  # more than for pruning: 4-bit codes overfit few tokens more than zeros do
    # an input that is almost always 0 would get huge weights, and take the levels of its group
    _least_norm = 0.1
    revision = 2
    refinements: ClassVar[int] = 5  # steps of conjugate gradients
    sweeps: ClassVar[int] = 2  # passes of coordinate descent over all columns

    def quantize_(self, weights: Sequence[Tensor], fmt: ScaledFormat) -> list[MasterWeights]:
        """Quantize float32 matrices (out_i, in) in place. UserError if A cannot be factored."""
        start, target, hessian, norms, _ = self.problem(weights)
        mask = (start == 0) & fmt.has_zero
        conjugate_gradients_(start, target, hessian, mask, self.refinements)
        grid = SolverGrid(fmt, norms, keep=(~mask).float())
        solution, unrounded = round_in_order(start, hessian, grid)
        descend_(solution, target, hessian, grid, self.sweeps, unrounded)
        unrounded.mul_(grid.keep).div_(norms)
        sizes = [len(weight) for weight in weights]
        for weight, part in zip(weights, grid.matrix(solution).split(sizes), strict=True):
            weight.copy_(part)
        both = unrounded.T.contiguous().split(sizes), grid.scales.split(sizes)
        return [MasterWeights(*each) for each in zip(*both, strict=True)]


class SolverGrid(Grid):
    """The grid of a solution (in, out): columns of integers times scales times input norms.

    `input_norms` is (in, 1); `keep` (in, out) is 1.0 where a weight is kept, else 0.0. Scales
    are 1 until they are fitted, group by group, as multiples of `units` if there are any.
    """

    def __init__(self, form: ScaledFormat, input_norms: Tensor, keep: Tensor) -> None:
        scales = keep.new_ones(form.n_groups(len(keep)), keep.shape[1]).T  # a column is contiguous
        super().__init__(form, True, scales)
        self.input_norms, self.keep = input_norms, keep
        self.units: Tensor | None = None
        starts = range(0, len(keep), form.group)
        self.groups = [slice(start, min(start + form.group, len(keep))) for start in starts]

    def fit_units_(self, values: Tensor) -> None:
        """Fit the units of scales to all values (in, out)."""
        self.units = self.form.fit_units(*self._weights(values, slice(None)))

    def fit_group_(self, values: Tensor, here: slice) -> None:
        """Fit the scales of a group of inputs to its values (inputs, out)."""
        place = here.start // self.form.group
        units = None if self.units is None else self.units[:, place, None]
        scales = self.form.fit_scales(*self._weights(values, here), units)
        self.scales[:, place] = scales.flatten()

    def _weights(self, values: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        """Return weights (out, inputs) of values (inputs, out), and what their errors cost."""
        norms = self.input_norms[here]
        weights = values.mul(self.keep[here]).div_(norms).T.contiguous()
        return weights, norms.flatten().square()

    def round_group_(
        self,
        here: slice,
        values: Tensor,
        coupling: Tensor,
        solution: Tensor,
        before: Tensor | None = None,
    ) -> Tensor:
        """Round a group's values (inputs, out) to the nearest points, in order, into a solution.

        Returns `before` minus the rounded values; `before` defaults to the values. Each row is
        first lowered by the differences of the rows above, weighted by its column of `coupling`.
        """
        steps = self.scales[:, here.start // self.form.group] * self.input_norms[here]
        differences = torch.empty_like(values)
        before = values if before is None else before
        rows = steps, self.keep[here], values, solution[here], before, differences
        columns = zip(*(each.unbind() for each in rows), strict=True)
        for j, (step, keep, value, rounded, old, difference) in enumerate(columns):
            if j:
                value.addmv_(differences[:j].T, coupling[:j, j], alpha=-1)
            torch.div(value, step, out=rounded)
            self.form.snap_(rounded).mul_(step).mul_(keep)
            torch.sub(old, rounded, out=difference)
        return differences

    def matrix(self, solution: Tensor) -> Tensor:
        """Return a solution (in, out) on the grid as the exact matrix (out, in) that is saved."""
        return self.rounded(solution / self.input_norms).T.contiguous()


def round_in_order(ideal: Tensor, hessian: Tensor, grid: SolverGrid) -> tuple[Tensor, Tensor]:
    """Step 2: quantize the best real values (in, out), given A (in, in), in order.

    Returns the solution on the grid, and its values before rounding. UserError if A is indefinite.
    """
    grid.fit_units_(ideal)
    factor = cholesky(hessian.flip(0, 1)).flip(0, 1)
    factor.div_(factor.diagonal().clone())  # C
    solution, change, unrounded = (torch.empty_like(ideal) for _ in range(3))  # Q, D
    for here in grid.groups:
        inverse = unit_inverse(factor[here, here])
        values = ideal[here].clone()
        if here.start:
            push = factor[: here.start, here] @ inverse
            values.addmm_(push.T, change[: here.start])
        grid.fit_group_(values, here)
        grid.round_group_(here, values, inverse, solution)
        torch.sub(ideal[here], solution[here], out=change[here])
        unrounded[here] = values
    return solution, unrounded


def descend_(
    solution: Tensor,
    target: Tensor,
    hessian: Tensor,
    grid: SolverGrid,
    sweeps: int,
    unrounded: Tensor,
) -> None:
    """Step 3: lower tr(Q A Q^T) - 2 tr(B Q^T) from Q = `solution` (in, out) on its grid.

    `unrounded` (in, out) receives the ideal values of the last sweep.
    """
    residual = torch.addmm(target, hessian, solution, alpha=-1)  # B - A Q
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        for here in grid.groups:
            coupling = -hessian[here, here] / diagonal[here]
            before = solution[here].clone()
            best = (residual[here] / diagonal[here, None]).add_(before)
            differences = grid.round_group_(here, best, coupling, solution, before)
            residual.addmm_(hessian[:, here], differences)
            unrounded[here] = best
