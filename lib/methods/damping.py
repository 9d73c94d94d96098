"""X^T X factored although rounding has cost it its positive definiteness: the damping rises.

for damping in rising(0.01):
    factor = cholesky(hessian + damping)
    if factor is not None:
        break
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from lib.util.errors import UserError

TRIES = 4


def rising(damping: float) -> Iterator[float]:
    """`damping`, then, with a warning, ten times the last; to be left when one is enough.

    UserError after a few tries.
    """
    for _ in range(TRIES - 1):
        yield damping
        warnings.warn(
            f"X^T X is not positive definite with damping {damping:g}; trying {10 * damping:g}",
            stacklevel=4,
        )
        damping *= 10
    yield damping
    raise UserError(
        f"X^T X is not positive definite, even with damping {damping:g}; "
        "use more calibration tokens (--nsamples, --seqlen) or --prune_method wanda"
    )


def cholesky(matrix: Tensor) -> Tensor | None:
    """Lower triangular L (n, n) with L L^T = `matrix`; None where it is not positive definite.

    Reads the lower triangle.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # what is not finite in a row reaches the diagonal
    return None if failed.any() | ~factor.diagonal().isfinite().all() else factor


def inverse_(factor: Tensor) -> Tensor:
    """(L L^T)^-1 (n, n) in the memory of a `factor` L that `cholesky` has returned."""
    return torch.cholesky_inverse(factor, out=factor)
