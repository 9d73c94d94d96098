"""The mask of a sparse matrix, one bit per weight, and its kept values, contiguous.

- mask (out, ceil(in / 8)), uint8: bit j % 8 of byte j // 8, least significant first, is 1 if
  weight j of the row is kept. If the width is no multiple of 8, the last bits are 0.
- weight: the kept values, row after row, as formats.py stores them; `scale` beside integers.

The beginnings of rows in `weight` are not stored but counted from the mask (`row_offsets`). All
nonzero weights are kept, nan too. A zero loses its sign, so equal matrices pack to equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE_WEIGHTS = 2**18  # per thread: a tile's scratch tensors then stay in a CPU's cache
LARGE_TILE = 2**24  # on accelerators, where launches cost more
TO_TOP_BYTE = 0x0102040810204080  # gathers eight bytes of 0 or 1 as bits in the top byte

_bits = torch.arange(256)[:, None] >> torch.arange(8) & 1  # (256, 8), bits of each byte
BITS = _bits.byte().view(torch.int64).squeeze(1)  # byte -> eight bytes of 0 or 1, as one integer
# byte -> number of bits set before each of its eight, as eight bytes in one integer
PREFIX_POPCOUNT = (_bits.cumsum(1) - _bits).byte().view(torch.int64).squeeze(1)
POPCOUNT = _bits.sum(1, dtype=torch.int32)
NOT_2_4 = _bits.view(256, 2, 4).sum(2).amax(1) > 2  # whether one of its halves keeps over two


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither nan nor inf; reads it once, without masks."""
    if not tensor.numel():
        return True
    # a nan becomes both extremes
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


class Packed(NamedTuple):
    """A packed matrix; `scale` exists only beside integers."""

    mask: Tensor
    weight: Tensor
    scale: Tensor | None = None


def keep(matrix: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of a matrix (out, in), and the kept ones of `values` (out, in): (nnz,)."""
    rows, width = matrix.shape
    mask = matrix.new_empty(rows, (width + 7) // 8, dtype=torch.uint8)
    kept_values = values.new_empty(int(torch.count_nonzero(matrix)))
    begin = 0
    for part in tiles(rows, width, matrix.device):
        tile = matrix[part]
        kept = torch.zeros(len(tile), 8 * mask.shape[1], dtype=torch.bool, device=matrix.device)
        kept[:, :width] = tile != 0
        mask[part] = kept.view(torch.int64).mul(TO_TOP_BYTE).bitwise_right_shift_(56)
        chosen = values[part].masked_select(kept[:, :width])
        kept_values[begin : begin + len(chosen)] = chosen
        begin += len(chosen)
    return mask, kept_values


def places(mask: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number of kept weights before every bit of a mask (rows, bytes), flat.

    `offsets` are those of the rows; nothing waits for a device.
    """
    counts = look_up(POPCOUNT, mask).to(dtype)
    begin = counts.cumsum(1, dtype=dtype).sub_(counts)
    begin += offsets[:, None].to(dtype)
    before = look_up(PREFIX_POPCOUNT, mask).view(torch.uint8).view(*begin.shape, 8)
    return (begin.unsqueeze(-1) + before).flatten()


def row_offsets(mask: Tensor) -> Tensor:
    """Return the number of kept weights before each row, and in all: int64 (out + 1,)."""
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(look_up(POPCOUNT, mask).sum(1, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def kept_of(mask: Tensor, in_features: int) -> Tensor:
    """Return the kept weights of a mask: bool (out, in)."""
    kept = look_up(BITS, mask).view(torch.bool)
    return kept.view(len(mask), 8 * mask.shape[1])[:, :in_features]


def is_two_of_four(mask: Tensor) -> bool:
    """Return whether no aligned group of four adjacent weights keeps more than two."""
    return not bool(look_up(NOT_2_4, mask).any())


def tiles(rows: int, in_features: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows with about as many weights as are processed at a time."""
    if torch.compiler.is_compiling():  # a graph would hold each slice
        yield slice(0, rows)
        return
    budget = TILE_WEIGHTS * torch.get_num_threads() if device.type == "cpu" else LARGE_TILE
    step = max(1, budget // max(1, in_features))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def look_up(table: Tensor, mask: Tensor) -> Tensor:
    """Return `table` at every byte of a mask, or other index, in its shape."""
    here = _on_device(table, mask.device) if mask.is_cuda else table.to(mask.device)
    return here.index_select(0, mask.flatten().int()).view(mask.shape)


@cache
def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table once, since a copy from the host waits for the device."""
    return table.to(device)
