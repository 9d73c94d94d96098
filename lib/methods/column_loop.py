"""Whether SparseGPT's column loop can be one kernel on a device, decided by trying it there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lib.methods.sparsity import Sparsity, n_of_first
from lib.util.errors import RunWarning

TOLERANCE = 1e-4  # of values around 1; the order of sums differs
TRIALS = (Sparsity(0.5), Sparsity(0.5, 2, 4))


@cache
def column_loop(device: torch.device) -> Callable | None:
    """Return `settle_` of lib/methods/column_kernel.py, or None where the loop runs step by step.

    On a GPU where the kernel can't be built, or gives wrong results, a warning says so.
    """
    if device.type != "cuda":
        return None
    from lib.packed.try_kernel import try_kernel

    def build() -> Callable:
        from lib.methods.column_kernel import settle_

        return settle_

    def matches_plain_loop(settle_: Callable) -> bool:
        return all(deviation(settle_, device, sparsity) <= TOLERANCE for sparsity in TRIALS)

    kernel, reason = try_kernel(build, matches_plain_loop)
    if reason:
        line = f"SparseGPT takes longer, without its Triton kernel: {reason}"
        warnings.warn(line, RunWarning, stacklevel=2)
    return kernel


def deviation(settle_: Callable, device: torch.device, sparsity: Sparsity) -> float:
    """Return a column loop's largest deviation from the plain loop, over a small random block."""
    block = random_block(64, 50, sparsity)
    values, errors = block[0].clone(), block[1].clone()
    settle_plainly_(values, errors, *block[2:], sparsity)
    on_device = [tensor.to(device) for tensor in block]
    settle_(*on_device, sparsity)
    pairs = zip((values, errors), on_device[:2], strict=True)
    return max((plain - fast.cpu()).abs().max().item() for plain, fast in pairs)


def random_block(size: int, rows: int, sparsity: Sparsity) -> list[Tensor]:
    """Make all arguments of `settle_` but the last: values, errors, mask, inverse, scale."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, rows, generator=generator)
    mask = (torch.rand(size, rows, generator=generator) < sparsity.ratio).float()
    inverse = torch.randn(size, size, generator=generator).triu(1) / size**0.5 + torch.eye(size)
    scale = torch.rand(size, 1, generator=generator) + 0.5
    return [values, torch.zeros_like(values), mask, inverse, scale]


def settle_plainly_(
    values: Tensor, errors: Tensor, mask: Tensor, inverse: Tensor, scale: Tensor, sparsity: Sparsity
) -> None:
    """The column loop as the paper has it; arguments as those of `settle_`, on the CPU."""
    for j in range(len(values)):
        if sparsity.m and j % sparsity.m == 0:
            group = slice(j, j + sparsity.m)
            mask[group] = n_of_first((values[group] * scale[group]).square(), sparsity.n)
        errors[j] = values[j] * mask[j]
        values[j + 1 :] -= inverse[j, j + 1 :, None] * errors[j]
