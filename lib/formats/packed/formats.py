"""Formats of kept weights: the model's own dtype, or 4-bit integers times scales.

A format is one object. Packing, training and quantization use the same one. Only it knows which
numbers a matrix can hold: which rows it takes, which scales fit, how a matrix is rounded, and
whether one is on the grid.

`Int4` has integers from -8 to 7, two in a byte, the first in the low bits, and a bfloat16 scale for
each `group` of inputs of a row. Scales have five significant bits, so code times scale has at most
eight and is a bfloat16 number. Quantized weights thus lose nothing in any dtype, and quantizing
them again gives the same values. Candidates are all such scales from 1/12 to 1/4 of the group's
largest weight; the one with the least squared error is chosen. Small scales clip the largest weight
if that helps the others. Pruned weights have code 0; a kept weight may be rounded to 0 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import PackedError
from .layout import Packed, all_finite, keep, kept_of, places, row_offsets, tiles

SMALLEST = torch.finfo(torch.float32).tiny
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype | None]]  # shapes and dtypes, by name

DROPPED_BITS = 19  # lowest bits of a float32; without them it has five significant bits
CANDIDATES = 28  # steps of five significant bits from any number to three times that number


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


class Int4(Values):
    """Integers of four bits, with a scale for each `group` inputs of a row."""

    name = "int4"
    label = "the 4-bit integers that are packed"
    bits = 4
    group = 64
    stored = torch.uint8
    scaled = torch.bfloat16  # dtype of the scales
    lowest, highest = -8, 7

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight with its share of a scale."""
        return self.bits + 8 * self.scaled.itemsize / self.group

    def tensors(self, out_features: int, in_features: int, nnz: int) -> Tensors:
        return super().tensors(out_features, in_features, nnz) | {
            "weight": (((nnz + 1) // 2,), torch.uint8),
            "scale": ((out_features, self.n_groups(in_features)), torch.bfloat16),
        }

    def supports_width(self, in_features: int) -> bool:
        """Return whether rows can have this number of weights."""
        return True

    def of(self, name: str, in_features: int) -> Int4 | None:
        """Return the format of the tensor `name`, by the weights in its rows; None: its dtype."""
        return self if self.supports_width(in_features) else None

    def bits_of(self, name: str, in_features: int) -> float:
        """Return the bits of a weight in a file, with its share of a scale."""
        form = self.of(name, in_features)
        return form.bits_per_weight if form else 16

    def nearest(self, matrix: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the best grid, float32."""
        return self.round_to(matrix, self.fit_scales(matrix))

    def is_on_grid(self, matrix: Tensor) -> bool:
        """Return whether all values of a matrix (out, in) are on a grid, so none would change."""
        return torch.equal(self.nearest(matrix), matrix.float())

    def snap_(self, values: Tensor) -> Tensor:
        """Round float32 values, in place, to the nearest numbers with scale 1."""
        return values.round_().clamp_(self.lowest, self.highest)

    def n_groups(self, in_features: int) -> int:
        """Return the number of scales per row."""
        return max(1, -(-in_features // self.group))

    def expand_scales(self, scales: Tensor, in_features: int) -> Tensor:
        """Repeat scales (out, groups) for each input: float32 (out, in)."""
        return scales.float().repeat_interleave(self.group, 1)[:, :in_features]

    def fit_units(self, matrix: Tensor, costs: Tensor | None = None) -> Tensor | None:
        """Return the numbers (out, groups) whose multiples the scales must be, if there are any."""
        return None

    def fit_scales(
        self, matrix: Tensor, costs: Tensor | None = None, units: Tensor | None = None
    ) -> Tensor:
        """Return the scales (out, groups), of dtype `scaled`, with the least squared error.

        `costs` (in,) weight the squared error of each input. `units` are those of `fit_units`. A
        matrix from `round_to` keeps its values on the grid fitted to it. Raises PackedError if the
        matrix holds nan or inf.
        """
        check_finite(matrix, self.bits)
        rows, width = matrix.shape
        scales = matrix.new_empty(rows, self.n_groups(width), dtype=self.scaled)
        units = self.fit_units(matrix, costs) if units is None else units
        if costs is not None:
            costs = F.pad(costs.float(), (0, scales.shape[1] * self.group - width))
            costs = costs.view(-1, self.group)
        for part in tiles(rows, width, matrix.device):
            its = None if units is None else units[part]
            scales[part] = self._fit(matrix[part].float(), costs, its)
        return scales

    def codes(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the integers, int8 (out, in), nearest to a matrix on the grid of `scales`."""
        check_finite(matrix, self.bits)
        codes = matrix.new_empty(matrix.shape, dtype=torch.int8)
        for part in tiles(*matrix.shape, matrix.device):
            steps = self.expand_scales(scales[part], matrix.shape[1])
            codes[part] = self.snap_(matrix[part].float().div(steps))
        return codes

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid of `scales`, float32."""
        return self.codes(matrix, scales).float().mul_(self.expand_scales(scales, matrix.shape[1]))

    def encode(self, matrix: Tensor, scales: Tensor | None = None) -> Packed:
        """Return the packed form of a matrix (out, in), on the grid of `scales` or the best one.

        Raises PackedError if the matrix holds nan or inf.
        """
        scales = self.fit_scales(matrix) if scales is None else scales.to(torch.bfloat16)
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

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        """Return scales (rows, groups) of a float32 tile (rows, in); `costs` (groups, group)."""
        rows, width = tile.shape
        groups = self.n_groups(width)
        weights = F.pad(tile, (0, groups * self.group - width)).view(rows, groups, self.group)
        largest = weights.abs().amax(2, keepdim=True)  # (rows, groups, 1)
        # division by a power of two, so that squares neither overflow nor underflow
        unit = ((largest.view(torch.int32) >> 23).clamp(27, 227) << 23).view(torch.float32)
        weights, first = weights / unit, largest / unit
        first = (first / (-1.5 * self.lowest)).clamp_min(SMALLEST / unit)
        best = self._nearest(weights, significant_steps(first, CANDIDATES), costs)
        return torch.where(largest > 0, best * unit, 1).squeeze(2)

    def _nearest(
        self,
        groups: Tensor,
        scales: Iterable[Tensor],
        costs: Tensor | None,
        may: Callable[[Tensor], Tensor | bool] = lambda scale: True,
    ) -> Tensor:
        """Return for each group the scale with the least error, among those that it `may` have."""
        best = torch.full_like(groups[:, :, :1], -1)  # ggml's rule makes zeros -0 in such a group
        least = torch.full_like(best, torch.inf)
        for scale in scales:
            error = self.snap_(groups / scale).mul_(scale).sub_(groups).square_()
            error = (error if costs is None else error.mul_(costs)).sum(2, keepdim=True)
            better = (error < least) & may(scale)
            best = torch.where(better, scale, best)
            least = torch.where(better, error, least)
        return best

    def _take(self, weight: Tensor, index: Tensor) -> Tensor:
        pairs = weight.index_select(0, index >> 1)
        codes = (pairs >> (index & 1).mul_(4).to(torch.uint8)) & 15
        return (codes ^ 8).view(torch.int8).sub_(8)


def significant_steps(first: Tensor, count: int, dropped: int = DROPPED_BITS) -> Iterator[Tensor]:
    """Yield numbers with few significant bits, from that at or below `first` away from zero."""
    bits = first.view(torch.int32) >> dropped
    return ((bits + step << dropped).view(torch.float32) for step in range(count))


PACKED = {fmt.bits: fmt for fmt in (Values(), Int4())}  # by bits, for packed checkpoints
