"""Perplexity against sparsity: axes for each test set, a line per method and calibration set.

Where whole neurons were removed, the sparsity is the share of the blocks' weights that went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lib.report.plots import style as plot_style
from lib.report.plots.style import GREY, MARKERS, calibration_style, pick
from lib.report.results import NEURONS, NONE
from lib.report.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILLS = {  # of the markers of N:M types; unstructured ones are full
    "4:8": {"fillstyle": "left", "markerfacecoloralt": "white"},
    "2:4": {"markerfacecolor": "white"},
}
NEURONS_FILL = {"fillstyle": "bottom", "markerfacecoloralt": "white"}
PATTERN_STEP = 0.09  # of the axis: distance of an N:M type's marks to the right of their ratio
DODGE = 0.012  # of the axis: distance between the calibration sets of one target


def perplexity_against_sparsity(table: Table) -> Figure | None:
    """Draw axes for each test set, lines by method and calibration set, dense as a dashed line."""
    if not table.pruned or not table.tests:
        return None
    columns = len(table.tests)
    figure = plot_style.figure(max(7.0, 4.6 * columns), 5.6)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    labels = table.calibrations
    methods = list(dict.fromkeys(row.method for row in table.pruned))
    for axes, test in zip(panels, table.tests, strict=True):
        for method in methods:
            for label in labels:
                rows = [r for r in table.pruned if (r.method, r.label) == (method, label)]
                _series(axes, table, rows, test, pick(MARKERS, methods.index(method)), labels)
        _finish_panel(axes, table, test)
    panels[0].set_ylabel("perplexity per token (log scale, lower is better)")
    handles = _legend(table, methods, labels)
    figure.legend(handles=handles, loc="outside lower center", ncols=3 + (columns > 1))
    plot_style.title(figure, f"{table.short_model}: perplexity against sparsity")
    return figure


def _series(axes, table: Table, rows: Sequence[Row], test: str, marker: str, labels) -> None:
    """The lines of the unstructured ratios and of whole neurons, and marks for the N:M patterns
    beside theirs."""
    finite = [r for r in rows if r.mean(test) is not None and math.isfinite(r.mean(test))]
    ratios = sorted((r for r in finite if r.target not in FILLS), key=lambda row: row.ratio)
    lines = [[row for row in ratios if (row.kind == NEURONS) == gone] for gone in (False, True)]
    patterns = [[row for row in finite if row.target == pattern] for pattern in FILLS]
    for group in filter(None, (*lines, *patterns)):
        target, label = group[0].target, group[0].label
        fill = NEURONS_FILL if group[0].kind == NEURONS else FILLS.get(target, {})
        colour, dashes, _ = calibration_style(labels, label)
        spread = [row.deviation(test) for row in group]
        from_middle = labels.index(label) - (len(labels) - 1) / 2
        shift = _shift(table, target) + DODGE * _span(table) * from_middle
        axes.errorbar(
            [100 * row.removed + shift for row in group],
            [row.mean(test) for row in group],
            yerr=[math.nan if s is None else s for s in spread] if any(spread) else None,
            color=colour,
            linestyle="none" if target in FILLS else dashes,
            marker=marker,
            markersize=7,
            **fill,
            capsize=2,
            elinewidth=1,
        )


def _span(table: Table) -> float:
    """Points of sparsity that the axis covers."""
    ratios = [row.removed for row in table.pruned]
    return 100 * (max(ratios) - min(ratios)) + 16


def _shift(table: Table, target: str) -> float:
    """How far to the right of its ratio a target is drawn, in points of sparsity."""
    steps = 1 + list(FILLS).index(target) if target in FILLS else 0
    return PATTERN_STEP * _span(table) * steps


def _finish_panel(axes, table: Table, test: str) -> None:
    plot_style.name_panel(axes, table, test, axes.axhline)
    axes.set_yscale("log")
    axes.set_xlabel("weights pruned, %")
    plot_style.open_axes(axes)
    plot_style.log_ticks(axes.yaxis)
    ticks = {100 * row.removed: f"{100 * row.removed:.3g}" for row in table.pruned}
    for pattern in FILLS:
        ratio = next((100 * r.ratio for r in table.pruned if r.target == pattern), None)
        if ratio is not None:
            ticks[ratio + _shift(table, pattern)] = f"\n{pattern}"  # below the ratio beside it
    axes.set_xticks(list(ticks), list(ticks.values()))
    margin = 0.07 * _span(table)
    axes.set_xlim(min(ticks) - margin, max(ticks) + margin)


def _legend(table: Table, methods: Sequence[str], labels: Sequence[str]) -> list:
    from matplotlib.lines import Line2D

    handles = []
    for label in labels:
        colour, dashes, _ = calibration_style(labels, label)
        text = "no calibration" if label == NONE else f"calibrated on {label}"
        handles.append(Line2D([], [], color=colour, ls=dashes, lw=2, label=text))
    mark = {"color": GREY, "ls": "none", "markersize": 7}
    for i, method in enumerate(methods):
        handles.append(Line2D([], [], marker=pick(MARKERS, i), label=method, **mark))
    for pattern in (pattern for pattern in FILLS if pattern in table.targets):
        style = {"marker": "o", "label": f"{pattern}, any method", **mark, **FILLS[pattern]}
        handles.append(Line2D([], [], **style))
    if any(row.kind == NEURONS for row in table.pruned):
        style = {"marker": "o", "label": "whole neurons, any method", **mark, **NEURONS_FILL}
        handles.append(Line2D([], [], **style))
    if table.dense:
        handles.append(Line2D([], [], color=GREY, ls="--", label="dense"))
    return handles
