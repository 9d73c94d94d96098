"""The kernel for a few tokens, on a GPU or in Triton's interpreter, and how it is let in.

Compared with unpacked weights in float64, as a share of what the terms of each sum come to.
"""

from __future__ import annotations

import pytest
import torch
from skips import NO_TRITON
from support import CPU
from torch import Tensor
from torch.nn import functional as F

from lib.packed import kernel_dispatch
from lib.packed.errors import PackedWarning
from lib.packed.kernel_dispatch import (
    TOLERANCE,
    Timing,
    deviation,
    fastest,
    problem,
    small_batch_kernel,
)
from lib.packed.layout import Packed, pack, row_offsets, unpack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OTHER_GPU = torch.device("cuda:7")


@pytest.fixture
def kernel():
    pytest.importorskip("triton", reason=NO_TRITON)
    from lib.packed import bitmask_kernel

    return bitmask_kernel


EVERY = [(5, dtype, bits) for dtype in DTYPES for bits in (16, 8)]
EVERY += [(tokens, DTYPES[tokens % 3], 16 - 8 * (tokens % 2)) for tokens in range(1, 9)]


@pytest.mark.parametrize("tokens, dtype, bits", EVERY)
def test_as_unpacked_in_float64(kernel, tokens, dtype, bits):
    given = problem(5, 531, 0.5, tokens, dtype, bits, DEVICE)  # two tiles and a part of a byte
    assert deviation(kernel.multiply, *given) <= TOLERANCE[dtype]
    x, packed, offsets, _ = given
    assert deviation(kernel.multiply, x, packed, offsets, None) <= TOLERANCE[dtype]
    assert kernel.multiply(x, packed, offsets).dtype == dtype


@pytest.mark.parametrize(
    "rows, width", [(1, 1), (3, 7), (2, 8), (5, 9), (9, 256), (4, 513), (6, 1024)]
)
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_any_width_and_any_share(kernel, rows, width, share):
    given = problem(rows, width, share, 3, torch.float32, 16, DEVICE)
    for tile in kernel.TILES:

        def multiply(x, packed, offsets, bias, tile=tile):
            return kernel.multiply(x, packed, offsets, bias, tile)

        assert deviation(multiply, *given) <= TOLERANCE[torch.float32], tile


