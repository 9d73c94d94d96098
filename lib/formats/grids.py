"""llama.cpp's 4-bit types, in numbers that a dense model can hold, and all formats.

FORMATS maps names to formats: the packed ones of packed/formats.py, and llama.cpp's
types, which packing does not use. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed.errors import PackedError
from .packed.formats import (
    PACKED,
    Int4,
    Values,
    check_finite,
    significant_steps,
)
from .packed.layout import look_up, tiles

TO_TOP = 13  # steps of five significant bits from 1/12 of a number to what rounds to 1/8 of it
LARGEST = 2.0**12  # eight times this is a float16 number
LEAST = 2.0**-24  # smallest float16 number
# levels of iq4_nl by code, and the code of the level nearest to each multiple of 0.5 from -128
LEVELS = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)
CODES = (torch.arange(-127.75, 128, 0.5)[:, None] - LEVELS).abs().argmin(1)
CODES, NEAREST = CODES.to(torch.uint8), LEVELS[CODES]


class Q4_0(Int4):
    """llama.cpp's q4_0, in numbers that its own rule reproduces; packing does not use it.

    For a block of 32 inputs, that rule takes d = (the value of largest magnitude) / -8 in float16,
    and the nearest codes. Here a scale is a float16 number of either sign with five significant
    bits, and one code of every block is -8, unless all its values are 0. bfloat16 holds the values,
    and any converter finds the same scales and codes, so conversion changes no value. The scale
    with the least squared error is chosen, which is closer to the weights than the rule's.
    """

    name = "q4_0"
    label = "llama.cpp's q4_0"
    group = 32
    packs = False
    ggml_rule_agrees = True  # whether llama.cpp's own rule finds its scales and codes
    conversion_note = "conversion by llama.cpp will change no value of"

    def supports_width(self, in_features: int) -> bool:
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
            for scale in significant_steps(top / (1.5 * self.lowest), TO_TOP)
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
    label = "llama.cpp's iq4_nl"
    scaled = torch.float16
    has_zero = False
    ggml_rule_agrees = False
    conversion_note = "gguf --type iq4_nl will write the scales and codes of"

    def __init__(self, scale_bits: int = 6) -> None:
        self.dropped = 24 - scale_bits  # lowest bits of a float32 that scales do not have
        self.reach = 2**scale_bits >> 8  # scales to each side that may give the same values

    def snap_(self, values: Tensor) -> Tensor:
        return values.copy_(look_up(NEAREST, _halves(values)))

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid of `scales`, and to bfloat16; float32."""
        return Int4.round_to(self, matrix, scales).bfloat16().float().add_(0)  # no -0

    def is_on_grid(self, matrix: Tensor) -> bool:
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
                for scale in significant_steps(
                    first.view(torch.float32), 2 * self.reach + 1, self.dropped
                ):
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
            for scale in significant_steps(top / (1.25 * end), count, self.dropped)
        )
        best = self._nearest(blocks, scales, costs)
        return torch.where(top.abs() < LEAST, 0, best).squeeze(2)


def _halves(values: Tensor) -> Tensor:
    """Return the index of float32 values in CODES and NEAREST; for 0 / 0 that of level 1."""
    return (values + 128).mul_(2).nan_to_num_(256).clamp_(0, len(CODES) - 1)


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


GRIDS = {fmt.name: fmt for fmt in (Q4_0(), IQ4_NL())}  # llama.cpp's types
FORMATS: dict[str, Values | Int4] = {fmt.name: fmt for fmt in PACKED.values()} | GRIDS
