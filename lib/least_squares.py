"""Least squares with most weights forced to zero: minimise tr(Q A Q^T) - 2 tr(B Q^T) over masked Q.

A (in, in) is symmetric, B and Q are (out, in), one problem for each row. Where A comes from and
what the iterations mean is told in lib/admm.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function

from lib.errors import UserError
from lib.gram import mirror_

STIFFENING = 2.5  # of rho in the second half of the iterations: first explore masks, then agree
FLOOR = 0.01  # of an input's variance: the least damping
DAMPING_TRIES = 4


def scaled(sums: Tensor, share: float) -> tuple[Tensor, float, Tensor, Tensor]:
    """A = S^-1 (sums) S^-1 + damping (in, in), the unexplained share, S (in,), and dead inputs.

    The damping is FLOOR and `share` of the unexplained share, which is that of the damped matrix.
    Reads the upper triangle of `sums`. Where rounding has cost it its positive definiteness the
    floor is raised tenfold, with a warning; UserError after a few tries.
    """
    hessian = sums.clone()
    mirror_(hessian)
    dead = hessian.diagonal() == 0
    scale = hessian.diagonal().sqrt().masked_fill_(dead, 1)
    hessian /= scale
    hessian /= scale[:, None]
    hessian.diagonal().add_(FLOOR)
    floor = FLOOR
    for attempt in range(DAMPING_TRIES):
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not (failed.any() | ~factor.isfinite().all()):
            unexplained = (1 / torch.cholesky_inverse(factor).diagonal()).mean().item()
            hessian.diagonal().add_(share * unexplained)
            return hessian, (1 + share) * unexplained, scale, dead
        if attempt < DAMPING_TRIES - 1:
            warnings.warn(
                f"X^T X is not positive definite with damping {floor:g}; trying {10 * floor:g}",
                stacklevel=3,
            )
            hessian.diagonal().add_(9 * floor)
            floor *= 10
    raise UserError(
        f"X^T X is not positive definite, even with damping {floor:g}; "
        "use more calibration tokens (--nsamples, --seqlen) or --prune_method wanda"
    )


def alternate(
    start: Tensor,
    target: Tensor,
    hessian: Tensor,
    rho: float,
    iterations: int,
    choose: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Z and its mask (out, in) after `iterations` from V = `start`, which is overwritten."""
    free, total, signed = start, start.clone(), torch.empty_like(start)
    dual = torch.zeros_like(start)
    for iteration in range(iterations):
        if iteration == iterations // 2 and iteration:
            rho *= STIFFENING
            dual /= STIFFENING  # U is in units of rho
        if iteration in (0, iterations // 2):
            with record_function("factorisation"):
                stiff = hessian.clone()
                stiff.diagonal().add_(rho)
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(stiff))
        torch.add(free, dual, out=total)
        mask = choose(total)
        torch.mul(total, mask, out=dual)
        torch.add(total, dual, alpha=-2, out=signed)  # Z - U
        torch.mm(signed.mul_(rho).add_(target), inverse, out=free)
    total = free.add_(dual)
    mask = choose(total)
    return total.masked_fill_(mask, 0), mask


def conjugate_gradients_(
    solution: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, steps: int
) -> None:
    """Lower tr(Q A Q^T) - 2 tr(B Q^T) from Q = `solution` (out, in), each row on its own mask."""
    tiny = torch.finfo(solution.dtype).tiny
    keep = (~mask).float()  # cheaper to multiply with than a mask is to fill
    residual = torch.addmm(target, solution, hessian, alpha=-1).mul_(keep)
    direction = residual.clone()
    norm = residual.square().sum(1, keepdim=True)  # (out, 1)
    for _ in range(steps):
        image = direction @ hessian
        curvature = (direction * image).sum(1, keepdim=True)
        step = norm / curvature.clamp_min(tiny)  # 0 where a row is solved or wholly pruned
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1).mul_(keep)
        before, norm = norm, residual.square().sum(1, keepdim=True)
        direction.mul_(norm / before.clamp_min(tiny)).add_(residual)
