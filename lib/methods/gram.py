"""X^T X, the sum behind every second-order method, at about half the cost of a matrix product.

X^T X is symmetric: taken in panels of rows, each panel needs only what lies right of the diagonal.
That is BLAS's symmetric update made of plain products, so it runs on torch's own threads, adds
into the sum without a buffer, and lets everyone choose when to mirror.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 128  # rows of a panel on a CPU; narrower products are slower than what they save
HALVES = (torch.float16, torch.bfloat16)


def add_upper_gram_(hessian: Tensor, x: Tensor) -> None:
    """Add X^T X of x (tokens, in), in any float dtype, to the float32 sum `hessian` (in, in).

    Only the diagonal and what lies above it is meaningful afterwards, until `mirror_`.
    """
    assert hessian.dtype == torch.float32 and hessian.shape == (x.shape[1], x.shape[1])
    if x.device.type != "cpu":
        _add_product_(hessian, x)
        return
    x = x.float()
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


def _add_product_(hessian: Tensor, x: Tensor) -> None:
    """The whole product at once, as an accelerator likes it."""
    if x.is_cuda and x.dtype in HALVES:
        # products of halves are exact in float32, in which tensor cores can add them up
        hessian += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        x = x.float()
        hessian.addmm_(x.T, x)
