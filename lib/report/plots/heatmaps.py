"""Heat maps: calibrated on against measured on, and whatever differs by block and linear.

Colours are matplotlib's `cividis` and `PuOr_r`, safe for the colour-blind; every cell that has room
also says its figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.report import findings
from lib.report.plots import style as plot_style
from lib.report.results import NONE
from lib.report.tables import Row, Table

MOST_CELLS_NAMED = 400


def heat(axes, cells: Mapping[tuple[int, int], float], shape: tuple[int, int], **options):
    """Draw cells {(row, column): value} and their figures; missing ones stay blank.

    `text` turns a value into what its cell says, `norm` and `cmap` are matplotlib's. Returns the
    image, for a colour bar.
    """
    rows, columns = shape
    text = options.pop("text")
    values = [[cells.get((i, j), math.nan) for j in range(columns)] for i in range(rows)]
    image = axes.imshow(values, aspect="auto", **options)
    for (i, j), value in cells.items() if len(cells) <= MOST_CELLS_NAMED else ():
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            j,
            i,
            text(value),
            ha="center",
            va="center",
            fontsize=9 if rows <= 24 else 6,
            color="white" if dark else "black",
        )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def cross_language(table: Table, path: Path) -> Path | None:
    """Rise over dense in percent, calibrated on (rows) x measured on (columns).

    A panel per setting and method. None where a single calibration set or no dense run is given.
    """
    rows = [r for r in table.pruned if r.runs[0].calibration != NONE]
    labels = [name for name in table.tests if any(r.label == name for r in rows)]
    labels += sorted({row.label for row in rows} - set(labels))
    if table.dense is None or len(labels) < 2:
        return None
    settings = [s for s in findings.settings(table) if any(r.setting == s for r in rows)]
    methods = list(dict.fromkeys(row.method for row in rows))
    rises = {
        (row, test): table.rise(row, test)
        for row in rows
        for test in table.tests
        if table.rise(row, test) is not None and math.isfinite(table.rise(row, test))
    }
    if not rises:
        return None
    width = 2.2 + len(methods) * (0.8 + 0.85 * len(table.tests))
    height = 1.7 + len(settings) * (0.75 + 0.42 * len(labels))
    picture = plot_style.figure(max(6.5, width), height)
    panels = picture.subplots(len(settings), len(methods), squeeze=False, sharex=True, sharey=True)
    norm = _log_norm(rises.values())
    image = None
    for i, setting in enumerate(settings):
        for j, method in enumerate(methods):
            here = [r for r in rows if (r.setting, r.method) == (setting, method)]
            drawn = _matrix(panels[i, j], table, here, labels, rises, norm)
            image = drawn or image
            panels[i, j].set_title(f"{method} {setting}" if here else "", fontsize=10)
        panels[i, 0].set_ylabel("calibrated on")
    for panel in panels[-1]:
        panel.set_xlabel("measured on")
    bar = picture.colorbar(image, ax=panels, label="perplexity over dense, % (log scale)")
    plot_style.log_ticks(bar.ax.yaxis)
    plot_style.title(picture, _matrix_finding(table))
    return plot_style.save(picture, path)


def _log_norm(values):
    from matplotlib.colors import LogNorm

    percents = [100 * max(value, 1e-3) for value in values]
    low, high = min(percents), max(percents)
    return LogNorm(low / 1.05, high * 1.05, clip=True)


def _matrix(panel, table: Table, rows: Sequence[Row], labels, rises, norm):
    tests = list(table.tests)
    if not rows:
        panel.set_axis_off()
        return None
    cells = {
        (labels.index(row.label), tests.index(test)): 100 * rises[row, test]
        for row in rows
        for test in tests
        if (row, test) in rises
    }
    panel.set_xticks(range(len(tests)), tests)
    panel.set_yticks(range(len(labels)), labels)
    shape = (len(labels), len(tests))
    return heat(panel, cells, shape, norm=norm, cmap="cividis", text=_rise)


def _rise(value: float) -> str:
    return f"{value:+.1f}" if abs(value) < 100 else f"{value:+,.0f}"


def _matrix_finding(table: Table) -> str:
    found = findings.effects(table)
    if not found:
        return "Rise of perplexity over the dense model, by calibration and test text"
    better = sum(effect.change < 0 for effect in found)
    mean = findings.compared(findings.mean_change(effect.change for effect in found))
    return (
        f"The language calibrated on loses less in {better} of {len(found)} comparisons; "
        f"its perplexity is {mean} on average"
    )


def blocks_by_kind(panel, cells: Mapping[tuple[int, str], float], blocks, kinds, **options):
    """A heat map of shares {(block, linear): value}, shown in percent; see `heat`."""
    placed = {(blocks.index(b), kinds.index(k)): 100 * value for (b, k), value in cells.items()}
    short = [kind.split(".")[-1] for kind in kinds]
    names = short if len(set(short)) == len(kinds) else kinds
    panel.set_xticks(range(len(kinds)), names, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(blocks)), blocks)
    panel.set_ylabel("block")
    return heat(panel, placed, (len(blocks), len(kinds)), **options)
