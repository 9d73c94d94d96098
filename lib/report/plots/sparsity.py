"""Where a method pruned more and where less, by block and linear."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from lib.report.names import Place, place
from lib.report.plots import style as plot_style
from lib.report.plots.heatmaps import blocks_by_linear
from lib.report.tables import Row, Table

CONSTANT = 0.002  # sparsity that varies less over the linears is not worth a picture


def sparsity_by_linear(table: Table, path: Path) -> Path | None:
    """Measured sparsity in percent, a panel per row of the table where it is not constant.

    The colour tells how far a cell is from the sparsity asked for. None where all are constant.
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
    picture = plot_style.figure(width, 1.4 + lines * (1.45 + 0.26 * len(blocks)))
    panels = picture.subplots(lines, columns, squeeze=False)
    reach = max(abs(v - row.ratio) for row, cells in shown.items() for v in cells.values())
    limits = {"vmin": -100 * reach, "vmax": 100 * reach, "cmap": "PuOr_r"}
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    for panel, (row, cells) in zip(panels.flat, shown.items(), strict=False):
        away = {where: value - row.ratio for where, value in cells.items()}
        asked = 100 * row.ratio
        image = blocks_by_linear(
            panel, away, blocks, linears, text=lambda v, asked=asked: f"{v + asked:.0f}", **limits
        )
        panel.set_title(f"{row.method} {row.target}\ncalibrated on {row.label}", fontsize=10)
    picture.colorbar(image, ax=panels, label="points over the sparsity asked for")
    plot_style.title(picture, f"{table.short_model}: weights pruned in each linear, %")
    return plot_style.save(picture, path)


def _cells(row: Row) -> dict[Place, float]:
    """Mean over the runs and over the matrices that share a place, such as experts."""
    found: dict[Place, list[float]] = {}
    for run in row.runs:
        for name, value in run.results.get("sparsity", {}).get("linears", {}).items():
            where = place(name)
            if where:
                found.setdefault(where, []).append(value)
    return {where: statistics.fmean(values) for where, values in found.items()}


def _varies(cells: dict[Place, float]) -> bool:
    return bool(cells) and max(cells.values()) - min(cells.values()) > CONSTANT
