"""SparseGPT's column loop as one Triton kernel: what lib/methods/sparsegpt.py does step by step.

A GPU spends that loop waiting for launches, two for each column. Rows don't depend on each other,
so here a program takes some rows through all columns of a block, in registers: a settled column's
error goes at once into all later columns, instead of being gathered when their turn has come. The
sums are the same but for the order of their terms.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from lib.methods.sparsity import Sparsity

ROWS = 8  # of a program; 32 bytes of a column, the least that a GPU reads from memory
WEIGHTS = 1024  # of a warp; its 32 threads hold them in registers, and their masks


@triton.jit
def _settle(
    values,
    errors,
    mask,
    inverse,
    scale,
    rows,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    places = column[None, :].to(tl.int64) * rows + row[:, None]  # stored (columns, rows)
    value = tl.load(values + places, mask=inside, other=0.0)  # (ROWS, PADDED)
    if M == 0:
        pruned = tl.load(mask + places, mask=inside, other=0.0)
    else:
        pruned = tl.zeros_like(value)
        scales = tl.load(scale + column, mask=column < SIZE, other=0.0)
        member = tl.arange(0, M)
    for j in range(SIZE):
        if M > 0:
            if j % M == 0:
                score = value * scales[None, :]
                score = tl.reshape(score * score, (ROWS, PADDED // M, M))
                group = tl.arange(0, PADDED // M) == j // M
                score = tl.sum(tl.where(group[None, :, None], score, 0.0), 1)  # (ROWS, M)
                other, own = score[:, None, :], score[:, :, None]
                left = (member[None, :] < member[:, None])[None, :, :]
                first = (other < own) | ((other == own) & left)
                lowest = tl.sum(first.to(tl.int32), 2) < N  # (ROWS, M)
                chosen = (group[None, :, None] & lowest[:, None, :]).to(tl.float32)
                pruned += tl.reshape(chosen, (ROWS, PADDED))
        error = tl.sum(tl.where((column == j)[None, :], value * pruned, 0.0), 1)  # (ROWS,)
        later = (column > j) & (column < SIZE)
        weight = tl.load(inverse + j * SIZE + column, mask=later, other=0.0)
        value -= error[:, None] * weight[None, :]
    tl.store(values + places, value, mask=inside)
    tl.store(errors + places, value * pruned, mask=inside)


def settle_(
    values: Tensor, errors: Tensor, mask: Tensor, inverse: Tensor, scale: Tensor, sparsity: Sparsity
) -> None:
    """Take the columns of V (size, rows) to their last values in place, and write their errors.

    All float32, contiguous, on one device. `mask` (size, rows), 1.0 where a weight is pruned, is
    read unless the sparsity is N:M; `inverse` (size, size), unit upper triangular; `scale`
    (size, 1) weighs the values in an N:M group.
    """
    size, rows = values.shape
    padded = triton.next_power_of_2(size)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        _settle[(triton.cdiv(rows, ROWS),)](
            values,
            errors,
            mask,
            inverse,
            scale,
            rows,
            SIZE=size,
            PADDED=padded,
            N=sparsity.n or 0,
            M=sparsity.m or 0,
            ROWS=ROWS,
            num_warps=max(1, ROWS * padded // WEIGHTS),
        )
