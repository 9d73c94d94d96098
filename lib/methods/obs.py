"""Remove whole inputs of a linear layer and adjust the others (Optimal Brain Surgeon).

Rows of Q (in, out) minimize tr(Q^T A Q) - 2 tr(B^T Q). If the rows of a set J are set to zero, the
least increase from its minimum Q is tr(Q_J^T [A^-1]_JJ^-1 Q_J), which for a single row is
|Q_j|^2 / [A^-1]_jj. The other rows then change by -[A^-1]_:J [A^-1]_JJ^-1 Q_J, and A^-1 by
-[A^-1]_:J [A^-1]_JJ^-1 [A^-1]_J: (Hassibi & Stork 1993; for whole neurons ZipLM, Kurtic et al.
2023, arXiv 2302.04089, and SlimGPT, Ling et al. 2024, arXiv 2412.18110). Rows are removed in small
stages, the lowest score first, each stage from the solution of the previous one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..util.errors import UserError
from .gram import UNFACTORED, cholesky

STAGE = 16  # rows removed at a time


def choose_rows(solution: Tensor, inverse: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of the kept rows in ascending order; overwrites both arguments.

    `solution` (in, out) is Q of all rows, `inverse` (in, in) is A^-1. UserError if they become
    non-finite.
    """
    tiny = torch.finfo(solution.dtype).tiny
    removed = torch.zeros(len(solution), dtype=torch.bool, device=solution.device)
    left = len(solution) - count
    while left:
        score = solution.norm(dim=1).square_() / inverse.diagonal().clamp_min(tiny)
        score.masked_fill_(removed, torch.inf)
        rows = score.argsort(stable=True)[: min(STAGE, left)].sort().values
        columns, block = inverse[:, rows].clone(), inverse[rows[:, None], rows]
        # solve_ex, unlike solve, does not wait for an accelerator's check for singular matrices
        solution.addmm_(columns, torch.linalg.solve_ex(block, solution[rows])[0], alpha=-1)
        inverse.addmm_(columns, torch.linalg.solve_ex(block, columns.T)[0], alpha=-1)
        removed[rows] = True
        left -= len(rows)
    if not solution.isfinite().all():
        raise UserError(*UNFACTORED)
    return (~removed).nonzero().flatten()


def solve_rows(hessian: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Return the best Q (kept, out) on the rows `kept` alone, given A (in, in) and B (in, out)."""
    return torch.cholesky_solve(target[kept], cholesky(hessian[kept[:, None], kept]))


def keep_highest_(weight: Tensor, score: Tensor, count: int) -> Tensor:
    """Zero all columns of a matrix (out, in) except the `count` with the highest scores (in,).

    In place. Returns the indices of those in ascending order; ties go to the higher index.
    """
    order = score.argsort(stable=True)
    others, kept = order.split([len(score) - count, count])
    weight[:, others] = 0
    return kept.sort().values
