"""Heat map of what pruning costs: calibrated on one language, measured on another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lib.report.plots import style as plot_style
from lib.report.plots.heatmaps import heat
from lib.report.results import NONE
from lib.report.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG_NAME = 9  # characters; a longer one does not fit under its column


def cross_language(table: Table) -> Figure | None:
    """Draw the rise over dense in percent, calibrated on (rows) x measured on (columns).

    A axes per target and method. None where a single calibration set or no dense run is given.
    """
    rows = [row for row in table.pruned if row.label != NONE]
    labels = [label for label in table.calibrations if label != NONE]
    rises = {(row, test): table.rise(row, test) for row in rows for test in table.tests}
    rises = {key: 100 * x for key, x in rises.items() if x is not None and math.isfinite(x)}
    if len(labels) < 2 or not rises:
        return None
    targets = [target for target in table.targets if any(row.target == target for row in rows)]
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 2.2 + len(methods) * (0.8 + 0.85 * len(table.tests))
    height = 1.7 + len(targets) * (0.75 + 0.42 * len(labels))
    figure = plot_style.figure(max(6.5, width), height)
    panels = figure.subplots(len(targets), len(methods), squeeze=False, sharex=True, sharey=True)
    norm = _log_norm(rises.values())
    image = None
    for i, target in enumerate(targets):
        for j, method in enumerate(methods):
            here = [row for row in rows if (row.target, row.method) == (target, method)]
            drawn = _panel(panels[i, j], list(table.tests), here, labels, rises, norm)
            image = drawn or image
            panels[i, j].set_title(f"{method} {target}" if here else "", fontsize=10)
        panels[i, 0].set_ylabel("calibrated on")
    for axes in panels[-1]:
        axes.set_xlabel("measured on")
    bar = figure.colorbar(image, ax=panels, label="perplexity over dense, % (log scale)")
    plot_style.log_ticks(bar.ax.yaxis)
    title = f"{table.short_model}: rise of perplexity over dense, by calibration and test text"
    plot_style.title(figure, title)
    return figure


def _log_norm(percents: Iterable[float]):
    from matplotlib.colors import LogNorm

    positive = [max(percent, 0.1) for percent in percents]
    return LogNorm(min(positive) / 1.05, max(positive) * 1.05, clip=True)


def _panel(
    axes,
    tests: list[str],
    rows: Sequence[Row],
    labels: list[str],
    rises: Mapping[tuple[Row, str], float],
    norm,
):
    if not rows:
        axes.set_axis_off()
        return None
    cells = {
        (labels.index(row.label), tests.index(test)): rises[row, test]
        for row in rows
        for test in tests
        if (row, test) in rises
    }
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    long = max(map(len, tests)) > LONG_NAME
    axes.set_xticks(range(len(tests)), tests, **(slanted if long else {}))
    axes.set_yticks(range(len(labels)), labels)
    return heat(axes, cells, (len(labels), len(tests)), text=_rise, norm=norm, cmap="cividis")


def _rise(percent: float) -> str:
    return f"{percent:+.1f}" if abs(percent) < 100 else f"{percent:+,.0f}"
