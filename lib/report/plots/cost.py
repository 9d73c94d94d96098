"""What pruning costs at two targets, and what the right calibration text saves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lib.report.plots import style as plot_style
from lib.report.plots.style import GREY, calibration_style
from lib.report.results import NONE
from lib.report.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS = ("50%", "2:4")  # enough to see it at a glance


def pruning_cost(table: Table) -> Figure | None:
    """Draw a lane per target and method, a mark per calibration set, the dense model as a line.

    The gap between the marks of a lane is what calibrating on the right language saves. Shows 50%
    and 2:4 where the table has them, else every target.
    """
    if not table.pruned or not table.tests:
        return None
    shown = [target for target in table.targets if target in TARGETS] or table.targets
    rows = sorted((r for r in table.pruned if r.target in shown), key=lambda r: r.order)
    lanes = list(dict.fromkeys((row.target, row.method) for row in rows))
    columns = len(table.tests)
    figure = plot_style.figure(max(8.0, 5.2 * columns), 2.6 + 0.45 * len(lanes))
    panels = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    labels = table.calibrations
    for axes, test in zip(panels, table.tests, strict=True):
        for height, lane in enumerate(lanes):
            _lane(axes, table, test, lane, height, labels)
        _finish(axes, table, test, lanes)
    handles = _legend(table, labels)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
    title = f"{table.short_model}: perplexity after pruning, by method and calibration text"
    plot_style.title(figure, title)
    return figure


def _lane(axes, table: Table, test: str, lane: tuple[str, str], height: int, labels) -> None:
    rows = [row for row in table.pruned if (row.target, row.method) == lane]
    means = {row: row.mean(test) for row in rows}
    points = {row: x for row, x in means.items() if x is not None and math.isfinite(x)}
    if not points:
        return
    best, worst = min(points, key=points.get), max(points, key=points.get)
    axes.plot([points[best], points[worst]], [height] * 2, color=GREY, linewidth=1.5)
    for row, x in points.items():
        colour, _, marker = calibration_style(labels, row.label)
        style = {"color": colour, "marker": marker, "markersize": 11, "capsize": 2, "mec": "white"}
        axes.errorbar(x, height, xerr=row.deviation(test) or None, **style)
    spread = {row: row.deviation(test) or 0.0 for row in points}
    rise = table.rise(best, test)
    if rise is not None:
        left = min(x - spread[row] if spread[row] < x else x for row, x in points.items())
        _write(axes, f"{rise:+,.0%}", left, height, -9, "right")
    saved = saving(table, test, points)
    if saved is not None:
        verb = "saves" if saved > 0 else "costs"
        right = max(x + spread[row] for row, x in points.items())
        _write(axes, f"own text {verb} {abs(saved):.1%}", right, height, 9, "left")


def saving(table: Table, test: str, perplexities: Mapping[Row, float]) -> float | None:
    """What calibrating on the test set's own text saves, as a share of the perplexity.

    Of rows that differ in their calibration only, against the geometric mean of those calibrated on
    the other test sets, or, where there are none, on anything else. None where that can't be said.
    """
    settings = [row.settings for row in perplexities]
    if any(other != settings[0] for other in settings):
        return None
    by_text = {row.label: value for row, value in perplexities.items() if row.label != NONE}
    own = by_text.pop(test, None)
    others = [value for text, value in by_text.items() if text in table.tests]
    others = others or list(by_text.values())
    return 1 - own / statistics.geometric_mean(others) if own and others else None


def _write(axes, text: str, x: float, height: int, offset: int, side: str) -> None:
    style = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 9}
    style["bbox"] = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    axes.annotate(text, (x, height), (offset, 0), **style)


def _finish(axes, table: Table, test: str, lanes: Sequence[tuple[str, str]]) -> None:
    plot_style.name_panel(axes, table, test, axes.axvline)
    axes.set_xscale("log")
    several = test in table.calibrations and len(set(table.calibrations) - {NONE}) > 1
    note = "+%: over dense" + "; own text: against calibrating on another" * several
    axes.set_xlabel(f"perplexity per token (log scale)\n{note}")
    axes.set_yticks(range(len(lanes)), [f"{method} {target}" for target, method in lanes])
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    low, high = axes.get_xlim()
    room = high / low
    beside = 0.65 if several else 0.05  # for the figures beside the marks
    axes.set_xlim(low / room**0.18, high * room**beside)
    plot_style.open_axes(axes)
    plot_style.log_ticks(axes.xaxis)


def _legend(table: Table, labels: Sequence[str]) -> list:
    from matplotlib.lines import Line2D

    handles = []
    for label in labels:
        colour, _, marker = calibration_style(labels, label)
        text = "needs no calibration" if label == NONE else f"calibrated on {label}"
        style = {"color": colour, "marker": marker, "markersize": 9}
        handles.append(Line2D([], [], ls="none", label=text, **style))
    if table.dense:
        handles.append(Line2D([], [], color=GREY, ls="--", label="dense"))
    return handles
