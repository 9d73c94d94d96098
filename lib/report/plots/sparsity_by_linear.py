"""Heat maps of measured sparsity, by block and linear."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from lib.report.names import BlockLinear, block_and_linear
from lib.report.plots import style as plot_style
from lib.report.plots.heatmaps import blocks_by_linear
from lib.report.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONSTANT = 0.002  # sparsity that varies less over the linears is not worth a figure


def sparsity_by_linear(table: Table) -> Figure | None:
    """Draw measured sparsity in percent, axes for each row of the table where it is not constant.

    The colour is a cell's distance from the target sparsity. None where all are constant.
    """
    measured = {row: _cells(row) for row in table.pruned}
    shown = {row: cells for row, cells in measured.items() if _varies(cells)}
    if not shown:
        return None
    blocks = sorted({block for cells in shown.values() for block, _ in cells})
    linears = list(dict.fromkeys(linear for cells in shown.values() for _, linear in cells))
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    width = 1.8 + columns * max(3.4, 0.62 * len(linears))
    figure = plot_style.figure(width, 1.4 + lines * (1.45 + 0.26 * len(blocks)))
    panels = figure.subplots(lines, columns, squeeze=False)
    reach = max(abs(v - row.ratio) for row, cells in shown.items() for v in cells.values())
    limits = {"vmin": -100 * reach, "vmax": 100 * reach, "cmap": "PuOr_r"}
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (row, cells) in zip(panels.flat, shown.items(), strict=False):
        distance = {key: value - row.ratio for key, value in cells.items()}
        target = 100 * row.ratio
        image = blocks_by_linear(
            axes,
            distance,
            blocks,
            linears,
            text=lambda v, target=target: f"{v + target:.0f}",
            **limits,
        )
        axes.set_title(f"{row.method} {row.target}\ncalibrated on {row.label}", fontsize=10)
    figure.colorbar(image, ax=panels, label="points above the target sparsity")
    plot_style.title(figure, f"{table.short_model}: weights pruned in each linear, %")
    return figure


def _cells(row: Row) -> dict[BlockLinear, float]:
    """Mean over the runs, and over matrices of one name, such as experts."""
    values: dict[BlockLinear, list[float]] = {}
    for run in row.runs:
        for name, value in run.results.get("sparsity", {}).get("linears", {}).items():
            if key := block_and_linear(name):
                values.setdefault(key, []).append(value)
    return {key: statistics.fmean(shares) for key, shares in values.items()}


def _varies(cells: dict[BlockLinear, float]) -> bool:
    return bool(cells) and max(cells.values()) - min(cells.values()) > CONSTANT
