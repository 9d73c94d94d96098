"""llama.cpp's types, in numbers that a dense model can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..packed.errors import PackedError
from ..packed.formats import check_finite
from ..packed.layout import look_up, tiles
from .base import ScaledFormat, significant_steps
from .registry import GRIDS, Q8_0, TYPES

TO_TOP = 13  # steps of five significant bits from 1/12 of a number to what rounds to 1/8 of it
DROPPED = 18  # lowest bits of a float32; without them it has six significant bits
STEPS = 22  # of six significant bits from a number to 1.4 times it
LARGEST = 2.0**12  # eight times this is a float16 number
LEAST = 2.0**-24  # smallest float16 number
FEW_VALUES = 16  # rows with so few values may be on a grid by chance
ROWS = 16  # rows that show the type of a matrix
SHARES = torch.linspace(0.67, 1.15, 12).tolist()  # of scales that would reach the largest value
# {part of a linear layer's name: the longest block of inputs that stays whole in a file}: llama.cpp
# transposes half of MLA's matrix, and moves the heads of Qwen 3.5
WHOLE_INPUTS = {".kv_b_proj.": 0, ".linear_attn.out_proj.": 32}
# levels of iq4_nl by code, and the code of the level nearest to each multiple of 0.5 from -128
LEVELS = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)
CODES = (torch.arange(-127.75, 128, 0.5)[:, None] - LEVELS).abs().argmin(1)
CODES, NEAREST = CODES.to(torch.uint8), LEVELS[CODES]


class LlamaCppType(ScaledFormat):
    """A type of llama.cpp: whole blocks of inputs, which the file holds as bytes."""

    group = 32
    block = 32  # inputs in a block of llama.cpp's
    instead: str | None = None  # type of rows that do not fit
    ggml_rule_agrees = True  # whether llama.cpp's own rule finds its scales and codes
    limit = 0.5  # largest distance between llama.cpp's predictions and the model's

    @property
    def label(self) -> str:
        return f"llama.cpp's {self.name}"

    @property
    def file_type(self) -> str:
        """llama.cpp's name of a file most of whose tensors have this type."""
        return self.name.upper()

    @property
    def conversion_note(self) -> str:
        """What becomes of the tensors on the grid, before their number."""
        if self.ggml_rule_agrees:
            return "conversion by llama.cpp will change no value of"
        return "gguf will write the scales and codes of"

    def supports_width(self, in_features: int) -> bool:
        """Return whether rows are whole blocks; llama.cpp leaves others at 16 bits."""
        return in_features % self.block == 0

    def of(self, name: str, in_features: int) -> ScaledFormat | None:
        whole = next((most for part, most in WHOLE_INPUTS.items() if part in name), self.block)
        return super().of(name, in_features) if self.block <= whole else None

    def bits_of(self, name: str, in_features: int) -> float:
        form = self.of(name, in_features) or TYPES[Q8_0].of(name, in_features)
        return form.bits_per_weight if form else 16

    def _blocks(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Return blocks (rows, groups, group) of a tile, and each one's largest value."""
        blocks = tile.reshape(len(tile), tile.shape[1] // self.group, self.group)
        return blocks, blocks.gather(2, blocks.abs().argmax(2, keepdim=True))


class Q4_0(LlamaCppType):
    """llama.cpp's q4_0, in numbers that its own rule reproduces; packing does not use it.

    For a block of 32 inputs, that rule takes d = (the value of largest magnitude) / -8 in float16,
    and the nearest codes. Here a scale is a float16 number of either sign with five significant
    bits, and one code of every block is -8, unless all its values are 0. bfloat16 holds the values,
    and any converter finds the same scales and codes, so conversion changes no value. The scale
    with the least squared error is chosen, which is closer to the weights than the rule's.
    """

    name = "q4_0"
    limit = 1.2

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid, float32, with a code -8 in every block.

        A block that no longer fits its scale, since its weights have changed, gets a new one.
        """
        check_finite(matrix, self.bits)
        rounded = matrix.new_empty(matrix.shape, dtype=torch.float32)
        for part in tiles(*matrix.shape, matrix.device):
            blocks = matrix[part].float().reshape(-1, self.group)
            steps = scales[part].float().reshape(-1, 1)
            codes = blocks / steps
            lowest, place = codes.min(1, keepdim=True)
            far = lowest.squeeze(1) > self.lowest / 2
            if bool(far.any()):
                fitted = self._fit(blocks[far], None, None).float()
                steps = steps.masked_scatter(far[:, None], fitted)
                lowest, place = torch.div(blocks, steps, out=codes).min(1, keepdim=True)
            self.snap_(codes).add_(0)  # turns -0 into 0, as the rule has no -0
            least = codes.gather(1, place).masked_fill_(lowest <= self.lowest / 2, self.lowest)
            rounded[part] = codes.scatter_(1, place, least).mul_(steps).view(-1, matrix.shape[1])
        return rounded

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        blocks, top = self._blocks(tile)
        scales = (
            scale.clamp_(-LARGEST, LARGEST).half().float()
            for scale in significant_steps(top / (1.5 * self.lowest), TO_TOP)
        )

        def may(scale: Tensor) -> Tensor:
            return (top / scale <= self.lowest + 0.5) & (scale != 0)

        return self._nearest(blocks, scales, costs, may).squeeze(2)


class IQ4_NL(LlamaCppType):
    """llama.cpp's iq4_nl: sixteen uneven levels without 0, in as many bytes as q4_0.

    A block of 32 inputs has a scale d, a float16 number of either sign with six significant bits,
    and the values d * level, rounded to bfloat16. A model holds and saves these values in any
    dtype. Few scales are near the largest value divided by a level, so the scale that gives the
    values is found again, and with it the codes. llama.cpp's own rule would find others, so blocks
    are written as bytes. A block of zeros has scale 0. More than six bits do not reduce the error.
    """

    name = "iq4_nl"
    scaled = torch.float16
    offered = "layers", "tables"
    levels = LEVELS
    has_zero = False
    ggml_rule_agrees = False

    def snap_(self, values: Tensor) -> Tensor:
        return values.copy_(look_up(NEAREST, _halves(values)))

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid of `scales`, and to bfloat16; float32."""
        return super().round_to(matrix, scales).bfloat16().float().add_(0)  # no -0

    def is_on_grid(self, matrix: Tensor) -> bool:
        return bool(self.read(matrix)[1].all())

    def read(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales (out, groups) of a matrix (out, in), and which blocks have one."""
        scales = matrix.new_zeros(len(matrix), self.n_groups(matrix.shape[1]), dtype=self.scaled)
        held = torch.zeros_like(scales, dtype=torch.bool)
        for part in tiles(*matrix.shape, matrix.device):
            blocks, top = (each.flatten(0, 1) for each in self._blocks(matrix[part].float()))
            its, done = top.new_zeros(len(top)), top[:, 0] == 0
            for level in sorted(filter(None, self.levels.tolist()), key=abs, reverse=True):
                nearest = (top / level).view(torch.int32).add_(1 << DROPPED - 1)
                scale = (nearest >> DROPPED << DROPPED).view(torch.float32)
                left = (~done).nonzero()[:, 0]
                scale, block = scale[left].half().float(), blocks[left]
                gives = (self.round_to(block, scale) == block).all(1)
                its[left[gives]], done[left[gives]] = scale[gives, 0], True
            scales[part], held[part] = (each.view(scales[part].shape) for each in (its, done))
        return scales, held

    def to_bytes(self, matrix: Tensor) -> Tensor:
        """Return the blocks of a matrix (out, in) as llama.cpp stores them: uint8 (blocks, bytes).

        Raises PackedError if a block is not on the grid.
        """
        scales, held = self.read(matrix)
        if not bool(held.all()):
            raise PackedError(f"its values are not on the grid of {self.name}")
        return self._packed(scales.view(-1, 1), self.codes(matrix, scales).view(-1, self.group))

    def _packed(self, scales: Tensor, levels: Tensor) -> Tensor:
        codes = look_up(CODES, _halves(levels.float())).view(-1, 2, 16)
        return torch.cat([scales.view(torch.uint8), _fields(codes, 4)], 1)

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        blocks, top = self._blocks(tile)
        scales = (  # float16 numbers; 127 times the largest is one too
            scale.abs().clamp_(LEAST, 256).half().float().copysign(scale)
            for end in (self.levels[0], self.levels[-1])
            for scale in significant_steps(top / (1.25 * end), STEPS, DROPPED)
        )
        best = self._nearest(blocks, scales, costs)
        return torch.where(top.abs() < LEAST, 0, best).squeeze(2)


class Q5_0(IQ4_NL):
    """llama.cpp's q5_0: codes from -16 to 15, which its own rule would place on other scales.

    Scales and values are as those of iq4_nl, but there is a 0.
    """

    name = "q5_0"
    bits = 5
    lowest, highest = -16, 15
    levels = torch.arange(-16.0, 16)
    has_zero = True

    def snap_(self, values: Tensor) -> Tensor:
        return ScaledFormat.snap_(self, values.nan_to_num_(0))  # 0 / 0 in a block of zeros

    def _packed(self, scales: Tensor, levels: Tensor) -> Tensor:
        codes = (levels + 16).view(torch.uint8)
        fifth, rest = (codes >> 4).view(-1, 4, 8).mT, (codes & 15).view(-1, 2, 16)
        return torch.cat([scales.view(torch.uint8), _fields(fifth, 1), _fields(rest, 4)], 1)


class Q3_K(Q5_0):
    """llama.cpp's q3_k: codes from -4 to 3 in groups of 16 inputs, sixteen of which share a d.

    A scale is d times an integer from -32 to 31. Here d is a power of two, so bfloat16 holds d *
    integer * code, which has at most seven significant bits. The largest d that divides all values
    is found again, and with the code of largest magnitude the least scale. Rows that are no
    multiple of 256 become iq4_nl.
    """

    name = "q3_k"
    bits = 3
    bits_per_weight = 8 * 110 / 256
    group = 16
    block = 256
    instead = "iq4_nl"
    offered = ("layers",)
    file_type = "Q3_K_S"
    has_zero = False  # nor has that
    shared = 16  # groups that share a d
    lowest, highest = -4, 3
    levels = torch.arange(-4.0, 4)

    def of(self, name: str, in_features: int) -> ScaledFormat | None:
        return super().of(name, in_features) or GRIDS[self.instead].of(name, in_features)

    def fit_units(self, matrix: Tensor, costs: Tensor | None = None) -> Tensor:
        """Return d (out, groups), the better one of two powers of two that use most integers."""
        units = matrix.new_empty(len(matrix), self.n_groups(matrix.shape[1]), dtype=torch.float32)
        costs = None if costs is None else costs.float().view(-1, self.group)
        for part in tiles(*matrix.shape, matrix.device):
            tile = matrix[part].float()
            blocks, top = self._blocks(tile)
            most = top.abs().view(len(tile), -1, self.shared).amax(2)
            (larger,) = significant_steps(most / 48, 1, 23)
            larger = larger.clamp(2 * LEAST, 2.0**10).repeat_interleave(self.shared, 1)
            errors = []
            for unit in (larger, larger / 2):
                scales = self._fit(tile, costs, unit)[:, :, None]
                error = self.snap_(blocks / scales).mul_(scales).sub_(blocks).square_()
                error = error if costs is None else error.mul_(costs)
                errors.append(error.view(*most.shape, -1).sum(2))
            halves = (errors[1] < errors[0]).repeat_interleave(self.shared, 1)
            units[part] = torch.where(halves, larger / 2, larger)
        return units

    def read(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        scales = matrix.new_zeros(len(matrix), self.n_groups(matrix.shape[1]), dtype=self.scaled)
        held = torch.zeros_like(scales, dtype=torch.bool)
        for part in tiles(*matrix.shape, matrix.device):
            tile = matrix[part].float()
            units = _divisor(tile.reshape(len(tile), -1, self.block))
            units = units.repeat_interleave(self.shared, 1)
            blocks, top = (each / units for each in self._blocks(tile))
            its, done = torch.zeros_like(top), top == 0
            for level in sorted(filter(None, self.levels.tolist()), key=abs, reverse=True):
                scale = top / level
                gives = (self.snap_(blocks / scale).mul_(scale) == blocks).all(2, keepdim=True)
                gives &= (scale == scale.round()) & (scale >= -32) & (scale <= 31) & ~done
                its, done = torch.where(gives, scale, its), done | gives
            scales[part], held[part] = (its * units).squeeze(2), done.squeeze(2)
        return scales, held

    def _packed(self, scales: Tensor, levels: Tensor) -> Tensor:
        scales, codes = scales.float().view(-1, self.shared), (levels + 4).view(torch.uint8)
        d, third = _divisor(scales), (codes >> 2).view(-1, 8, 32)
        rest = _fields((codes & 3).view(-1, 4, 32), 2).view(-1, 64)
        integers = (scales / d + 32).to(torch.uint8)
        low, high = (integers & 15).view(-1, 2, 8), (integers >> 4).view(-1, 4, 4)
        parts = _fields(third, 1), rest, _fields(low, 4), _fields(high, 2)
        return torch.cat([*parts, d.half().view(torch.uint8)], 1)

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        (blocks, top), units = self._blocks(tile), units[:, :, None]
        scales = (
            (top / (end * units) * share).round_().clamp_(-32, 31).mul_(units)
            for end in (self.lowest, self.highest)
            for share in SHARES
        )
        return self._nearest(blocks, scales, costs).squeeze(2)


class Q8_0Type(LlamaCppType):
    """llama.cpp's q8_0: integers from -127 to 127, to which only a GGUF file rounds."""

    name = Q8_0
    bits = 8
    bits_per_weight = 8 + 16 / 32  # scales are float16 in a file
    scaled = torch.float32
    lowest, highest = -127, 127
    offered = "layers", "tables"
    of = ScaledFormat.of  # the converter rounds after it has moved inputs

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        return self._blocks(tile)[1].abs().div_(127).clamp_min_(1e-30).squeeze(2)


def _divisor(values: Tensor) -> Tensor:
    """Return the largest power of two that divides all values (..., n): (..., 1)."""
    bits = values.contiguous().view(torch.int32)
    digits = bits & 0x7FFFFF | 1 << 23
    lowest = torch.ldexp((digits & -digits).float(), (bits >> 23 & 255) - 150)
    return lowest.masked_fill_(values == 0, 2.0**10).amin(-1, keepdim=True).clamp_(LEAST, 2.0**10)


def _fields(values: Tensor, bits: int) -> Tensor:
    """Return values (blocks, fields, bytes) of so many bits in bytes, the first field lowest."""
    shifts = torch.arange(values.shape[1], dtype=torch.uint8) * bits
    return (values << shifts[:, None]).sum(1, dtype=torch.uint8)


def _halves(values: Tensor) -> Tensor:
    """Return the index of float32 values in CODES and NEAREST; for 0 / 0 that of level 1."""
    return (values + 128).mul_(2).nan_to_num_(256).clamp_(0, len(CODES) - 1)


class Grid:
    """The numbers of a format that a matrix can hold, given its scales (out, groups).

    `transposed`: the matrix is (in, out), as in GPT-2's Conv1D and in solvers. The rows of a stack
    of matrices, such as experts, count as those of one matrix.
    """

    def __init__(self, form: ScaledFormat, transposed: bool, scales: Tensor) -> None:
        self.form, self.transposed, self.scales = form, transposed, scales

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a weight rounded to the grid, float32."""
        rows = self._oriented(weight)
        values = self.form.round_to(rows.flatten(0, -2), self.scales)
        return self._oriented(values.view(rows.shape))

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight


class Types:
    """A type for each tensor, by its name, of those of TYPES; tensors without one become q8_0."""

    name = "auto"
    packs = has_zero = ggml_rule_agrees = False
    group = Q3_K.group  # the least
    limit = LlamaCppType.limit
    conversion_note = "gguf will write the scales and codes of"

    def __init__(self, types: Mapping[str, str] | None = None) -> None:
        self.types = types or {}

    def of(self, name: str, in_features: int) -> ScaledFormat | None:
        """Return the format of a tensor; None if it keeps its values."""
        type_ = self.types.get(name, Q8_0)
        return GRIDS[type_] if type_ in GRIDS else None

    def bits_of(self, name: str, in_features: int) -> float:
        """Return the bits of a weight in a GGUF file, with its share of a scale."""
        return TYPES[self.types.get(name, Q8_0)].bits_of(name, in_features)


def held_type(matrix: Tensor) -> str | None:
    """Return llama.cpp's type on whose grid a matrix (out, in) is, by some of its rows, or None."""
    rows = matrix[:: -(-len(matrix) // ROWS)]
    if len(rows.unique()) <= FEW_VALUES:
        return None
    fitting = (form for form in GRIDS.values() if form.supports_width(rows.shape[1]))
    return next((form.name for form in fitting if form.is_on_grid(rows)), None)
