"""Whether the kernel for a few tokens serves a packed weight on a GPU, found by trying it there.

Before its first use on a GPU it is compared with unpacked weights on small problems. Then, for
every shape and dtype that comes up, it is timed against unpacking the weight and multiplying, which
is what is done otherwise, and against the dense product, where the GPU has room for that weight. It
is used only where it is right and faster than unpacking; a line says why not. What is chosen
changes the order of float32 sums, nothing else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.packed.layout import Packed, pack, row_offsets, unpack
from lib.util.errors import RunWarning

MOST_TOKENS = 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of |x| |W|, per sum
TRIALS = ((9, 70, 0.5), (3, 8, 0.0), (5, 131, 1.0), (6, 600, 0.3))  # rows, width, share kept

Multiply = Callable[[Tensor, Packed, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Trial:
    """Milliseconds of one product; `dense` is None where the dense weight has no room."""

    packed: float
    unpacking: float
    dense: float | None

    @property
    def faster(self) -> bool:
        return self.packed < self.unpacking

    def __str__(self) -> str:
        dense = "" if self.dense is None else f", the dense product {self.dense:.3f}"
        return f"the kernel takes {self.packed:.3f} ms, unpacking {self.unpacking:.3f}{dense}"


def small_batch_kernel(x: Tensor, packed: Packed, offsets: Tensor) -> Multiply | None:
    """What multiplies x (tokens, in) by `packed`; None where that is done by unpacking.

    Asked for the first time for a shape, it takes a moment: kernels are built and timed.
    """
    if torch.compiler.is_compiling() or x.device.type != "cuda" or x.dtype not in TOLERANCE:
        return None
    if not 1 <= len(x) <= MOST_TOKENS:
        return None
    shape = len(packed.mask), x.shape[1], 1 << (len(x) - 1).bit_length()
    of = x.device, x.dtype, packed.weight.dtype, *shape
    if of not in _admitted:
        if torch.cuda.is_current_stream_capturing():  # where nothing can be timed
            return None
        _admitted[of] = _admit(x, packed, offsets)
    return _admitted[of]


_admitted: dict[tuple, Multiply | None] = {}


def _admit(x: Tensor, packed: Packed, offsets: Tensor) -> Multiply | None:
    candidates = kernels(x.device)
    if not candidates:
        return None
    try:
        from triton.testing import do_bench

        timed = partial(do_bench, warmup=5, rep=20)  # milliseconds
        best, trial = fastest(candidates, x, packed, offsets, timed)
    except Exception as error:  # no memory for the trial, a driver's own errors: all sorts
        best, trial = None, _reason(error)
    if best is None:
        shape = f"{len(packed.mask)} x {x.shape[1]}, {len(x)} tokens"
        _tell(f"packed weights are unpacked for every product of {shape}: {trial}")
    return best


@cache
def kernels(device: torch.device) -> tuple[Multiply, ...]:
    """The Triton kernel with each of its tiles, those that are right on a GPU; told if none is."""
    try:
        from lib.packed.bitmask_kernel import TILES, multiply

        def tiled(tile: tuple[int, int]) -> Multiply:
            return lambda x, packed, offsets, bias: multiply(x, packed, offsets, bias, tile)

        right = tuple(one for one in map(tiled, TILES) if is_right(one, device))
        reason = None if right else "its results are wrong on this GPU"
    except Exception as error:  # no Triton, no C compiler, a GPU it does not know: all sorts
        right, reason = (), _reason(error)
    if reason:
        _tell(f"packed weights are unpacked for every product, without a Triton kernel: {reason}")
    return right


def is_right(multiply: Multiply, device: torch.device) -> bool:
    """Whether a kernel gives what unpacked weights in float64 give, on small random problems."""
    return all(
        deviation(multiply, *problem(*trial, tokens, dtype, bits, device)) <= TOLERANCE[dtype]
        for trial in TRIALS
        for tokens, dtype, bits in ((1, torch.float16, 16), (8, torch.bfloat16, 8))
    )


def problem(
    rows: int,
    width: int,
    share: float,
    tokens: int,
    dtype: torch.dtype,
    bits: int,
    device: torch.device,
) -> tuple[Tensor, Packed, Tensor, Tensor]:
    """x, a packed random weight with `share` of it kept, its offsets, and a bias."""
    generator = torch.Generator().manual_seed(rows + width + tokens)
    weight = torch.randn(rows, width, generator=generator)
    weight *= torch.rand(rows, width, generator=generator) < share
    packed = Packed(
        *(None if one is None else one.to(device) for one in pack(weight.to(dtype), bits))
    )
    x, bias = (torch.randn(*size, generator=generator) for size in ((tokens, width), (rows,)))
    return x.to(device, dtype), packed, row_offsets(packed.mask), bias.to(device, dtype)


def deviation(
    multiply: Multiply, x: Tensor, packed: Packed, offsets: Tensor, bias: Tensor | None
) -> float:
    """The largest error of a product, as a share of the sum of its terms' sizes."""
    weight = unpack(packed, x.shape[1], offsets, torch.float32).double()
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    error = (multiply(x, packed, offsets, bias).double() - exact).abs()
    largest = (error / size.clamp_min(torch.finfo(torch.float32).tiny)).max().item()
    return largest if math.isfinite(largest) else math.inf


def fastest(
    candidates: tuple[Multiply, ...],
    x: Tensor,
    packed: Packed,
    offsets: Tensor,
    milliseconds: Callable[[Callable], float],
) -> tuple[Multiply | None, Trial]:
    """The fastest kernel, None where unpacking is faster than it, and what was measured."""
    width = x.shape[1]
    x = torch.randn_like(x)
    best = min(candidates, key=lambda one: milliseconds(lambda: one(x, packed, offsets, None)))
    taken = milliseconds(lambda: best(x, packed, offsets, None))
    otherwise = milliseconds(lambda: F.linear(x, unpack(packed, width, offsets, x.dtype)))
    trial = Trial(taken, otherwise, _dense_time(x, packed, offsets, milliseconds))
    return best if trial.faster else None, trial


def _dense_time(
    x: Tensor, packed: Packed, offsets: Tensor, milliseconds: Callable[[Callable], float]
) -> float | None:
    try:
        dense = unpack(packed, x.shape[1], offsets, x.dtype)
        return milliseconds(lambda: F.linear(x, dense))
    except torch.OutOfMemoryError:
        return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _tell(line: str) -> None:
    warnings.warn(line, RunWarning, stacklevel=3)
