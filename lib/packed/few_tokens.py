"""One to a few tokens through a packed linear on CPU, by one kernel that torch.compile generates.

A single token is bound by the bytes read. The kernel reads the packed bytes and picks, for every
kept weight, its input among the four of the group: two tests of a bit and two selects. Inputs are
laid out as four planes (4, in / 4) beforehand, so that all reads are contiguous.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

MOST_TOKENS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor, values: Tensor) -> bool:
    """Whether this path is meant for inputs x (..., in) and packed values (out, in / 2)."""
    tokens = x.numel() // max(1, x.shape[-1])
    fits = x.device.type == "cpu" and x.dtype == values.dtype and x.dtype in DTYPES
    return fits and 0 < tokens <= MOST_TOKENS and values.numel() > 0


def linear(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) -> (..., out), summed in float32."""
    kernel, groups = _kernel(), values.shape[1] // 2
    planes = x.reshape(-1, groups, 4).transpose(1, 2).float().contiguous()  # (tokens, 4, groups)
    y = torch.stack([kernel(plane, values, positions) for plane in planes])  # (tokens, out)
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], values.shape[0])


def can_compile() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        subprocess.run([get_cpp_compiler(), "--version"], check=True, capture_output=True)
    except (InvalidCxxCompiler, OSError, subprocess.CalledProcessError):
        return False
    return True


@lru_cache(maxsize=1)
def _kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_one_token, fullgraph=True, dynamic=True)


def _one_token(planes: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Inputs as planes (4, groups), float32 -> (out,), float32."""
    half, groups = positions.shape[1], planes.shape[1]
    both = groups - half  # bytes that hold two groups; the last may hold one
    bits = positions.int()  # (out, half)
    first, second = values[:, :groups], values[:, groups:]  # (out, groups)
    low = _products(planes, first, second, bits, 0, slice(0, both))
    high = _products(planes, first, second, bits, 4, slice(half, groups))
    y = (low + high).sum(-1)
    if half > both:
        y = y + _products(planes, first, second, bits, 0, slice(both, half)).sum(-1)
    return y


def _products(
    planes: Tensor, first: Tensor, second: Tensor, bits: Tensor, bit: int, columns: slice
) -> Tensor:
    """The two products of every group, added: (out, groups of `columns`)."""
    x0, x1, x2, x3 = planes[:, columns]
    width = columns.stop - columns.start
    bits = bits[:, :width] if bit or not columns.start else bits[:, columns]
    of_first = torch.where((bits & 2 << bit) != 0, x2, torch.where((bits & 1 << bit) != 0, x1, x0))
    upper = torch.where((bits & 4 << bit) != 0, x3, x2)
    of_second = torch.where((bits & 8 << bit) == 0, x1, upper)
    return first[:, columns].float() * of_first + second[:, columns].float() * of_second
