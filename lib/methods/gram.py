"""X^T X, the sum behind every second-order method: added up, damped and factored.

It is symmetric: taken in panels of rows, at about half the cost of a matrix product, each panel
needs only what lies right of the diagonal. That is BLAS's symmetric update made of plain products,
so it runs on torch's own threads, adds into the sum without a buffer, and lets everyone choose when
to mirror.

Beside it the products of inputs with something else, of float32, as far as a sum over tokens goes.
"""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor

from ..util.errors import UserError

PANEL = 128  # rows of a panel on a CPU; narrower products are slower than what they save
HALVES = (torch.float16, torch.bfloat16)
TRIES = 4
UNFACTORED = "X^T X can't be factored; use more calibration tokens (--nsamples)"


def add_upper_gram_(hessian: Tensor, x: Tensor) -> None:
    """Add X^T X of x (tokens, in), in any float dtype, to the float32 sum `hessian` (in, in).

    Only the diagonal and what lies above it is meaningful afterwards, until `mirror_`.
    """
    if x.is_cuda and x.dtype in HALVES:
        return _add_halves_(hessian, x.T, x)
    x = x.float()
    if x.device.type != "cpu":  # the whole product at once, as an accelerator likes it
        hessian.addmm_(x.T, x)
        return
    for start in range(0, len(hessian), PANEL):
        panel = slice(start, start + PANEL)
        hessian[panel, start:].addmm_(x[:, panel].T, x[:, start:])


def mirror_(hessian: Tensor) -> None:
    """Copy what lies above the diagonal of a square matrix below it, in place."""
    for start in range(0, len(hessian), PANEL):
        end = start + PANEL
        square = hessian[start:end, start:end]
        square.copy_(square.triu() + square.triu(1).T)
        hessian[end:, start:end] = hessian[start:end, end:].T


def add_cross_(total: Tensor, left: Tensor, x: Tensor) -> None:
    """Add L^T X of `left` (tokens, out), float32, and x (tokens, in) to the float32 `total`.

    `left` is a difference of activations, small beside them, and wants more digits than x has.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        for part in split(left):
            _add_halves_(total, part.T, x)
    else:
        total.addmm_(left.T, x.float())


def split(left: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of bfloat16 whose sum has 16 bits of each float32 number."""
    high = left.bfloat16()
    return high, (left - high.float()).bfloat16()


def _add_halves_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b of halves on CUDA: exact in float32, in which tensor cores add them up."""
    if hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)


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
