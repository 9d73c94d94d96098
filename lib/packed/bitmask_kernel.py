"""Products of 1 to 8 tokens with a packed weight on CUDA, as one Triton kernel.

One token at a time is bound by the bytes of the weights, so they are read packed and never
unpacked to memory: a program takes some rows, a thread a byte of the mask at a time. How many
weights are kept before its byte says where its values begin (a sum over the threads of a warp);
each of its eight weights is then the next value, or none. Sums are float32. The idea that a pruned
matrix pays at half of its weights stands in MACKO, arXiv 2511.13061, whose format is another one.

Not run on a GPU yet: tested in Triton's interpreter and compiled for compute capability 8.0 and
9.0. kernel_dispatch.py lets it be used where it is right and faster.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from .layout import Packed

# rows of a program, which share what is read of x, and bytes of their masks at a time, one or two
# for each of the 32 threads; which is fastest depends on the GPU
TILES = ((2, 64), (2, 32), (4, 32))


@triton.jit
def _eight(x):
    """The columns of x (.., .., 8), each for itself: read side by side, used one by one."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (x.shape[0], x.shape[1], 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (x.shape[0], x.shape[1], 2, 2)))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit(do_not_specialize=["length"])  # else a thread takes several bytes, and x is rearranged
def _multiply(
    x,
    mask,
    weight,
    offsets,
    scale,
    bias,
    y,
    tokens,
    rows,
    width,
    length,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    real = row < rows
    mask_row = mask + row.to(tl.int64) * length  # (ROWS,)
    first = weight + tl.load(offsets + row, mask=real, other=0)
    x_row = x + token * width  # (TOKENS,)
    before = tl.zeros((ROWS,), tl.int32)  # kept in a row, up to here
    sums = tl.zeros((TOKENS, ROWS, BYTES), tl.float32)
    place = tl.arange(0, BYTES)
    ahead = tl.load(
        mask_row[:, None] + place[None, :], mask=real[:, None] & (place < length), other=0
    )
    for _ in range(0, length, BYTES):
        byte = ahead.to(tl.int32)
        later = place + BYTES  # on its way while these are multiplied
        there = real[:, None] & (later < length)[None, :]
        ahead = tl.load(mask_row[:, None] + later[None, :], mask=there, other=0)
        pairs = byte - ((byte >> 1) & 0x55)
        fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        count = (fours + (fours >> 4)) & 0x0F  # (ROWS, BYTES)
        index = before[:, None] + tl.cumsum(count, 1) - count
        column = 8 * place[:, None] + tl.arange(0, 8)[None, :]  # (BYTES, 8)
        inside = (token < tokens)[:, None, None] & (column < width)[None, :, :]
        its = _eight(tl.load(x_row[:, None, None] + column[None, :, :], mask=inside, other=0))
        for bit in tl.static_range(8):
            kept = (byte >> bit) & 1
            value = tl.load(first[:, None] + index, mask=kept != 0, other=0).to(tl.float32)
            sums += value[None, :, :] * its[bit].to(tl.float32)[:, None, :]
            index += kept
        before += tl.sum(count, 1)
        place = later
    total = tl.sum(sums, 2)  # (TOKENS, ROWS)
    if SCALED:
        total *= tl.load(scale + row, mask=real, other=0)[None, :]
    if BIASED:
        total += tl.load(bias + row, mask=real, other=0).to(tl.float32)[None, :]
    places = token.to(tl.int64)[:, None] * rows + row[None, :]
    inside = (token < tokens)[:, None] & real[None, :]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor,
    packed: Packed,
    offsets: Tensor,
    bias: Tensor | None = None,
    tile: tuple[int, int] = TILES[0],
) -> Tensor:
    """x (tokens, in) -> (tokens, out), of 1 to 8 tokens, in the dtype of x.

    `packed` (16 or 8 bits) and `offsets` as in layout.py, all on one device. `tile`: one of
    `TILES`.
    """
    mask, weight, scale = packed
    tokens, width = x.shape
    rows = len(mask)
    y = x.new_empty(tokens, rows)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _multiply[(triton.cdiv(rows, tile[0]),)](
            x.contiguous(),
            mask,
            weight,
            offsets,
            mask if scale is None else scale,
            mask if bias is None else bias,
            y,
            tokens,
            rows,
            width,
            mask.shape[1],
            SCALED=scale is not None,
            BIASED=bias is not None,
            TOKENS=triton.next_power_of_2(tokens),
            ROWS=tile[0],
            BYTES=tile[1],
            num_warps=1,
        )
    return y
