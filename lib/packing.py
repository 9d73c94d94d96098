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

from lib.errors import UserError

TILE_GROUPS = 2**16  # per thread: the scratch tensors of a tile then stay in the second-level cache
PADDING = 0b0100  # positions 0 and 1
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


def packed_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of values and positions together."""
    values, positions = packed_shapes(out_features, in_features)
    return values[0] * values[1] * dtype.itemsize + positions[0] * positions[1]


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
    first_column = torch.arange(0, in_features, 4, device=weight.device)  # (groups,)
    for rows in _tiles(out_features, groups, weight.device):
        kept = _kept(weight[rows]).view(torch.int32).squeeze(-1)  # (rows, groups), a byte a weight
        pattern = (kept | kept >> 7 | kept >> 14 | kept >> 21) & 15
        nibble = table.index_select(0, pattern.flatten()).view(pattern.shape)
        if not bool(nibble.all()):
            wrong = int((nibble == 0).sum())
            raise UserError(
                f"a matrix of {out_features} x {in_features} is not 2:4 ({wrong} groups of four in "
                f"rows {rows.start} to {rows.stop - 1} keep more than two); prune with "
                "--sparsity_type 2:4"
            )
        for slot in (0, 1):
            columns = (nibble >> 2 * slot & 3).long().add_(first_column)  # (rows, groups)
            torch.gather(
                weight[rows], 1, columns, out=values[rows, slot * groups : (slot + 1) * groups]
            )
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
    place, wide = _place_by_scatter, torch.int64
    if values.element_size() <= 2:
        place = _place_by_shift
        wide = torch.int32 if values.element_size() == 1 else torch.int64
    scratch = None
    for rows in _tiles(out_features, groups, values.device):
        if scratch is None:  # of the first tile, the largest
            size = (3, rows.stop - rows.start, positions.shape[1])
            scratch = torch.empty(size, dtype=wide, device=values.device)
        place(values[rows], positions[rows], dense[rows], scratch[:, : rows.stop - rows.start])
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
    return weight.bool().contiguous().view(weight.shape[0], -1, 4)


def _tiles(rows: int, groups: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose scratch tensors fit a CPU's cache; larger where launches cost more."""
    budget = TILE_GROUPS * torch.get_num_threads() if device.type == "cpu" else 2**24
    step = max(1, budget // max(1, groups))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _halves(positions: Tensor, groups: int) -> Iterator[tuple[slice, Tensor, int]]:
    """For the low and the high half bytes: their groups, their bytes, the first bit."""
    half = positions.shape[1]
    yield slice(0, half), positions, 0
    if groups > half:
        yield slice(half, groups), positions[:, : groups - half], 4


def _place_by_shift(values: Tensor, positions: Tensor, dense: Tensor, scratch: Tensor) -> None:
    """One group is one integer, four times as wide as a weight; both kept bit patterns are
    shifted to their place in it. For weights of one or two bytes."""
    bits = 8 * values.element_size()
    narrow = torch.uint8 if bits == 8 else torch.uint16
    groups = values.shape[1] // 2
    patterns, target = values.view(narrow), dense.view(scratch.dtype)  # (rows, groups)
    for columns, byte, bit in _halves(positions, groups):
        first, second, shift = scratch[:, :, : byte.shape[1]]
        for slot, part in enumerate((first, second)):
            shift.copy_((byte >> bit + 2 * slot & 3).mul_(bits))
            start = slot * groups
            part.copy_(patterns[:, start + columns.start : start + columns.stop])
            part <<= shift
        torch.bitwise_or(first, second, out=target[:, columns])


def _place_by_scatter(values: Tensor, positions: Tensor, dense: Tensor, scratch: Tensor) -> None:
    """Any dtype: zeros, and every kept weight written to its column."""
    groups = values.shape[1] // 2
    first_column = torch.arange(0, 4 * groups, 4, device=values.device)
    dense.zero_()
    for columns, byte, bit in _halves(positions, groups):
        index = scratch[0, :, : byte.shape[1]]
        for slot in (0, 1):
            index.copy_(byte >> bit + 2 * slot & 3).add_(first_column[columns])
            start = slot * groups
            part = values[:, start + columns.start : start + columns.stop]
            dense.scatter_(1, index, part)
