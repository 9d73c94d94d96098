"""Which kernel multiplies a few tokens by a packed weight on a GPU, decided by trying it there.

Before its first use on a GPU the Triton kernel is compared with unpacked weights on small problems.
Then, for every shape and dtype that comes up, it is timed against unpacking the weight and
multiplying, which is what is done otherwise, and against the dense product, where the GPU has room
for that weight. It is used only where it is right and faster than unpacking; a line says why not.
The choice changes the order of float32 sums, nothing else.
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

from .errors import PackedWarning
from .layout import Packed, pack, row_offsets, unpack
from .try_kernel import one_line, try_kernel

MOST_TOKENS = 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of |x| |W|, per sum
TRIALS = ((9, 70, 0.5), (3, 8, 0.0), (5, 131, 1.0), (6, 600, 0.3))  # rows, width, share kept

Multiply = Callable[[Tensor, Packed, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Timing:
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
    """The kernel that multiplies x (tokens, in) by `packed`; None where it has to be unpacked.

    The first call for a shape takes a moment: kernels are built and timed. There is no kernel for
    4-bit values.
    """
    if torch.compiler.is_compiling() or x.device.type != "cuda" or x.dtype not in TOLERANCE:
        return None
    if not 1 <= len(x) <= MOST_TOKENS or packed.weight.dtype == torch.uint8:
        return None
    shape = len(packed.mask), x.shape[1], 1 << (len(x) - 1).bit_length()
    key = x.device, x.dtype, packed.weight.dtype, *shape
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():  # where nothing can be timed
            return None
        _chosen[key] = _choose(x, packed, offsets)
    return _chosen[key]


_chosen: dict[tuple, Multiply | None] = {}


def _choose(x: Tensor, packed: Packed, offsets: Tensor) -> Multiply | None:
    candidates = kernels(x.device)
    if not candidates:
        return None
    try:
        from triton.testing import do_bench

        timer = partial(do_bench, warmup=5, rep=20)  # milliseconds
        kernel, result = fastest(candidates, x, packed, offsets, timer)
    except Exception as error:  # no memory for the trial, a driver's own errors
        kernel, result = None, one_line(error)
    if kernel is None:
        shape = f"{len(packed.mask)} x {x.shape[1]}, {len(x)} tokens"
        _warn(f"packed weights are unpacked for every product of {shape}: {result}")
    return kernel


@cache
def kernels(device: torch.device) -> tuple[Multiply, ...]:
    """The Triton kernel with each of its tiles that is right on a GPU; a warning if none is."""

    def build() -> list[Multiply]:
        from .bitmask_kernel import TILES, multiply

        def with_tile(tile: tuple[int, int]) -> Multiply:
            return lambda x, packed, offsets, bias: multiply(x, packed, offsets, bias, tile)

        tiled = [with_tile(tile) for tile in TILES]
        return [kernel for kernel in tiled if matches_reference(kernel, device)]

    right, reason = try_kernel(build, check=bool)
    if reason:
        _warn(f"packed weights are unpacked for every product, without a Triton kernel: {reason}")
    return tuple(right or ())


def matches_reference(multiply: Multiply, device: torch.device) -> bool:
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
    packed = pack(weight.to(dtype), bits)
    packed = Packed(*(None if part is None else part.to(device) for part in packed))
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
    timer: Callable[[Callable], float],
) -> tuple[Multiply | None, Timing]:
    """The fastest kernel, None where unpacking is faster than it, and what was measured."""
    width = x.shape[1]
    x = torch.randn_like(x)
    best = min(candidates, key=lambda kernel: timer(lambda: kernel(x, packed, offsets, None)))
    timing = Timing(
        packed=timer(lambda: best(x, packed, offsets, None)),
        unpacking=timer(lambda: F.linear(x, unpack(packed, width, offsets, x.dtype))),
        dense=_dense_time(x, packed, offsets, timer),
    )
    return best if timing.faster else None, timing


def _dense_time(
    x: Tensor, packed: Packed, offsets: Tensor, timer: Callable[[Callable], float]
) -> float | None:
    try:
        dense = unpack(packed, x.shape[1], offsets, x.dtype)
        return timer(lambda: F.linear(x, dense))
    except torch.OutOfMemoryError:
        return None


def _warn(line: str) -> None:
    warnings.warn(line, PackedWarning, stacklevel=3)
