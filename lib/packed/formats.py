"""Formats of kept weights: the model's own dtype, or 4-bit integers times scales.

A format is one object; FORMATS maps names to them. Packing, training and quantization use the same
object. Only it knows which numbers a matrix can hold: which rows it takes, which scales fit, how a
matrix is rounded, and whether one is on the grid.

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
from .layout import Packed, all_finite, keep, kept_of, look_up, places, row_offsets, tiles

SMALLEST = torch.finfo(torch.float32).tiny
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype | None]]  # shapes and dtypes, by name

DROPPED_BITS = 19  # lowest bits of a float32; without them it has five significant bits
TO_TOP = 13  # steps of five significant bits from 1/12 of a number to what rounds to 1/8 of it
LARGEST = 2.0**12  # eight times this is a float16 number
LEAST = 2.0**-24  # smallest float16 number
CANDIDATES = 28  # steps of five significant bits from any number to three times that number

# levels of iq4_nl by code, and the code of the level nearest to each multiple of 0.5 from -128
LEVELS = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)
CODES = (torch.arange(-127.75, 128, 0.5)[:, None] - LEVELS).abs().argmin(1)
CODES, NEAREST = CODES.to(torch.uint8), LEVELS[CODES]


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
    zero = True  # whether a matrix can have zeros beside other numbers

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
                tile = tile.float().mul_(self.spread_scales(scale[rows][part], in_features))
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
    title = "the 4-bit integers that are packed"
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

    def takes(self, in_features: int) -> bool:
        """Return whether rows can have this number of weights."""
        return True

    def nearest(self, matrix: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the best grid, float32."""
        return self.round_to(matrix, self.fit_scales(matrix))

    def holds(self, matrix: Tensor) -> bool:
        """Return whether all values of a matrix (out, in) are on a grid, so none would change."""
        return torch.equal(self.nearest(matrix), matrix.float())

    def snap_(self, values: Tensor) -> Tensor:
        """Round float32 values, in place, to the nearest numbers with scale 1."""
        return values.round_().clamp_(self.lowest, self.highest)

    def n_groups(self, in_features: int) -> int:
        """Return the number of scales per row."""
        return max(1, -(-in_features // self.group))

    def spread_scales(self, scales: Tensor, in_features: int) -> Tensor:
        """Repeat scales (out, groups) for each input: float32 (out, in)."""
        return scales.float().repeat_interleave(self.group, 1)[:, :in_features]

    def fit_scales(self, matrix: Tensor, costs: Tensor | None = None) -> Tensor:
        """Return the scales (out, groups), of dtype `scaled`, with the least squared error.

        `costs` (in,) weight the squared error of each input. A matrix from `round_to` keeps its
        values on the grid fitted to it. Raises PackedError if the matrix holds nan or inf.
        """
        check_finite(matrix, 4)
        rows, width = matrix.shape
        scales = matrix.new_empty(rows, self.n_groups(width), dtype=self.scaled)
        if costs is not None:
            costs = F.pad(costs.float(), (0, scales.shape[1] * self.group - width))
            costs = costs.view(-1, self.group)
        for part in tiles(rows, width, matrix.device):
            scales[part] = self._fit(matrix[part].float(), costs)
        return scales

    def codes(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the integers, int8 (out, in), nearest to a matrix on the grid of `scales`."""
        check_finite(matrix, 4)
        codes = matrix.new_empty(matrix.shape, dtype=torch.int8)
        for part in tiles(*matrix.shape, matrix.device):
            steps = self.spread_scales(scales[part], matrix.shape[1])
            codes[part] = self.snap_(matrix[part].float().div(steps))
        return codes

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid of `scales`, float32."""
        return self.codes(matrix, scales).float().mul_(self.spread_scales(scales, matrix.shape[1]))

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

    def _fit(self, tile: Tensor, costs: Tensor | None) -> Tensor:
        """Return scales (rows, groups) of a float32 tile (rows, in); `costs` (groups, group)."""
        rows, width = tile.shape
        groups = self.n_groups(width)
        weights = F.pad(tile, (0, groups * self.group - width)).view(rows, groups, self.group)
        largest = weights.abs().amax(2, keepdim=True)  # (rows, groups, 1)
        # division by a power of two, so that squares neither overflow nor underflow
        unit = ((largest.view(torch.int32) >> 23).clamp(27, 227) << 23).view(torch.float32)
        weights, first = weights / unit, largest / unit
        first = (first / (-1.5 * self.lowest)).clamp_min(SMALLEST / unit)
        best = self._nearest(weights, _steps(first, CANDIDATES), costs)
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


class Q4_0(Int4):
    """llama.cpp's q4_0, in numbers that its own rule reproduces; packing does not use it.

    For a block of 32 inputs, that rule takes d = (the value of largest magnitude) / -8 in float16,
    and the nearest codes. Here a scale is a float16 number of either sign with five significant
    bits, and one code of every block is -8, unless all its values are 0. bfloat16 holds the values,
    and any converter finds the same scales and codes, so conversion changes no value. The scale
    with the least squared error is chosen, which is closer to the weights than the rule's.
    """

    name = "q4_0"
    title = "llama.cpp's q4_0"
    group = 32
    packs = False
    rule = True  # whether llama.cpp's own rule finds its scales and codes
    promise = "conversion by llama.cpp will change no value of"

    def takes(self, in_features: int) -> bool:
        """Return whether rows are whole blocks; llama.cpp leaves others at 16 bits."""
        return in_features % self.group == 0

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid, float32, with a code -8 in every block.

        A block that no longer fits its scale, since its weights have changed, gets a new one.
        """
        check_finite(matrix, 4)
        rounded = matrix.new_empty(matrix.shape, dtype=torch.float32)
        for part in tiles(*matrix.shape, matrix.device):
            blocks = matrix[part].float().reshape(-1, self.group)
            steps = scales[part].float().reshape(-1, 1)
            codes = blocks / steps
            lowest, place = codes.min(1, keepdim=True)
            far = lowest.squeeze(1) > self.lowest / 2
            if bool(far.any()):
                steps = steps.masked_scatter(far[:, None], self._fit(blocks[far], None).float())
                lowest, place = torch.div(blocks, steps, out=codes).min(1, keepdim=True)
            self.snap_(codes).add_(0)  # turns -0 into 0, as the rule has no -0
            least = codes.gather(1, place).masked_fill_(lowest <= self.lowest / 2, self.lowest)
            rounded[part] = codes.scatter_(1, place, least).mul_(steps).view(-1, matrix.shape[1])
        return rounded

    def _fit(self, tile: Tensor, costs: Tensor | None) -> Tensor:
        blocks, top = self._blocks(tile)
        scales = (
            scale.clamp_(-LARGEST, LARGEST).half().float()
            for scale in _steps(top / (1.5 * self.lowest), TO_TOP)
        )

        def may(scale: Tensor) -> Tensor:
            return (top / scale <= self.lowest + 0.5) & (scale != 0)

        return self._nearest(blocks, scales, costs, may).squeeze(2)

    def _blocks(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Return blocks (rows, groups, group) of a tile, and each one's largest value."""
        blocks = tile.reshape(len(tile), tile.shape[1] // self.group, self.group)
        return blocks, blocks.gather(2, blocks.abs().argmax(2, keepdim=True))


class IQ4_NL(Q4_0):
    """llama.cpp's iq4_nl: sixteen uneven levels without 0, in as many bytes as q4_0.

    A block of 32 inputs has a scale d, a float16 number of either sign with few significant bits,
    and the values d * level, rounded to bfloat16. A model holds and saves these values in any
    dtype. Few scales are near the largest value divided by a level, so the scale that gives the
    values is found again, and with it the codes. llama.cpp's own rule would find others, so blocks
    are written as bytes. A block of zeros has scale 0. More than six bits do not reduce the error.
    """

    name = "iq4_nl"
    title = "llama.cpp's iq4_nl"
    scaled = torch.float16
    zero = False
    rule = False
    promise = "gguf --type iq4_nl will write the scales and codes of"

    def __init__(self, scale_bits: int = 6) -> None:
        self.dropped = 24 - scale_bits  # lowest bits of a float32 that scales do not have
        self.reach = 2**scale_bits >> 8  # scales to each side that may give the same values

    def snap_(self, values: Tensor) -> Tensor:
        return values.copy_(look_up(NEAREST, _halves(values)))

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid of `scales`, and to bfloat16; float32."""
        return Int4.round_to(self, matrix, scales).bfloat16().float().add_(0)  # no -0

    def holds(self, matrix: Tensor) -> bool:
        return bool(self.read(matrix)[1].all())

    def read(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales (out, groups) of a matrix (out, in), and which blocks have one."""
        scales = matrix.new_zeros(len(matrix), self.n_groups(matrix.shape[1]), dtype=self.scaled)
        held = torch.zeros_like(scales, dtype=torch.bool)
        for part in tiles(*matrix.shape, matrix.device):
            blocks, top = (each.flatten(0, 1) for each in self._blocks(matrix[part].float()))
            its, done = top.new_zeros(len(top)), top[:, 0] == 0
            for level in sorted(LEVELS.tolist(), key=abs, reverse=True):
                nearest = (top / level).view(torch.int32).add_(1 << self.dropped - 1)
                first = (nearest >> self.dropped) - self.reach << self.dropped
                for scale in _steps(first.view(torch.float32), 2 * self.reach + 1, self.dropped):
                    left = (~done).nonzero()[:, 0]
                    scale, block = scale[left].half().float(), blocks[left]
                    gives = (self.round_to(block, scale) == block).all(1)
                    its[left[gives]], done[left[gives]] = scale[gives, 0], True
            scales[part], held[part] = (each.view(scales[part].shape) for each in (its, done))
        return scales, held

    def to_bytes(self, matrix: Tensor) -> Tensor:
        """Return the blocks of a matrix (out, in) as llama.cpp stores them: uint8 (blocks, 18).

        Raises PackedError if a block is not on the grid.
        """
        scales, held = self.read(matrix)
        if not bool(held.all()):
            raise PackedError(f"its values are not on the grid of {self.name}")
        levels = self.codes(matrix, scales).view(-1, self.group).float()
        codes = look_up(CODES, _halves(levels))
        pairs = codes[:, :16] | codes[:, 16:] << 4
        return torch.cat([scales.view(-1, 1).view(torch.uint8), pairs], 1)

    def _fit(self, tile: Tensor, costs: Tensor | None) -> Tensor:
        blocks, top = self._blocks(tile)
        count = 5 * 2 ** (24 - self.dropped) // 16 + 2  # steps from a number to 1.4 times it
        scales = (  # float16 numbers; 127 times the largest is one too
            scale.abs().clamp_(LEAST, 256).half().float().copysign(scale)
            for end in (LEVELS[0], LEVELS[-1])
            for scale in _steps(top / (1.25 * end), count, self.dropped)
        )
        best = self._nearest(blocks, scales, costs)
        return torch.where(top.abs() < LEAST, 0, best).squeeze(2)


def _halves(values: Tensor) -> Tensor:
    """Return the index of float32 values in CODES and NEAREST; for 0 / 0 that of level 1."""
    return (values + 128).mul_(2).nan_to_num_(256).clamp_(0, len(CODES) - 1)


def _steps(first: Tensor, count: int, dropped: int = DROPPED_BITS) -> Iterator[Tensor]:
    """Yield numbers with few significant bits, from that at or below `first` away from zero."""
    bits = first.view(torch.int32) >> dropped
    return ((bits + step << dropped).view(torch.float32) for step in range(count))


class Grid:
    """The numbers of a format that a matrix can hold, given its scales (out, groups).

    `transposed`: the matrix is (in, out), as in GPT-2's Conv1D and in solvers. The rows of a stack
    of matrices, such as experts, count as those of one matrix.
    """

    def __init__(self, form: Int4, transposed: bool, scales: Tensor) -> None:
        self.form, self.transposed, self.scales = form, transposed, scales

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a weight rounded to the grid, float32."""
        rows = self._oriented(weight)
        values = self.form.round_to(rows.flatten(0, -2), self.scales)
        return self._oriented(values.view(rows.shape))

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight


FORMATS: dict[str, Values | Int4] = {fmt.name: fmt for fmt in (Values(), Int4(), Q4_0(), IQ4_NL())}
PACKED = {fmt.bits: fmt for fmt in FORMATS.values() if fmt.packs}  # formats of packed checkpoints
GRIDS = {fmt.name: fmt for fmt in FORMATS.values() if not fmt.packs}  # llama.cpp's types
