"""X^T X, the sum behind every second-order method: accumulation, damping and factorization.

X^T X is symmetric. Computed in panels of rows, each panel needs only the part right of the
diagonal, at about half the cost of a matrix product. This is BLAS's symmetric update in terms of
plain products. It uses torch's threads, adds into the sum without a buffer, and lets callers choose
when to mirror.

Also here: float32 cross products L^T X, summed over tokens.
"""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor

from ..util.errors import UserError

PANEL = 128  # panel rows on a CPU; narrower products lose more speed than they save work
HALVES = (torch.float16, torch.bfloat16)
TRIES = 4
UNFACTORED = "X^T X", "it cannot be factored", "Use more calibration tokens ({--nsamples})"


def add_upper_gram_(hessian: Tensor, x: Tensor) -> None:
    """Add X^T X of x (tokens, in), in any float dtype, to the float32 sum `hessian` (in, in).

    Only the diagonal and the part above it are meaningful afterwards, until `mirror_`.
    """
    if x.is_cuda and x.dtype in HALVES:
        return _add_halves_(hessian, x.T, x)
    x = x.float()
    if x.device.type != "cpu":  # an accelerator is faster with the whole product at once
        hessian.addmm_(x.T, x)
        return
    for start in range(0, len(hessian), PANEL):
        panel = slice(start, start + PANEL)
        hessian[panel, start:].addmm_(x[:, panel].T, x[:, start:])


def mirror_(hessian: Tensor) -> None:
    """Copy the part above the diagonal of a square matrix below it, in place."""
    for start in range(0, len(hessian), PANEL):
        end = start + PANEL
        square = hessian[start:end, start:end]
        square.copy_(square.triu() + square.triu(1).T)
        hessian[end:, start:end] = hessian[start:end, end:].T


def add_cross_(total: Tensor, left: Tensor, x: Tensor) -> None:
    """Add L^T X of `left` (tokens, out), float32, and x (tokens, in) to the float32 `total`.

    `left` is a difference of activations, small beside them, and needs more digits than x has.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        for part in split(left):
            _add_halves_(total, part.T, x)
    else:
        total.addmm_(left.T, x.float())


def split(left: Tensor) -> tuple[Tensor, Tensor]:
    """Return two bfloat16 tensors whose sum has 16 bits of each float32 number."""
    high = left.bfloat16()
    return high, (left - high.float()).bfloat16()


def _add_halves_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b of 16-bit floats on CUDA: products are exact in float32, where tensor cores add."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def damped_cholesky_(matrix: Tensor, damping: float, unit: Tensor | float = 1.0) -> Tensor:
    """Add `damping` times `unit` to the diagonal of `matrix` in place, and factor it.

    If that fails the damping rises tenfold, with a warning; UserError after TRIES attempts.
    """
    diagonal = matrix.diagonal().clone()
    for _ in range(TRIES):
        matrix.diagonal().copy_(diagonal + damping * unit)
        with suppress(UserError):
            return cholesky(matrix)
        problem = f"is not positive definite with damping {damping:g}"
        warnings.warn(f"X^T X {problem}, which is raised tenfold", stacklevel=3)
        damping *= 10
    fix = "Use more calibration tokens ({--nsamples}, {--seqlen}), or {--prune_method} wanda"
    raise UserError("X^T X", f"it {problem}", fix)


def cholesky(matrix: Tensor) -> Tensor:
    """Return lower triangular L (n, n) with L L^T = `matrix`; reads only its lower triangle.

    Raises UserError if it is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # a non-finite number in a row reaches the diagonal
    if failed.any() | ~factor.diagonal().isfinite().all():
        raise UserError(*UNFACTORED)
    return factor


def inverse_(factor: Tensor) -> Tensor:
    """Return (L L^T)^-1 (n, n) in the memory of a `factor` L from `cholesky`."""
    return torch.cholesky_inverse(factor, out=factor)
