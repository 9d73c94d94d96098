"""ADMM: choose masks and weights together, aiming at the outputs of the dense model.

The problem, its scaling and its damping are those of lib/methods/least_squares.py: find the masked
matrix Q (out, in) with the least tr(Q A Q^T) - 2 tr(B Q^T).

*The iterations* (Boza 2024, arXiv 2401.02938, section 3). Split Q into a free matrix V and a masked
one Z that must agree, with scaled dual U. In terms of T = V + U an iteration reads

    mask = where |T| is lowest;  Z = T where kept, else 0;  U = T where pruned, else 0
    V = (B + rho (Z - U)) (A + rho I)^-1;  T = V + U

with one product and one mask for all layers that share the input, side by side. Differences from
the paper, each of which lowered the error of layers of two models on held-out text:

  - rho is `rho` times the unexplained share, and STIFFENING times that in the second half. The
    paper's 1 is stiff for correlated inputs. A rho tuned for those makes the masks of uncorrelated
    inputs oscillate.
  - The mask is complete from the first iteration and chosen again in each. A sparsity that rises
    along a cubic takes more iterations and ends with a higher error.
  - Unstructured masks compare the weights of a whole layer, not of a row. Each weight is scaled by
    the cost of an error in its output, if that is known (`--allocation error`).
  - Conjugate gradients on the problem end the solution, every row on its own mask.

Run: `python main.py --model MODEL --prune_method admm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gram import cholesky, inverse_
from .least_squares import LeastSquares, conjugate_gradients_
from .obs import choose_rows, solve_rows
from .sparsity import Sparsity, n_of_first, threshold

STIFFENING = 2.5  # rho's factor in the last iterations: first explore masks, then agree
EXPLORED, AGREED = 6e-3, 5e-4  # shares of the mask: a phase ends if no larger share changes
LEAST_COST = 0.01  # lower bound of an output's error cost, relative to the mean
SETTLED_STEPS = 0.6  # share of the refinements, if the masks settled


class Admm(LeastSquares):
    """The sums of one input of a block, and the solver for its layers.

    At most `iterations`, then as many stiffer ones, choose the mask. `refinements` steps of
    conjugate gradients follow. `rho` is a multiple of the inputs' unexplained variance.
    """

    iterations = 10
    refinements = 5
    rho = 1.5

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        """Prune float32 matrices (out_i, in) in place. UserError if A cannot be factored."""
        rows = [len(weight) for weight in weights]
        start, target, hessian, norms, residual_variance = self.problem(weights, drops_dead=True)
        weighting = error_weighting(self.output_costs, rows, start.device)  # (out,) or None
        if weighting is not None:
            start *= weighting
            target *= weighting
        rho = self.rho * residual_variance
        settled = alternate_(start, target, hessian, rho, self.iterations, rows, sparsities)
        layers = zip(start.abs().split(rows, 1), sparsities, strict=True)
        # masks with the exact counts
        mask = torch.cat([each.mask(part.T, overall=True).T for part, each in layers], 1)
        solution = start.masked_fill_(mask, 0)
        steps = round(self.refinements * SETTLED_STEPS) if settled else self.refinements
        conjugate_gradients_(solution, target, hessian, mask, steps)
        solution /= norms
        if weighting is not None:
            solution /= weighting
        for weight, part in zip(weights, solution.split(rows, 1), strict=True):
            weight.copy_(part.T)

    def remove_neurons_(self, weight: Tensor, gains: Tensor, count: int) -> Tensor:
        """Remove columns stage by stage (lib/methods/obs.py) from the minimum."""
        _, target, hessian, scale, _ = self.problem([weight], drops_dead=True)
        self.input_error_gram = None  # B contains it
        inverse = inverse_(cholesky(hessian))
        kept = choose_rows(inverse @ target, inverse, count)
        del inverse
        solution = solve_rows(hessian, target, kept).div_(scale[kept])
        weight.zero_()[:, kept] = solution.T
        return kept


def error_weighting(
    output_costs: Sequence[Tensor | None] | None, rows: list[int], device: torch.device
) -> Tensor | None:
    """Return the weights of errors in all layers' outputs, side by side (out,); None if equal.

    A weight is the root of an output's error cost over the mean cost in its layer, so each layer
    keeps its own share of zeros.
    """
    if output_costs is None or all(costs is None for costs in output_costs):
        return None
    weighting = []
    for costs, count in zip(output_costs, rows, strict=True):
        costs = torch.ones(count) if costs is None else costs.float()
        mean = costs.mean()
        share = costs / mean if mean > 0 else torch.ones_like(costs)
        weighting.append(share.clamp_min(LEAST_COST).sqrt().to(device))
    return torch.cat(weighting)


def masked(part: Tensor, sparsity: Sparsity) -> Tensor:
    """Return Z of a layer: its part of T (in, out) with 0 where |T| is lowest, of all or per group.

    If all weights are compared, ties with the last pruned one are pruned too.
    """
    if not sparsity.m:
        return torch.hardshrink(part, threshold(part.abs(), int(part.numel() * sparsity.ratio)))
    groups = part.unflatten(0, (-1, sparsity.m)).movedim(1, 0)  # (m, in / m, out)
    mask = n_of_first(groups.abs(), sparsity.n)
    return groups.masked_fill(mask, 0).movedim(0, 1).flatten(0, 1)


def alternate_(
    total: Tensor,
    target: Tensor,
    hessian: Tensor,
    rho: float,
    iterations: int,
    rows: list[int],
    sparsities: Sequence[Sparsity],
) -> bool:
    """Take T = V = `total` (in, out) to the last T, in place; return whether its masks settled.

    `rows` are the numbers of outputs of the layers, side by side; all sparsities have one pattern.
    A phase has at most `iterations`. It ends when almost no mask entry changes. If the first phase
    ends so, the second is skipped: stiffer iterations would change as little.
    """
    signed, last_mask = torch.empty_like(total), torch.zeros_like(total, dtype=torch.bool)
    settled = False

    def parts(*matrices: Tensor) -> Iterator[tuple]:
        """Yield each layer's parts of the matrices, and its sparsity."""
        return zip(*(matrix.split(rows, 1) for matrix in matrices), sparsities, strict=True)

    stiffer = STIFFENING * rho
    for current, later, least in ((rho, stiffer, EXPLORED), (stiffer, stiffer, AGREED)):
        if settled:
            break
        inverse = None  # frees the previous phase's inverse first
        stiff = hessian.diagonal_scatter(hessian.diagonal() + current)  # A + rho I
        inverse = inverse_(cholesky(stiff))
        del stiff
        constant = inverse @ target  # B's contribution to V
        inverse *= -current
        for iteration in range(iterations):
            changed = 0
            for part, *others, sparsity in parts(total, signed, constant, last_mask):
                negative, fixed, earlier = others
                kept = masked(part, sparsity)
                torch.add(part, kept, alpha=-2, out=negative)  # U - Z
                mask = kept == 0
                changed = changed + (mask != earlier).count_nonzero()
                earlier.copy_(mask)
                part.sub_(kept).add_(fixed)  # U, and B's contribution to V
            settled = bool(changed <= least * total.numel())
            end = settled or iteration == iterations - 1
            if end and not settled and current != later:  # U is in units of rho
                total.sub_(constant).mul_(current / later).add_(constant)
            total.addmm_(inverse, signed)
            if end:
                break
    return settled
