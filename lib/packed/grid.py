"""Kept weights rounded to a grid: integers of 8 or 4 bits times a scale.

- 8 bits: integers from -127 to 127 and a float32 scale for each row, the row's largest weight
  over 127. Every weight is off by half a step at most.
- 4 bits: integers from -8 to 7 and a bfloat16 scale for each group of inputs of a row. Scales have
  five significant bits, so that a product of code and scale, at most eight bits long, is a bfloat16
  number: dequantised weights lose nothing in any dtype, and quantising them again gives the same
  values. Of all such scales from 1/12 to 1/4 of the group's largest weight the one with the least
  squared error is taken; smaller ones clip the largest weight where that helps the others.

Pruned weights have code 0. A kept weight may round to 0 too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import PackedError

GROUPS = (32, 64, 128)  # inputs that can share a scale at 4 bits
GROUP = 64
SCALE_DTYPE = {8: torch.float32, 4: torch.bfloat16}
LARGEST = 127  # code at 8 bits
LOWEST, HIGHEST = -8, 7  # codes at 4 bits
LIMITS = {8: (-LARGEST, LARGEST), 4: (LOWEST, HIGHEST)}
SMALLEST = torch.finfo(torch.float32).tiny
DROPPED_BITS = 19  # of a float32: with these zero, five significant bits are left
CANDIDATES = 28  # steps of five significant bits that lead from any number to its threefold
TILE_WEIGHTS = 2**18  # that are quantised at a time, so that scratch tensors stay in a cache


def quantise(
    matrix: Tensor,
    mask: Tensor | None = None,
    bits: int = 4,
    group: int | None = GROUP,
    scales: Tensor | None = None,
    costs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The grid nearest to `matrix` (out, in): int8 codes (out, in) and scales (out, groups).

    `mask` (out, in) is True where a weight is pruned; by default where it is zero. `group`: inputs
    that share a scale, at 4 bits; at 8 bits a row has one scale, whatever is given. A matrix that
    `dequantise` has given (at 8 bits: in float32) comes back with the very same values.
    `scales` (out, groups): those of a grid to round to, instead of the nearest one; what was on
    that grid comes back with the very same codes, also after a cast to 16 bits.
    PackedError where the matrix holds nan or inf.
    """
    if bits == 4 and group not in GROUPS:
        raise PackedError(f"a scale for every {group} inputs: it has to be 32, 64 or 128")
    rows, width = matrix.shape
    group = group if bits == 4 else max(1, width)
    codes = torch.empty(rows, width, dtype=torch.int8, device=matrix.device)
    given, shape = scales, (rows, n_groups(width, group))
    scales = torch.empty(shape, dtype=SCALE_DTYPE[bits], device=matrix.device)
    if given is not None:
        scales.copy_(given.view(shape))
    for part in _row_tiles(rows, width):
        tile = matrix[part].float()
        if mask is not None:
            tile = tile.masked_fill(mask[part], 0)
        if not bool(tile.isfinite().all()):
            raise PackedError(f"{bits} bits: a weight is nan or inf, which integers can't hold")
        if given is not None:
            steps = spread_scales(scales[part].float(), group, width)
            codes[part] = tile.div(steps).round_().clamp_(*LIMITS[bits])
        elif bits == 8:
            codes[part], scales[part] = _quantise_rows(tile)
        else:
            codes[part], scales[part] = _quantise_groups(tile, group, costs)
    return codes, scales


def dequantise(codes: Tensor, scales: Tensor, group: int | None = None) -> Tensor:
    """The float32 matrix (out, in) that codes (out, in) and scales (out, groups) stand for.

    `group`: inputs that share a scale; None: the whole row has one.
    """
    scales = scales.float()
    if group is None or scales.shape[1] == 1:
        return codes.float().mul_(scales)
    return codes.float().mul_(spread_scales(scales, group, codes.shape[1]))


def spread_scales(scales: Tensor, group: int, width: int) -> Tensor:
    """Scales (out, groups) repeated for each of `width` inputs: (out, width)."""
    return scales.repeat_interleave(group, 1)[:, :width]


def n_groups(width: int, group: int) -> int:
    """How many scales a row of `width` inputs has."""
    return max(1, -(-width // group))


def group_size(scales: Tensor, width: int) -> int:
    """Inputs that share a scale, by the shape (out, groups) of the scales at 4 bits."""
    sizes = [group for group in GROUPS if n_groups(width, group) == scales.shape[1]]
    if not sizes:
        raise PackedError(f"{scales.shape[1]} scales for {width} inputs are no groups of {GROUPS}")
    return sizes[0]


def has_short_scales(scales: Tensor) -> bool:
    """Whether no 4-bit scale has more than five significant bits."""
    return not bool((scales.view(torch.int16) & ((1 << (DROPPED_BITS - 16)) - 1)).any())


def _quantise_rows(tile: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits: codes (rows, in) and scales (rows, 1)."""
    largest = tile.abs().amax(1, keepdim=True) if tile.shape[1] else tile.new_zeros(len(tile), 1)
    scale = (largest / LARGEST).clamp_min(SMALLEST)
    codes = (tile / scale).round_().clamp_(-LARGEST, LARGEST)
    # the scale of a row that is on a grid can be a neighbour of the largest weight over 127
    for neighbour in (scale.nextafter(torch.zeros_like(scale)), scale.nextafter(scale * 2)):
        exact = (codes * neighbour == tile).all(1, keepdim=True) & (largest > 0)
        scale = torch.where(exact, neighbour, scale)
    return codes.to(torch.int8), scale


def _quantise_groups(tile: Tensor, group: int, costs: Tensor | None) -> tuple[Tensor, Tensor]:
    """4 bits: codes (rows, in) and scales (rows, groups)."""
    rows, width = tile.shape
    groups = n_groups(width, group)
    weights = F.pad(tile, (0, groups * group - width)).view(rows, groups, group)
    if costs is not None:
        costs = F.pad(costs.float(), (0, groups * group - width)).view(groups, group)
    largest = weights.abs().amax(2, keepdim=True)  # (rows, groups, 1)
    first = (largest / (-1.5 * LOWEST)).clamp_min(SMALLEST).view(torch.int32) >> DROPPED_BITS
    best = torch.ones_like(largest)
    least = torch.full_like(largest, torch.inf)
    for step in range(CANDIDATES):
        scale = (first + step << DROPPED_BITS).view(torch.float32)
        error = (weights / scale).round_().clamp_(LOWEST, HIGHEST).mul_(scale).sub_(weights)
        error.square_()
        error = (error if costs is None else error.mul_(costs)).sum(2, keepdim=True)
        better = error < least
        best = torch.where(better, scale, best)
        least = torch.where(better, error, least)
    best = torch.where(largest > 0, best, 1)
    codes = (weights / best).round_().clamp_(LOWEST, HIGHEST).to(torch.int8)
    return codes.view(rows, groups * group)[:, :width], best.squeeze(2).to(torch.bfloat16)


def _row_tiles(rows: int, width: int) -> Iterator[slice]:
    step = max(1, TILE_WEIGHTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
