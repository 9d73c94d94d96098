"""The packed form of a sparse matrix of any pattern: a bit for each weight, and what is kept.

- mask (out, ceil(in / 8)), uint8: bit j % 8 of byte j // 8, the least significant first, says that
  weight j of the row is kept. Where rows are no multiple of 8 weights the last bits are 0.
- weight (kept,): the kept values, row after row, in the matrix's dtype; or int8.
- scale (out,), float32, beside int8 values alone: what a row's values are multiplied by
  (see lib/packed/eight_bits.py).

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

from lib.packed.eight_bits import to_codes
from lib.util.errors import UserError

TILE_WEIGHTS = 2**18  # per thread: the scratch tensors of a tile then stay in a CPU's cache
LARGE_TILE = 2**24  # where launches cost more
TO_TOP_BYTE = 0x0102040810204080  # times eight bytes of 0 or 1: these bits, side by side at the top
BY_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of a weight, in bytes

_bits = torch.arange(256)[:, None] >> torch.arange(8) & 1  # (256, 8), of every byte
KEPT = _bits.byte().view(torch.int64).squeeze(1)  # byte -> eight bytes of 0 or 1, as one integer
RANK = (_bits.cumsum(1) - _bits).byte().view(torch.int64).squeeze(1)  # -> kept ones before each
COUNT = _bits.sum(1, dtype=torch.int32)  # -> how many are kept
CROWDED = _bits.view(256, 2, 4).sum(2).amax(1) > 2  # -> whether one of its halves keeps over two


class Packed(NamedTuple):
    """A packed matrix; `scale` stands beside int8 values alone."""

    mask: Tensor
    weight: Tensor
    scale: Tensor | None = None


def packed_shapes(
    out_features: int, in_features: int, kept: int, bits: int
) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a packed matrix, by name."""
    shapes: dict[str, tuple[int, ...]] = {"mask": (out_features, (in_features + 7) // 8)}
    shapes["weight"] = (kept,)
    return shapes | ({"scale": (out_features,)} if bits == 8 else {})


def packed_bytes(out_features: int, in_features: int, kept: int, size: int) -> int:
    """Of a packed matrix as it is saved; `size`: bytes of a value, 1 for int8 with scales."""
    mask, scale = out_features * ((in_features + 7) // 8), 4 * out_features if size == 1 else 0
    return mask + kept * size + scale


def is_smaller_packed(weight: Tensor) -> bool:
    """Whether a matrix (out, in) has enough zeros to be smaller packed, at 16 bits a value.

    The offsets that are counted on loading are part of the size.
    """
    out_features, in_features = weight.shape
    kept = int(torch.count_nonzero(weight))
    offsets = 8 * (out_features + 1)
    return packed_bytes(out_features, in_features, kept, 2) + offsets < 2 * weight.numel()


def pack(weight: Tensor, bits: int = 16) -> Packed:
    """The packed form of `weight` (out, in): values in its own dtype, or `bits` 8 as int8.

    UserError where it is no matrix or, at 8 bits, not finite.
    """
    if weight.dim() != 2:
        raise UserError(f"a tensor of shape {tuple(weight.shape)}: only a matrix can be packed")
    out_features, in_features = weight.shape
    kept = int(torch.count_nonzero(weight))
    shapes, new = packed_shapes(out_features, in_features, kept, bits), weight.new_empty
    mask = new(shapes["mask"], dtype=torch.uint8)
    values = new(kept, dtype=torch.int8 if bits == 8 else weight.dtype)
    scale = new(out_features, dtype=torch.float32) if bits == 8 else None
    begin = 0
    for rows in _tiles(out_features, in_features, weight.device):
        tile = weight[rows]
        kept_here = torch.zeros(
            len(tile), 8 * mask.shape[1], dtype=torch.bool, device=weight.device
        )
        kept_here[:, :in_features] = tile != 0
        mask[rows] = kept_here.view(torch.int64).mul(TO_TOP_BYTE).bitwise_right_shift_(56)
        if scale is not None:
            tile, scale[rows] = to_codes(tile)
        chosen = tile.masked_select(kept_here[:, :in_features])
        values[begin : begin + len(chosen)] = chosen
        begin += len(chosen)
    return Packed(mask, values, scale)


def row_offsets(mask: Tensor) -> Tensor:
    """Where each row begins in `weight`, and where the last one ends: int64 (out + 1,)."""
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(_look_up(COUNT, mask).sum(1, dtype=torch.int64), 0, out=offsets[1:])
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
    where the values are int8 (default: float32). Every weight looks its value up by how many are
    kept before it; nothing waits for a device.
    """
    mask, weight, scale = packed
    offsets = row_offsets(mask) if offsets is None else offsets
    mask, offsets = mask[rows], offsets[:-1][rows]
    dtype = weight.dtype if scale is None else dtype or torch.float32
    dense = weight.new_empty(len(mask), in_features, dtype=dtype)
    if not weight.numel():
        return dense.zero_()
    scale = None if scale is None else scale[rows, None]
    index_dtype = torch.int32 if weight.numel() + 8 * in_features < 2**31 else torch.int64
    keep = BY_SIZE[weight.element_size()]
    for part in _tiles(len(mask), in_features, weight.device):
        counts = _look_up(COUNT, mask[part]).to(index_dtype)  # (rows, bytes)
        begin = counts.cumsum(1, dtype=index_dtype).sub_(counts)
        begin += offsets[part, None].to(index_dtype)
        rank = _look_up(RANK, mask[part]).view(torch.uint8).view(*begin.shape, 8)
        index = (begin.unsqueeze(-1) + rank).clamp_(max=weight.numel() - 1)
        values = weight.index_select(0, index.flatten()).view(keep)
        # all ones where kept: nan and inf of a neighbour must not come through
        kept = _look_up(KEPT, mask[part]).view(torch.uint8).to(keep).neg_()
        values = values.bitwise_and_(kept.flatten()).view(weight.dtype)
        tile = values.view(len(begin), -1)[:, :in_features]
        dense[part] = tile if scale is None else tile.float().mul_(scale[part])
    return dense


def kept_of(mask: Tensor, in_features: int) -> Tensor:
    """What a mask says is kept: bool (out, in)."""
    kept = _look_up(KEPT, mask).view(torch.bool)
    return kept.view(len(mask), 8 * mask.shape[1])[:, :in_features]


def is_two_of_four(mask: Tensor) -> bool:
    """Whether no four weights side by side, from a multiple of four on, keep more than two."""
    return not bool(_look_up(CROWDED, mask).any())


def check_packed(packed: Packed, out_features: int, in_features: int, bits: int) -> None:
    """UserError where the tensors are no packed form of an (out, in) matrix."""
    mask, weight, scale = packed
    expected = packed_shapes(out_features, in_features, weight.numel(), bits)
    for name, shape in expected.items():
        tensor = getattr(packed, name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else tuple(tensor.shape)
            raise UserError(
                f"packed {name} is {found}: a matrix of {out_features} x {in_features} at {bits} "
                f"bits has {shape}"
            )
    if mask.dtype != torch.uint8:
        raise UserError(f"packed mask is {mask.dtype}, not uint8")
    if (weight.dtype == torch.int8) != (bits == 8):
        raise UserError(f"packed weight is {weight.dtype}, which are not {bits} bits")
    damaged = "the file is damaged or was not written by this package; save it again"
    if in_features % 8 and bool((mask[:, -1] >> in_features % 8).any()):
        raise UserError(f"packed mask has bits beyond the row's {in_features} weights: {damaged}")
    kept = int(_look_up(COUNT, mask).sum(dtype=torch.int64))
    if kept != weight.numel():
        raise UserError(f"packed mask keeps {kept} weights, of {weight.numel()}: {damaged}")
    if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
        raise UserError(f"packed scale is not finite and above 0: {damaged}")


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
