"""X^T X factored although rounding has cost it its positive definiteness: the damping rises."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor

from lib.util.errors import UserError

TRIES = 4
UNFACTORED = "X^T X can't be factored; use more calibration tokens (--nsamples)"


def damped_cholesky_(matrix: Tensor, damping: float, unit: Tensor | float = 1.0) -> Tensor:
    """Add `damping` times `unit` to the diagonal of `matrix` in place, and factor it.

    Where that is not enough the damping rises tenfold, with a warning; UserError after a few tries.
    """
    diagonal = matrix.diagonal().clone()
    for _ in range(TRIES):
        matrix.diagonal().copy_(diagonal + damping * unit)
        with suppress(UserError):
            return cholesky(matrix)
        line = f"X^T X is not positive definite with damping {damping:g}"
        warnings.warn(f"{line}; it is raised tenfold", stacklevel=3)
        damping *= 10
    raise UserError(
        f"{line}; use more calibration tokens (--nsamples, --seqlen) or --prune_method wanda"
    )


def cholesky(matrix: Tensor) -> Tensor:
    """Lower triangular L (n, n) with L L^T = `matrix`, of which the lower triangle is read.

    UserError where it is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # what is not finite in a row reaches the diagonal
    if failed.any() | ~factor.diagonal().isfinite().all():
        raise UserError(UNFACTORED)
    return factor


def inverse_(factor: Tensor) -> Tensor:
    """(L L^T)^-1 (n, n) in the memory of a `factor` L that `cholesky` has returned."""
    return torch.cholesky_inverse(factor, out=factor)