def test_rows_without_a_weight_between_full_ones(kernel):
    weight = torch.randn(6, 83, generator=torch.Generator().manual_seed(0))
    weight[[0, 2, 3]], weight[5, :40] = 0, 0
    packed = Packed(*(None if one is None else one.to(DEVICE) for one in pack(weight)))
    x = torch.randn(2, 83, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y = kernel.multiply(x, packed, row_offsets(packed.mask))
    assert (y[:, [0, 2, 3]] == 0).all()
    assert torch.allclose(y.cpu(), x.cpu() @ weight.T, rtol=1e-5, atol=1e-5)


def test_what_is_not_kept_is_not_read(kernel):
    """Values of the next rows and what lies behind the last ones must not come through."""
    weight = torch.zeros(3, 20)
    weight[:, ::2] = 1
    packed = pack(weight)
    behind = torch.cat([packed.weight, torch.full((64,), torch.nan)])[: packed.weight.numel()]
    packed = Packed(packed.mask.to(DEVICE), behind.to(DEVICE))
    x = torch.ones(1, 20, device=DEVICE)
    assert (kernel.multiply(x, packed, row_offsets(packed.mask)) == 10).all()


def test_slices_of_a_larger_tensor(kernel):
    x, packed, offsets, bias = problem(5, 64, 0.5, 4, torch.float32, 16, DEVICE)
    wide = torch.cat([x, x + 1], 1)[:, :64]  # rows that do not lie side by side
    assert not wide.is_contiguous()
    assert torch.equal(kernel.multiply(wide, packed, offsets), kernel.multiply(x, packed, offsets))


# --- how it is let in


def unpacking(x: Tensor, packed: Packed, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, unpack(packed, x.shape[1], offsets, x.dtype), bias)


def forgets_the_scale(x: Tensor, packed: Packed, offsets: Tensor, bias: Tensor | None) -> Tensor:
    scale = packed.scale if packed.scale is None else torch.ones_like(packed.scale)
    return unpacking(x, Packed(packed.mask, packed.weight, scale), offsets, bias)


def forgets_the_bias(x: Tensor, packed: Packed, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return unpacking(x, packed, offsets, None)


def gives_nothing(x: Tensor, packed: Packed, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_full((len(x), len(packed.mask)), torch.nan)


def test_the_check_finds_a_wrong_kernel():
    assert kernel_dispatch.matches_reference(unpacking, CPU)
    for wrong in (forgets_the_scale, forgets_the_bias, gives_nothing):
        assert not kernel_dispatch.matches_reference(wrong, CPU)


def test_the_kernel_passes_the_check(kernel):
    assert kernel_dispatch.matches_reference(kernel.multiply, DEVICE)


def clock(*milliseconds: float):
    """One time after another, of whatever is run."""
    left = list(milliseconds)

    def timed(run) -> float:
        run()
        return left.pop(0)

    return timed


def test_the_fastest_is_used_where_it_is_faster_than_unpacking():
    x, packed, offsets, _ = problem(8, 32, 0.5, 2, torch.float32, 16, CPU)
    candidates = unpacking, forgets_the_bias
    best, trial = fastest(candidates, x, packed, offsets, clock(3, 2, 2, 5, 1))
    assert best is forgets_the_bias and trial == Timing(packed=2, unpacking=5, dense=1)
    none, trial = fastest(candidates, x, packed, offsets, clock(3, 7, 3, 2, 1))
    assert none is None
    assert str(trial) == "the kernel takes 3.000 ms, unpacking 2.000, the dense product 1.000"


def test_a_dense_weight_without_room_is_left_out():
    def timed(run) -> float:
        if timed.left == 0:
            raise torch.OutOfMemoryError("no room")
        timed.left -= 1
        return 1.0

    timed.left = 3
    given = problem(8, 32, 0.5, 2, torch.float32, 16, CPU)[:3]
    _, trial = fastest((unpacking,), *given, timed)
    assert trial.dense is None and "dense" not in str(trial)


@pytest.mark.parametrize(
    "milliseconds, said", [(2.0, ""), (4.0, "kernel takes 4.000 ms"), (None, "no room")]
)
def test_a_line_says_why_not(kernel, milliseconds, said, monkeypatch, recwarn):
    def do_bench(run, **_) -> float:
        if milliseconds is None:
            raise torch.OutOfMemoryError("no room\nfor a trial")
        run()
        return next(times)

    times = iter([milliseconds, milliseconds, 3.0, 1.0])
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(kernel_dispatch, "kernels", lambda device: (unpacking,))
    found = kernel_dispatch._choose(*problem(8, 32, 0.5, 2, torch.float32, 16, CPU)[:3])
    lines = [str(one.message) for one in recwarn if one.category is PackedWarning]
    assert (found is unpacking) == (not said) and len(lines) == bool(said)
    assert all("unpacked for every product of 8 x 32, 2 tokens" in line for line in lines)
    assert all(said in line and "\n" not in line for line in lines)


def test_not_on_a_cpu_and_not_for_many_tokens():
    assert small_batch_kernel(*problem(8, 32, 0.5, 2, torch.float32, 16, CPU)[:3]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel is found")
def test_a_gpu_without_the_kernel_is_told_once():
    kernel_dispatch.kernels.cache_clear()
    with pytest.warns(PackedWarning, match="without a Triton kernel: ") as warned:
        assert kernel_dispatch.kernels(OTHER_GPU) == kernel_dispatch.kernels(OTHER_GPU) == ()
    assert len(warned) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_kernel():
    assert kernel_dispatch.kernels(torch.device("cuda:0"))
    x, packed, offsets, _ = problem(4096, 4096, 0.5, 1, torch.float16, 16, DEVICE)
    found = small_batch_kernel(x, packed, offsets)
    assert found is small_batch_kernel(x, packed, offsets)
    if found:
        assert deviation(found, x, packed, offsets, None) <= TOLERANCE[torch.float16]
    assert small_batch_kernel(x.expand(9, -1), packed, offsets) is None
