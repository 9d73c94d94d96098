"""Formats of kept weights: the model's own dtype, or 4-bit integers times scales.

`Int4` has integers from -8 to 7, two in a byte, the first in the low bits, and a bfloat16 scale for
each `group` of inputs of a row. Scales have five significant bits, so code times scale has at most
eight and is a bfloat16 number. Quantized weights thus lose nothing in any dtype. Pruned weights
have code 0; a kept weight may be rounded to 0 too. Whoever packs weights gives their scales.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import PackedError
from .layout import Packed, all_finite, keep, kept_of, places, row_offsets, tiles

SMALLEST = torch.finfo(torch.float32).tiny
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype | None]]  # shapes and dtypes, by name

DROPPED_BITS = 19  # lowest bits of a float32; without them it has five significant bits


def check_finite(matrix: Tensor, bits: int) -> None:
    """Raise PackedError if a matrix holds nan or inf, which integers cannot represent."""
    if not all_finite(matrix):
        raise PackedError(f"{bits} bits: a weight is nan or inf, which integers cannot hold")


class Values:
    """Unchanged kept weights, in the matrix's dtype."""

    name = "16"
    bits = 16
    group: int | None = None  # inputs that share a scale
    stored: torch.dtype | None = None  # dtype of `weight`; None: the matrix's own
    packs = True  # whether packed checkpoints can have this format
    has_zero = True  # whether a matrix can have zeros beside other numbers

    def tensors(self, out_features: int, in_features: int, nnz: int) -> Tensors:
        """Return shapes and dtypes (None: the model's) of a matrix with `nnz` kept weights."""
        mask = (out_features, (in_features + 7) // 8)
        return {"mask": (mask, torch.uint8), "weight": ((nnz,), None)}

    def nbytes(self, out_features: int, in_features: int, nnz: int, itemsize: int = 2) -> int:
        """Return the saved bytes of a packed matrix; `itemsize` is that of the model's dtype."""
        tensors = self.tensors(out_features, in_features, nnz).values()
        return sum(
            prod(shape) * (dtype.itemsize if dtype else itemsize) for shape, dtype in tensors
        )

    def encode(self, matrix: Tensor, scales: Tensor | None = None) -> Packed:
        """Return the packed form of a matrix (out, in)."""
        return Packed(*keep(matrix, matrix))

    def decode(
        self,
        packed: Packed,
        in_features: int,
        offsets: Tensor | None = None,
        dtype: torch.dtype | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """Return the dense matrix (out, in) of a packed one, or some of its rows.

        `offsets` are those of `row_offsets`, counted here if not given. `dtype` is that of the
        result if the values are integers (default: float32).
        """
        mask, weight, scale = packed
        offsets = row_offsets(mask) if offsets is None else offsets
        mask, offsets = mask[rows], offsets[:-1][rows]
        dtype = (dtype or torch.float32) if self.stored else weight.dtype
        dense = weight.new_empty(len(mask), in_features, dtype=dtype)
        count = weight.numel() * (2 if self.stored else 1)
        if not count:
            return dense.zero_()
        index_dtype = torch.int32 if count + 8 * in_features < 2**31 else torch.int64
        for part in tiles(len(mask), in_features, mask.device):
            index = places(mask[part], offsets[part], index_dtype)
            tile = self._take(weight, index.clamp_(max=count - 1)).view(len(mask[part]), -1)
            tile = tile[:, :in_features].masked_fill_(~kept_of(mask[part], in_features), 0)
            if scale is not None:
                tile = tile.float().mul_(self.expand_scales(scale[rows][part], in_features))
            dense[part] = tile
        return dense

    def problem(self, packed: Packed, in_features: int, nnz: int) -> str:
        """Return what is wrong with tensors of the right shapes and dtypes, or ""."""
        mask = packed.mask
        if in_features % 8 and bool((mask[:, -1] >> in_features % 8).any()):
            return f"mask has bits beyond the row's {in_features} weights"
        kept = int(row_offsets(mask)[-1])
        return "" if kept == nnz else f"mask keeps {kept} weights, of {nnz}"

    def _take(self, weight: Tensor, index: Tensor) -> Tensor:
        return weight.index_select(0, index)


class Scaled:
    """Numbers times a scale for each `group` inputs of a row."""

    bits = 4
    group: int
    lowest, highest = -8, 7

    def snap_(self, values: Tensor) -> Tensor:
        """Round float32 values, in place, to the nearest numbers with scale 1."""
        return values.round_().clamp_(self.lowest, self.highest)

    def n_groups(self, in_features: int) -> int:
        """Return the number of scales per row."""
        return max(1, -(-in_features // self.group))

    def expand_scales(self, scales: Tensor, in_features: int) -> Tensor:
        """Repeat scales (out, groups) for each input: float32 (out, in)."""
        return scales.float().repeat_interleave(self.group, 1)[:, :in_features]

    def codes(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the integers, int8 (out, in), nearest to a matrix on the grid of `scales`."""
        check_finite(matrix, self.bits)
        codes = matrix.new_empty(matrix.shape, dtype=torch.int8)
        for part in tiles(*matrix.shape, matrix.device):
            steps = self.expand_scales(scales[part], matrix.shape[1])
            codes[part] = self.snap_(matrix[part].float().div(steps))
        return codes


class Int4(Scaled, Values):
    """Integers of four bits, with a scale for each `group` inputs of a row."""

    name = "int4"
    group = 64
    stored = torch.uint8

    def tensors(self, out_features: int, in_features: int, nnz: int) -> Tensors:
        return super().tensors(out_features, in_features, nnz) | {
            "weight": (((nnz + 1) // 2,), torch.uint8),
            "scale": ((out_features, self.n_groups(in_features)), torch.bfloat16),
        }

    def encode(self, matrix: Tensor, scales: Tensor) -> Packed:
        """Return the packed form of a matrix (out, in), on the grid of `scales` (out, groups).

        Raises PackedError if the matrix holds nan or inf.
        """
        scales = scales.to(torch.bfloat16)
        mask, codes = keep(matrix, self.codes(matrix, scales))
        pairs = F.pad(codes, (0, len(codes) % 2)).view(torch.uint8).view(-1, 2)
        return Packed(mask, (pairs[:, 0] & 15) | (pairs[:, 1] << 4), scales)

    def problem(self, packed: Packed, in_features: int, nnz: int) -> str:
        scale = packed.scale
        if problem := super().problem(packed, in_features, nnz):
            return problem
        if nnz % 2 and int(packed.weight[-1]) > 15:
            return "weight has a value after its last"
        if not bool((scale.isfinite() & (scale > 0)).all()):
            return "scale is not finite and above 0"
        more = bool((scale.view(torch.int16) & ((1 << (DROPPED_BITS - 16)) - 1)).any())
        return "scale has more than five significant bits" if more else ""

    def _take(self, weight: Tensor, index: Tensor) -> Tensor:
        pairs = weight.index_select(0, index >> 1)
        codes = (pairs >> (index & 1).mul_(4).to(torch.uint8)) & 15
        return (codes ^ 8).view(torch.int8).sub_(8)


PACKED = {fmt.bits: fmt for fmt in (Values(), Int4())}  # by bits, for packed checkpoints
