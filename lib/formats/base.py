"""What all formats of few bits share: scales, rounding to the nearest numbers, and their search.

A format is one object. Packing, training and quantization use the same one. Only it knows which
numbers a matrix can hold: which rows it takes, which scales fit, how a matrix is rounded, and
whether one is on the grid. Other modules ask it for all that a user or llama.cpp must know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packed.formats import DROPPED_BITS, Scaled, check_finite
from ..packed.layout import tiles


class ScaledFormat(Scaled):
    """Numbers times a scale for each group of inputs of a row, as `--quantize` makes them."""

    name: str
    label: str  # in messages
    scaled = torch.bfloat16  # dtype of the scales
    packs = False  # whether packed checkpoints have this format
    has_zero = True  # whether a matrix can have zeros beside other numbers
    offered: tuple[str, ...] = ()  # to --quantize auto, for "layers" and "tables"

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight with its share of a scale."""
        return self.bits + 8 * self.scaled.itemsize / self.group

    def supports_width(self, in_features: int) -> bool:
        """Return whether rows can have this number of weights."""
        return True

    def of(self, name: str, in_features: int) -> ScaledFormat | None:
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

    def round_to(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix (out, in) rounded to the grid of `scales`, float32."""
        return self.codes(matrix, scales).float().mul_(self.expand_scales(scales, matrix.shape[1]))

    def _fit(self, tile: Tensor, costs: Tensor | None, units: Tensor | None) -> Tensor:
        """Return scales (rows, groups) of a float32 tile (rows, in); `costs` (groups, group)."""
        raise NotImplementedError

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


def significant_steps(first: Tensor, count: int, dropped: int = DROPPED_BITS) -> Iterator[Tensor]:
    """Yield numbers with few significant bits, from that at or below `first` away from zero."""
    bits = first.view(torch.int32) >> dropped
    return ((bits + step << dropped).view(torch.float32) for step in range(count))
