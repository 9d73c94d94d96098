"""All pictures of a table of runs, and the first of them: perplexity against sparsity.

Every title states what the figures show, computed from them. matplotlib is imported only when
something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lib.report import findings
from lib.report.plots import style as plot_style
from lib.report.plots.cost import calibrations, pruning_cost
from lib.report.plots.heatmaps import cross_language
from lib.report.plots.sparsity import sparsity_by_linear
from lib.report.plots.style import GREY, MARKERS, calibration_style, pick
from lib.report.results import NONE
from lib.report.tables import Row, Table

PATTERNS = {  # how a marker of that pattern is filled; unstructured ones are full
    "4:8": {"fillstyle": "left", "markerfacecoloralt": "white"},
    "2:4": {"markerfacecolor": "white"},
}
PATTERN_STEP = 0.09  # of the axis: how far right of its ratio a pattern's marks stand
DODGE = 0.012  # of the axis: how far the calibration sets of one setting stand apart


def draw_all(tables: Sequence[Table], out: Path) -> list[Path]:
    """Every picture that the tables have figures for, as PNGs in `out`; returns their paths."""
    drawn = []
    for index, table in enumerate(tables, 1):
        suffix = f"-{index}" if len(tables) > 1 else ""
        for name, draw in (
            ("perplexity", perplexity_against_sparsity),
            ("pruning_cost", pruning_cost),
            ("languages", cross_language),
            ("sparsity", sparsity_by_linear),
        ):
            path = draw(table, out / f"{name}{suffix}.png")
            drawn += [path] if path else []
    return drawn


def perplexity_against_sparsity(table: Table, path: Path) -> Path | None:
    """One panel per test set, one line per method and calibration set, dense as a dashed line."""
    if not table.pruned or not table.tests:
        return None
    columns = len(table.tests)
    picture = plot_style.figure(max(7.0, 4.6 * columns), 5.6)
    panels = picture.subplots(1, columns, squeeze=False)[0]
    labels = calibrations(table)
    methods = list(dict.fromkeys(row.method for row in table.pruned))
    for panel, test in zip(panels, table.tests, strict=True):
        for method in methods:
            for label in labels:
                rows = [r for r in table.pruned if (r.method, r.label) == (method, label)]
                _series(panel, table, rows, test, pick(MARKERS, methods.index(method)), labels)
        _finish_panel(panel, table, test, labels)
    panels[0].set_ylabel("perplexity per token (log scale, lower is better)")
    picture.legend(handles=_legend(table, methods, labels), loc="outside lower center", ncols=4)
    finding = findings.language_finding(table) or findings.best_finding(table)
    plot_style.title(picture, finding)
    return plot_style.save(picture, path)


def _series(panel, table: Table, rows: Sequence[Row], test: str, marker: str, labels) -> None:
    """The line of the unstructured ratios, and marks for the N:M patterns beside theirs."""
    known = [r for r in rows if r.mean(test) is not None and math.isfinite(r.mean(test))]
    line = sorted((r for r in known if r.setting not in PATTERNS), key=lambda row: row.ratio)
    patterns = [[row for row in known if row.setting == pattern] for pattern in PATTERNS]
    for group in filter(None, (line, *patterns)):
        setting, label = group[0].setting, group[0].label
        colour, dashes, _ = calibration_style(labels, label)
        spread = [row.deviation(test) for row in group]
        away = labels.index(label) - (len(labels) - 1) / 2
        shift = _shift(table, setting) + DODGE * _span(table) * away
        panel.errorbar(
            [100 * row.ratio + shift for row in group],
            [row.mean(test) for row in group],
            yerr=[math.nan if s is None else s for s in spread] if any(spread) else None,
            color=colour,
            linestyle="none" if setting in PATTERNS else dashes,
            marker=marker,
            markersize=7,
            **PATTERNS.get(setting, {}),
            capsize=2,
            elinewidth=1,
        )


def _span(table: Table) -> float:
    """Points of sparsity that the axis covers."""
    ratios = [row.ratio for row in table.pruned]
    return 100 * (max(ratios) - min(ratios)) + 16


def _shift(table: Table, setting: str) -> float:
    """How far to the right of its ratio a setting is drawn, in points of sparsity."""
    return (
        PATTERN_STEP * _span(table) * (1 + list(PATTERNS).index(setting))
        if setting in PATTERNS
        else 0
    )


def _finish_panel(panel, table: Table, test: str, labels: Sequence[str]) -> None:
    dense = table.dense.mean(test) if table.dense else None
    named = test
    if dense is not None and math.isfinite(dense):
        panel.axhline(dense, color=GREY, linestyle="--", linewidth=1.2)
        named = f"{test} (dense {dense:.4g})"
    panel.set_title(f"measured on {named}", fontsize=11)
    panel.set_yscale("log")
    panel.set_xlabel("weights pruned, %")
    plot_style.open_axes(panel)
    plot_style.log_ticks(panel.yaxis)
    ticks = {100 * row.ratio: f"{100 * row.ratio:g}" for row in table.pruned}
    for pattern in PATTERNS:
        ratio = next((100 * r.ratio for r in table.pruned if r.setting == pattern), None)
        if ratio is not None:
            ticks[ratio + _shift(table, pattern)] = pattern
    panel.set_xticks(list(ticks), list(ticks.values()))
    margin = 0.07 * _span(table)
    panel.set_xlim(min(ticks) - margin, max(ticks) + margin)


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
    for pattern in (pattern for pattern in PATTERNS if pattern in findings.settings(table)):
        style = {"marker": "o", "label": f"{pattern}, any method", **mark, **PATTERNS[pattern]}
        handles.append(Line2D([], [], **style))
    if table.dense:
        handles.append(Line2D([], [], color=GREY, ls="--", label="dense"))
    return handles
