"""Share of right answers that models choose, against the share that they write themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.report.plots import style as plot_style
from lib.report.plots.style import GREY, MARKERS, calibration_style, pick
from lib.report.quality_tables import dense_means, quality_means
from lib.report.results import NONE
from lib.report.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHOSEN, WRITTEN = "last word right", "last word said"  # figures of quality_tables


def choice_against_saying(table: Table) -> Figure | None:
    """Draw a panel per test set, a mark per row of the table, and the dense model as a star.

    A model straight below the star still finds the answer and no longer writes it. None where no
    run was measured by such questions.
    """
    points = {
        test: {row: _point(quality_means(row, test)) for row in table.pruned}
        for test in table.tests
    }
    points = {test: {row: p for row, p in rows.items() if p} for test, rows in points.items()}
    tests = [test for test, rows in points.items() if rows]
    if not tests:
        return None
    methods = list(dict.fromkeys(row.method for row in table.pruned))
    figure = plot_style.figure(max(7.0, 4.8 * len(tests)), 5.4)
    panels = figure.subplots(1, len(tests), squeeze=False)[0]
    dense = {test: _point(dense_means(table, test)) for test in tests}
    for axes, test in zip(panels, tests, strict=True):
        if dense[test]:
            axes.plot(*dense[test], marker="*", markersize=15, color=GREY, linestyle="none")
        for row, (chosen, written) in points[test].items():
            colour, _, _ = calibration_style(table.calibrations, row.label)
            marker = pick(MARKERS, methods.index(row.method))
            axes.plot(chosen, written, marker=marker, markersize=8, color=colour, ls="none")
        _name_targets(axes, points[test])
        _finish(axes, test)
    panels[0].set_ylabel("answer written greedily, % of questions")
    handles = _legend(table, methods, any(dense.values()))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    plot_style.title(figure, f"{table.short_model}: last words chosen against last words written")
    return figure


def _point(figures: dict[str, float]) -> tuple[float, float] | None:
    """(chosen, written) in percent; None where one of them was not measured."""
    if CHOSEN not in figures or WRITTEN not in figures:
        return None
    return 100 * figures[CHOSEN], 100 * figures[WRITTEN]


def _name_targets(axes: Axes, points: dict[Row, tuple[float, float]]) -> None:
    """Write each target beside the rightmost of a method's marks for it."""
    rightmost: dict[tuple[str, str], tuple[float, float]] = {}
    for row, point in points.items():
        key = row.method, row.target
        rightmost[key] = max(point, rightmost.get(key, point))
    offset = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
    for (_, target), point in rightmost.items():
        axes.annotate(target, point, fontsize=8, **offset)


def _finish(axes: Axes, test: str) -> None:
    """Set title, label and margins of a panel."""
    axes.set_title(f"questions from {test}", fontsize=11)
    axes.set_xlabel("right option the likeliest, % of questions")
    axes.margins(0.15)
    plot_style.open_axes(axes)


def _legend(table: Table, methods: list[str], has_dense: bool) -> list:
    from matplotlib.lines import Line2D

    mark = {"ls": "none", "markersize": 8}
    handles = []
    for label in table.calibrations:
        text = "no calibration" if label == NONE else f"calibrated on {label}"
        colour, _, _ = calibration_style(table.calibrations, label)
        handles.append(Line2D([], [], marker="s", color=colour, label=text, **mark))
    for index, method in enumerate(methods):
        marker = pick(MARKERS, index)
        handles.append(Line2D([], [], marker=marker, color=GREY, label=method, **mark))
    if has_dense:
        handles.append(Line2D([], [], marker="*", color=GREY, label="dense", **mark))
    return handles
