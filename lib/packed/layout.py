"""The packed form of a 2:4 matrix: two plain tensors, 9/16 of the dense size at 16 bits.

A row of `in` weights is `in / 4` groups of four, with at most two non-zeros in each.

- values (out, in / 2), the weight's dtype: the left half holds the first kept weight of every
  group, the right half the second.
- positions (out, ceil(in / 8)), uint8: four bits for a group, `first | second << 2` with
  first < second in 0..3. With H = ceil(in / 8), the low half of byte j belongs to group j and the
  high half to group H + j; where the number of groups is odd, the last high half is padding.

Halves side by side, not interleaved, because packing, unpacking and multiplying then read and
write contiguous runs. A group with fewer than two non-zeros keeps the lowest free positions, so
equal matrices pack to equal bytes; a zero loses its sign.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lib.util.errors import UserError

TILE_GROUPS = 2**16  # per thread: the scratch tensors of a tile then stay in the second-level cache
# four bytes of 0 or 1, as one int32, times this: the four bits side by side at the top
TO_TOP_BITS = 1 << 28 | 1 << 21 | 1 << 14 | 1 << 7
PADDING = 0b0100  # positions 0 and 1
WIDE = {1: torch.int32, 2: torch.int64}  # a group of weights of so many bytes, as one integer
PAIRS = [(first, second) for first in range(3) for second in range(first + 1, 4)]
# four bits of positions by pattern of non-zeros (bit k: weight k is kept); 0: more than two are
NIBBLES = [
    next((i | k << 2 for i, k in PAIRS if not pattern & ~(1 << i | 1 << k)), 0)
    for pattern in range(16)
]


def packed_shapes(out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of values and positions. UserError where rows are no multiple of four weights."""
    if in_features % 4:
        raise UserError(
            f"a matrix of {out_features} x {in_features}: 2:4 needs rows of a multiple of 4 weights"
        )
    return (out_features, in_features // 2), (out_features, (in_features + 7) // 8)


def is_packable(weight: Tensor) -> bool:
    """Whether no group of four along the rows of `weight` (out, in) has over two non-zeros."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return all(
        bool((_kept(weight[rows]).sum(-1, dtype=torch.uint8) <= 2).all())
        for rows in _tiles(weight.shape[0], weight.shape[1] // 4, weight.device)
    )


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and positions of a 2:4 `weight` (out, in). UserError where it is not 2:4."""
    if weight.dim() != 2:
        raise UserError(f"a tensor of shape {tuple(weight.shape)}: only a matrix can be packed")
    out_features, in_features = weight.shape
    values_shape, positions_shape = packed_shapes(out_features, in_features)
    groups, half = in_features // 4, positions_shape[1]
    values = weight.new_empty(values_shape)
    positions = torch.empty(positions_shape, dtype=torch.uint8, device=weight.device)
    table = torch.tensor(NIBBLES, dtype=torch.uint8, device=weight.device)
    take = _take_by_shift if weight.element_size() <= 2 else _take_by_gather
    for rows in _tiles(out_features, groups, weight.device):
        kept = _kept(weight[rows]).view(torch.int32).squeeze(-1)  # (rows, groups), a byte a weight
        pattern = (kept * TO_TOP_BITS >> 28) & 15
        nibble = table.index_select(0, pattern.flatten()).view(pattern.shape)
        if not bool(nibble.all()):
            wrong = int((nibble == 0).sum())
            raise UserError(
                f"a matrix of {out_features} x {in_features} is not 2:4 ({wrong} groups of four in "
                f"rows {rows.start} to {rows.stop - 1} keep more than two); prune with "
                "--sparsity_type 2:4"
            )
        take(weight[rows], nibble, values[rows])
        positions[rows] = nibble[:, :half]
        positions[rows, : groups - half] |= nibble[:, half:] << 4
    if 2 * half > groups:
        positions[:, -1] |= PADDING << 4
    return values.add_(0), positions  # a kept -0.0 becomes 0.0


def unpack(values: Tensor, positions: Tensor, dense: Tensor | None = None) -> Tensor:
    """The dense matrix (out, in), on the device of `values`, into `dense` if given; the inverse
    of `pack`."""
    out_features, groups = values.shape[0], values.shape[1] // 2
    if dense is None:
        dense = values.new_empty(out_features, 4 * groups)
    assert dense.shape == (out_features, 4 * groups) and dense.dtype == values.dtype
    by_shift = values.element_size() <= 2
    place = _place_by_shift if by_shift else _place_by_scatter
    wide = WIDE[values.element_size()] if by_shift else torch.int64
    nibble = scratch = None
    for rows in _tiles(out_features, groups, values.device):
        count = rows.stop - rows.start
        if nibble is None:  # of the first tile, the largest
            nibble = positions.new_empty(count, 2 * positions.shape[1])
            scratch = torch.empty((2, count, groups), dtype=wide, device=values.device)
        low, high = nibble[:count].chunk(2, 1)
        torch.bitwise_and(positions[rows], 15, out=low)
        torch.bitwise_right_shift(positions[rows], 4, out=high)
        place(values[rows], nibble[:count, :groups], dense[rows], scratch[:, :count])
    return dense


def check_packed(values: Tensor, positions: Tensor, out_features: int, in_features: int) -> None:
    """UserError where the two tensors are no packed form of an (out, in) matrix."""
    expected = packed_shapes(out_features, in_features)
    if (tuple(values.shape), tuple(positions.shape)) != expected:
        raise UserError(
            f"packed values {tuple(values.shape)} and positions {tuple(positions.shape)}: "
            f"a matrix of {out_features} x {in_features} has {expected[0]} and {expected[1]}"
        )
    if positions.dtype != torch.uint8:
        raise UserError(f"packed positions are {positions.dtype}, not uint8")
    low, high = positions & 15, positions >> 4
    for nibble in (low, high):
        if not bool(((nibble & 3) < (nibble >> 2)).all()):
            raise UserError(
                "packed positions are out of order (a group's first must lie before its second): "
                "the file is damaged or was not written by this package; save it again"
            )


def _kept(weight: Tensor) -> Tensor:
    """Non-zeros by group: bool (rows, groups, 4)."""
    if weight.dtype == torch.float16:
        weight = weight.view(torch.int16) & 0x7FFF  # not the sign; .bool() is slow on float16
    return weight.bool().contiguous().view(weight.shape[0], -1, 4)


def _tiles(rows: int, groups: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose scratch tensors fit a CPU's cache; larger where launches cost more."""
    budget = TILE_GROUPS * torch.get_num_threads() if device.type == "cpu" else 2**24
    step = max(1, budget // max(1, groups))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _places(nibble: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Positions of the first and of the second kept weights, uint8, times `unit` (at most 85)."""
    return (nibble & 3).mul_(unit), (nibble >> 2).mul_(unit)


def _take_by_shift(weight: Tensor, nibble: Tensor, values: Tensor) -> None:
    """One group is one integer, four times as wide as a weight; both kept bit patterns are
    shifted to its low end. For weights of one or two bytes."""
    size = weight.element_size()
    group = weight.contiguous().flatten()
    if group.storage_offset() % 4:  # torch views no wider integers from there
        group = group.clone()
    group = group.view(WIDE[size]).view(nibble.shape)  # (rows, groups)
    parts = values.view(torch.int8 if size == 1 else torch.int16).chunk(2, 1)
    shift = torch.empty_like(group)
    for part, place in zip(parts, _places(nibble, 8 * size), strict=True):
        shift.copy_(place)
        part.copy_(torch.bitwise_right_shift(group, shift, out=shift))


def _take_by_gather(weight: Tensor, nibble: Tensor, values: Tensor) -> None:
    """Any dtype: every kept weight is read from its column."""
    first_column = torch.arange(0, weight.shape[1], 4, device=weight.device)
    index = torch.empty(nibble.shape, dtype=torch.int64, device=weight.device)
    for part, place in zip(values.chunk(2, 1), _places(nibble, 1), strict=True):
        torch.gather(weight, 1, index.copy_(place).add_(first_column), out=part)


def _place_by_shift(values: Tensor, nibble: Tensor, dense: Tensor, scratch: Tensor) -> None:
    """The inverse of `_take_by_shift`: a group is put together in its place in `dense`."""
    bits = 8 * values.element_size()
    parts = values.view(torch.uint8 if bits == 8 else torch.uint16).chunk(2, 1)
    target, (second, shift) = dense.view(scratch.dtype), scratch
    for wide, part, place in zip((target, second), parts, _places(nibble, bits), strict=True):
        shift.copy_(place)
        wide.copy_(part)
        wide <<= shift
    target |= second


def _place_by_scatter(values: Tensor, nibble: Tensor, dense: Tensor, scratch: Tensor) -> None:
    """Any dtype: zeros, and every kept weight written to its column."""
    first_column = torch.arange(0, dense.shape[1], 4, device=values.device)
    dense.zero_()
    for part, place in zip(values.chunk(2, 1), _places(nibble, 1), strict=True):
        dense.scatter_(1, scratch[0].copy_(place).add_(first_column), part)
