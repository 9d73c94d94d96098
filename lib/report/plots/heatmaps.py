"""Heat maps with figures in their cells, in general and by block and linear.

Their colours are matplotlib's `cividis` and `PuOr_r`, safe for the colour-blind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lib.report.names import BlockLinear

MAX_CELLS_WITH_TEXT = 400


def heat(
    axes,
    cells: Mapping[tuple[int, int], float],
    shape: tuple[int, int],
    *,
    text: Callable[[float], str],
    **options,
):
    """Draw cells {(row, column): value} and their figures; missing ones stay blank.

    `text` formats a value for its cell; `options` are imshow's. Returns the image, for a
    colour bar.
    """
    rows, columns = shape
    values = [[cells.get((i, j), math.nan) for j in range(columns)] for i in range(rows)]
    image = axes.imshow(values, aspect="auto", **options)
    size = {"ha": "center", "va": "center", "fontsize": 9 if rows <= 24 else 6}
    for (i, j), value in cells.items() if len(cells) <= MAX_CELLS_WITH_TEXT else ():
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(j, i, text(value), color="white" if dark else "black", **size)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def blocks_by_linear(
    axes,
    cells: Mapping[BlockLinear, float],
    blocks: Sequence[int],
    linears: Sequence[str],
    **options,
):
    """Draw a heat map of shares {(block, linear): value}, shown in percent; see `heat`."""
    by_position = {
        (blocks.index(b), linears.index(k)): 100 * value for (b, k), value in cells.items()
    }
    short = [linear.split(".")[-1] for linear in linears]
    names = short if len(set(short)) == len(linears) else linears
    axes.set_xticks(range(len(linears)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_ylabel("block")
    return heat(axes, by_position, (len(blocks), len(linears)), **options)
