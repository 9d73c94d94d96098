"""The packed form of a sparse matrix of any pattern: a bit for each weight, and what is kept.

- mask (out, ceil(in / 8)), uint8: bit j % 8 of byte j // 8, the least significant first, says that
  weight j of the row is kept. Where rows are no multiple of 8 weights the last bits are 0.
- weight: the kept values, row after row. At 16 bits in the matrix's dtype, (nnz,); at 8 bits int8,
  (nnz,); at 4 bits two in a byte, the first in the low bits, uint8 (ceil(nnz / 2),).
- scale, which the integers are multiplied by (see grid.py): at 8 bits float32 (out,), at 4 bits
  bfloat16 (out, ceil(in / group)) for groups of 32, 64 or 128 inputs.

Where rows begin in `weight` is not stored: it is counted from the mask (`row_offsets`). At 16 bits
the mask takes 1/16 of the matrix's dense bytes, so that half of its weights take 9/16. Kept is what
is not zero, nan too; a zero loses its sign, so equal matrices pack to equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import PackedError
from .grid import (
    GROUP,
    SCALE_DTYPE,
    group_size,
    has_short_scales,
    n_groups,
    quantise,
    spread_scales,
)

TILE_WEIGHTS = 2**18  # per thread: the scratch tensors of a tile then stay in a CPU's cache
LARGE_TILE = 2**24  # where launches cost more
TO_TOP_BYTE = 0x0102040810204080  # times eight bytes of 0 or 1: these bits, side by side at the top
BY_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of a weight, in bytes
STORED_DTYPE = {8: torch.int8, 4: torch.uint8}  # of `weight`; at 16 bits the matrix's own

_bits = torch.arange(256)[:, None] >> torch.arange(8) & 1  # (256, 8), of every byte
BITS = _bits.byte().view(torch.int64).squeeze(1)  # byte -> eight bytes of 0 or 1, as one integer
# byte -> how many bits are set before each of its eight, as eight bytes in one integer
PREFIX_POPCOUNT = (_bits.cumsum(1) - _bits).byte().view(torch.int64).squeeze(1)
POPCOUNT = _bits.sum(1, dtype=torch.int32)
NOT_2_4 = _bits.view(256, 2, 4).sum(2).amax(1) > 2  # whether one of its halves keeps over two


class Packed(NamedTuple):
    """A packed matrix; `scale` stands beside integers alone."""

    mask: Tensor
    weight: Tensor
    scale: Tensor | None = None


def packed_shapes(
    out_features: int, in_features: int, nnz: int, bits: int, group: int = GROUP
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a packed matrix with `nnz` kept weights, by name."""
    shapes: dict[str, tuple[int, ...]] = {"mask": (out_features, (in_features + 7) // 8)}
    shapes["weight"] = ((nnz + 1) // 2,) if bits == 4 else (nnz,)
    if bits == 8:
        shapes["scale"] = (out_features,)
    elif bits == 4:
        shapes["scale"] = (out_features, n_groups(in_features, group))
    return shapes


def packed_bytes(
    out_features: int,
    in_features: int,
    nnz: int,
    bits: int = 16,
    itemsize: int = 2,
    group: int = GROUP,
) -> int:
    """Bytes of a packed matrix as it is saved; `itemsize`: of a value's dtype at 16 bits."""
    mask = out_features * ((in_features + 7) // 8)
    if bits == 8:
        return mask + nnz + 4 * out_features
    if bits == 4:
        return mask + (nnz + 1) // 2 + 2 * out_features * n_groups(in_features, group)
    return mask + nnz * itemsize


def is_smaller_packed(weight: Tensor) -> bool:
    """Whether a matrix (out, in) has enough zeros to be smaller packed, at 16 bits a value.

    The offsets that are counted on loading are part of the size.
    """
    out_features, in_features = weight.shape
    nnz = int(torch.count_nonzero(weight))
    offsets = 8 * (out_features + 1)
    return packed_bytes(out_features, in_features, nnz) + offsets < 2 * weight.numel()


def pack(
    weight: Tensor, bits: int = 16, group: int = GROUP, scales: Tensor | None = None
) -> Packed:
    """The packed form of `weight` (out, in): values in its own dtype, or as `bits` 8 or 4 integers.

    `group`: inputs that share a scale at 4 bits. `scales` (out, groups): of the grid that the
    integers are rounded to, by default the nearest one. PackedError where `weight` is no matrix or,
    at 8 and 4 bits, not finite.
    """
    if weight.dim() != 2:
        raise PackedError(f"a tensor of shape {tuple(weight.shape)}: only a matrix can be packed")
    out_features, in_features = weight.shape
    nnz = int(torch.count_nonzero(weight))
    shapes, new = packed_shapes(out_features, in_features, nnz, bits, group), weight.new_empty
    mask = new(shapes["mask"], dtype=torch.uint8)
    values = new(nnz, dtype=weight.dtype if bits == 16 else torch.int8)
    scale = new(shapes["scale"], dtype=SCALE_DTYPE[bits]) if bits < 16 else None
    begin = 0
    for rows in _tiles(out_features, in_features, weight.device):
        tile = weight[rows]
        kept = torch.zeros(len(tile), 8 * mask.shape[1], dtype=torch.bool, device=weight.device)
        kept[:, :in_features] = tile != 0
        mask[rows] = kept.view(torch.int64).mul(TO_TOP_BYTE).bitwise_right_shift_(56)
        if scale is not None:
            given = None if scales is None else scales[rows]
            tile, fitted = quantise(tile, bits=bits, group=group, scales=given)
            scale[rows] = fitted.view(len(tile), *scale.shape[1:])
        chosen = tile.masked_select(kept[:, :in_features])
        values[begin : begin + len(chosen)] = chosen
        begin += len(chosen)
    return Packed(mask, _as_nibbles(values) if bits == 4 else values, scale)


def _as_nibbles(codes: Tensor) -> Tensor:
    """int8 codes (n,) from -8 to 7, two in a byte: uint8 (ceil(n / 2),)."""
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(torch.uint8).view(-1, 2)
    return (codes[:, 0] & 15) | (codes[:, 1] << 4)


def row_offsets(mask: Tensor) -> Tensor:
    """How many weights are kept before each row, and in all: int64 (out + 1,)."""
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(_look_up(POPCOUNT, mask).sum(1, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def unpack(
    packed: Packed,
    in_features: int,
    offsets: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """The dense matrix (out, in), or some of its rows: the inverse of `pack`.

    `offsets`: of `row_offsets`, counted here where they are not given. `dtype`: of the result
    where the values are integers (default: float32). Every weight looks its value up by how many
    are kept before it; nothing waits for a device.
    """
    mask, weight, scale = packed
    offsets = row_offsets(mask) if offsets is None else offsets
    mask, offsets = mask[rows], offsets[:-1][rows]
    dtype = weight.dtype if scale is None else dtype or torch.float32
    dense = weight.new_empty(len(mask), in_features, dtype=dtype)
    if not weight.numel():
        return dense.zero_()
    per_byte = 2 if weight.dtype == torch.uint8 else 1
    group = None
    if scale is not None:
        scale = scale.view(len(scale), -1)[rows]
        group = group_size(scale, in_features) if per_byte == 2 else None
    largest = weight.numel() * per_byte
    index_dtype = torch.int32 if largest + 8 * in_features < 2**31 else torch.int64
    for part in _tiles(len(mask), in_features, weight.device):
        counts = _look_up(POPCOUNT, mask[part]).to(index_dtype)  # (rows, bytes)
        begin = counts.cumsum(1, dtype=index_dtype).sub_(counts)
        begin += offsets[part, None].to(index_dtype)
        before = _look_up(PREFIX_POPCOUNT, mask[part]).view(torch.uint8).view(*begin.shape, 8)
        index = (begin.unsqueeze(-1) + before).clamp_(max=largest - 1).flatten()
        values = _at_nibbles(weight, index) if per_byte == 2 else weight.index_select(0, index)
        integers = BY_SIZE[values.element_size()]
        # all ones where kept: nan and inf of a neighbour must not come through
        kept = _look_up(BITS, mask[part]).view(torch.uint8).to(integers).neg_()
        values = values.view(integers).bitwise_and_(kept.flatten()).view(values.dtype)
        tile = values.view(len(begin), -1)[:, :in_features]
        if scale is not None:
            scales = scale[part].float()
            tile = tile.float().mul_(
                scales if group is None else spread_scales(scales, group, in_features)
            )
        dense[part] = tile
    return dense


def _at_nibbles(weight: Tensor, index: Tensor) -> Tensor:
    """int8 codes at positions `index` of 4-bit values that stand two in a byte."""
    pairs = weight.index_select(0, index >> 1)
    codes = (pairs >> (index & 1).mul_(4).to(torch.uint8)) & 15
    return (codes ^ 8).view(torch.int8).sub_(8)


def kept_of(mask: Tensor, in_features: int) -> Tensor:
    """What a mask says is kept: bool (out, in)."""
    kept = _look_up(BITS, mask).view(torch.bool)
    return kept.view(len(mask), 8 * mask.shape[1])[:, :in_features]


def is_two_of_four(mask: Tensor) -> bool:
    """Whether no four weights side by side, from a multiple of four on, keep more than two."""
    return not bool(_look_up(NOT_2_4, mask).any())


def check_packed(
    packed: Packed,
    out_features: int,
    in_features: int,
    bits: int,
    nnz: int | None = None,
    group: int = GROUP,
) -> None:
    """PackedError where the tensors are no packed form of an (out, in) matrix.

    `nnz`: how many weights are kept; by default as many as `weight` has, which at 4 bits leaves
    open whether the last byte holds one or two.
    """
    mask, weight, scale = packed
    held = weight.numel() * (2 if bits == 4 else 1) if nnz is None else nnz
    expected = packed_shapes(out_features, in_features, held, bits, group)
    for name, shape in expected.items():
        tensor = getattr(packed, name)
        if tensor is None or tuple(tensor.shape) != shape:
            actual = "missing" if tensor is None else tuple(tensor.shape)
            raise PackedError(
                f"packed {name} is {actual}: a matrix of {out_features} x {in_features} at {bits} "
                f"bits has {shape}"
            )
    if mask.dtype != torch.uint8:
        raise PackedError(f"packed mask is {mask.dtype}, not uint8")
    integers = weight.dtype in STORED_DTYPE.values()
    if weight.dtype != STORED_DTYPE[bits] if bits < 16 else integers:
        raise PackedError(f"packed weight is {weight.dtype}, which are not {bits} bits")
    damaged = "the file is damaged or was not written by this package; save it again"
    if in_features % 8 and bool((mask[:, -1] >> in_features % 8).any()):
        raise PackedError(f"packed mask has bits beyond the row's {in_features} weights: {damaged}")
    kept = int(_look_up(POPCOUNT, mask).sum(dtype=torch.int64))
    if kept not in ((held, held - 1) if bits == 4 and nnz is None else (held,)):
        raise PackedError(f"packed mask keeps {kept} weights, of {held}: {damaged}")
    if bits == 4 and kept % 2 and int(weight[-1]) > 15:
        raise PackedError(f"packed weight has a value after its last: {damaged}")
    if scale is None:
        return
    if scale.dtype != SCALE_DTYPE[bits]:
        raise PackedError(f"packed scale is {scale.dtype}, not {SCALE_DTYPE[bits]}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise PackedError(f"packed scale is not finite and above 0: {damaged}")
    if bits == 4 and not has_short_scales(scale):
        raise PackedError(f"packed scale has more than five significant bits: {damaged}")


def _look_up(table: Tensor, mask: Tensor) -> Tensor:
    """`table` at every byte of a mask, in the mask's shape."""
    here = _on_device(table, mask.device) if mask.is_cuda else table.to(mask.device)
    return here.index_select(0, mask.flatten().int()).view(mask.shape)


@cache
def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copied once: a copy from the host waits for the device."""
    return table.to(device)


def _tiles(rows: int, in_features: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows, of about as many weights as are packed or unpacked at a time."""
    if torch.compiler.is_compiling():  # a graph would hold each of them
        yield slice(0, rows)
        return
    budget = TILE_WEIGHTS * torch.get_num_threads() if device.type == "cpu" else LARGE_TILE
    step = max(1, budget // max(1, in_features))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
