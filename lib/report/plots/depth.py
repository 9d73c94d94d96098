"""Divergence from the dense model against the number of blocks that are pruned."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from lib.report.plots import style as plot_style
from lib.report.plots.style import COLOURS, LINES, MARKERS, pick
from lib.report.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def kl_by_depth(table: Table) -> Figure | None:
    """Draw a panel per test set, and in it a line per row of the table, the mean over its runs.

    None where no run was measured block by block.
    """
    curves = {
        test: {row: curve for row in table.pruned if (curve := _curve(row, test))}
        for test in table.tests
    }
    tests = [test for test, rows in curves.items() if rows]
    if not tests:
        return None
    figure = plot_style.figure(max(7.5, 5.0 * len(tests)), 5.4)
    panels = figure.subplots(1, len(tests), squeeze=False)[0]
    methods = list(dict.fromkeys(row.method for row in table.pruned))
    targets = list(dict.fromkeys(row.target for row in table.pruned))
    labels: dict[str, object] = {}
    for axes, test in zip(panels, tests, strict=True):
        for row, curve in curves[test].items():
            look = {
                "color": pick(COLOURS, methods.index(row.method)),
                "linestyle": pick(LINES, targets.index(row.target)),
                "marker": pick(MARKERS, table.calibrations.index(row.label)),
            }
            (line,) = axes.plot(range(1, len(curve) + 1), curve, lw=1.8, markersize=4, **look)
            labels.setdefault(f"{row.method} {row.target}, calibrated on {row.label}", line)
        axes.set_title(f"measured on {test}", fontsize=11)
        axes.set_xlabel("blocks pruned, the first ones first")
        axes.set_yscale("log")
        plot_style.open_axes(axes)
    panels[0].set_ylabel("KL to the dense model, nats a token (log scale)")
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=2, fontsize=9)
    plot_style.title(figure, f"{table.short_model}: how the error grows with depth")
    return figure


def _curve(row: Row, test: str) -> list[float]:
    """The divergence after each block, the mean over the runs that measured it."""
    records = [
        record["kl"]
        for run in row.runs
        for record in run.results.get("depth", [])
        if record["name"] == test
    ]
    return [statistics.fmean(values) for values in zip(*records, strict=False)]
