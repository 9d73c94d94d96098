"""Where a method pruned more and where less, by block and linear."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from lib.report.names import place
from lib.report.plots import heatmaps
from lib.report.plots import style as plot_style
from lib.report.tables import Row, Table

Place = tuple[int, str]  # block, linear
CONSTANT = 0.002  # sparsity that varies less over the linears is not worth a picture


def sparsity_by_linear(table: Table, path: Path) -> Path | None:
    """Measured sparsity in percent, a panel per row of the table where it is not constant.

    The colour tells how far a cell is from the sparsity asked for. None where all are constant.
    """
    shown = {}
    for row in table.pruned:
        cells = _cells(row)
        if cells and max(cells.values()) - min(cells.values()) > CONSTANT:
            shown[row] = cells
    if not shown:
        return None
    blocks = sorted({block for cells in shown.values() for block, _ in cells})
    kinds = list(dict.fromkeys(kind for cells in shown.values() for _, kind in cells))
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    width, height = 1.8 + columns * 0.62 * len(kinds), 1.4 + lines * (1.3 + 0.26 * len(blocks))
    picture = plot_style.figure(max(7.0, width), height)
    panels = picture.subplots(lines, columns, squeeze=False)
    reach = max(abs(v - row.ratio) for row, cells in shown.items() for v in cells.values())
    limits = {"vmin": -100 * reach, "vmax": 100 * reach, "cmap": "PuOr_r"}
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    for panel, (row, cells) in zip(panels.flat, shown.items(), strict=False):
        away = {where: value - row.ratio for where, value in cells.items()}
        aim = 100 * row.ratio
        image = heatmaps.blocks_by_kind(
            panel, away, blocks, kinds, text=lambda v, aim=aim: f"{v + aim:.0f}", **limits
        )
        panel.set_title(f"{row.method} {row.setting}, calibrated on {row.label}", fontsize=10)
    picture.colorbar(image, ax=panels, label="points of sparsity over the aim")
    plot_style.title(picture, f"{_finding(shown)}. Cells: weights pruned, %")
    return plot_style.save(picture, path)


def _cells(row: Row) -> dict[Place, float]:
    """Mean over the runs and over the matrices that share a place, such as experts."""
    found: dict[Place, list[float]] = {}
    for run in row.runs:
        for name, value in run.record.get("sparsity", {}).get("linears", {}).items():
            where = place(name)
            if where:
                found.setdefault(where, []).append(value)
    return {where: statistics.fmean(values) for where, values in found.items()}


def _finding(shown: Mapping[Row, Mapping[Place, float]]) -> str:
    distances: dict[Place, list[float]] = {}
    for row, cells in shown.items():
        for where, value in cells.items():
            distances.setdefault(where, []).append(100 * (value - row.ratio))
    mean = {where: statistics.fmean(values) for where, values in distances.items()}
    spared, hit = min(mean, key=mean.get), max(mean, key=mean.get)
    return (
        f"Most spared is {spared[1]} of block {spared[0]} ({mean[spared]:+.1f} points against the "
        f"aim), hardest pruned {hit[1]} of block {hit[0]} ({mean[hit]:+.1f})"
    )
