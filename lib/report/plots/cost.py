"""The picture of the demo: what pruning costs, and what the right calibration text saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lib.report import findings
from lib.report.plots import style as plot_style
from lib.report.plots.style import GREY, calibration_style
from lib.report.results import NONE
from lib.report.tables import Table

SETTINGS = ("50%", "2:4")  # enough to see it at a glance


def calibrations(table: Table) -> list[str]:
    """Calibration sets in the order of the test sets, then the others, `none` last."""
    found = {row.label for row in table.pruned}
    first = [name for name in table.tests if name in found]
    return first + sorted(found - set(first), key=lambda label: (label == NONE, label))


def pruning_cost(table: Table, path: Path) -> Path | None:
    """A lane per setting and method, a mark per calibration set, the dense model as a line.

    The gap between the marks of a lane is what calibrating on the right language saves. Shows 50%
    and 2:4 where the table has them, else every setting.
    """
    if not table.pruned or not table.tests:
        return None
    present = findings.settings(table)
    shown = [setting for setting in present if setting in SETTINGS] or present
    lanes = list(
        dict.fromkeys((r.setting, r.method) for s in shown for r in table.pruned if r.setting == s)
    )
    columns = len(table.tests)
    picture = plot_style.figure(max(8.0, 5.2 * columns), 2.4 + 0.45 * len(lanes))
    panels = picture.subplots(1, columns, squeeze=False, sharey=True)[0]
    labels = calibrations(table)
    for panel, test in zip(panels, table.tests, strict=True):
        for height, lane in enumerate(lanes):
            _lane(panel, table, test, lane, height, labels)
        _finish(panel, table, test, lanes)
    handles = _legend(table, labels)
    picture.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
    said = [findings.cost_finding(table, shown), findings.language_finding(table, shown)]
    plot_style.title(picture, ". ".join(part for part in said if part))
    return plot_style.save(picture, path)


def _lane(panel, table: Table, test: str, lane: tuple[str, str], height: int, labels) -> None:
    rows = [r for r in table.pruned if (r.setting, r.method) == lane]
    means = {row: row.mean(test) for row in rows}
    points = {row: x for row, x in means.items() if x is not None and math.isfinite(x)}
    if not points:
        return
    best, worst = min(points, key=points.get), max(points, key=points.get)
    panel.plot([points[best], points[worst]], [height] * 2, color=GREY, linewidth=1.5)
    for row, x in points.items():
        colour, _, marker = calibration_style(labels, row.label)
        style = {"color": colour, "marker": marker, "markersize": 11, "capsize": 2, "mec": "white"}
        panel.errorbar(x, height, xerr=row.deviation(test) or None, **style)
    rise = table.rise(best, test)
    if rise is not None:
        _write(panel, f"{rise:+,.0%}", points[best], height, -9, "right")
    saved = [e for e in findings.effects(table) if (e.setting, e.method) == lane and e.test == test]
    if saved:
        change = findings.mean_change(effect.change for effect in saved)
        verb = "saves" if change < 0 else "costs"
        _write(panel, f"{test} {verb} {abs(change):.1%}", points[worst], height, 9, "left")


def _write(panel, text: str, x: float, height: int, offset: int, side: str) -> None:
    style = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 9}
    style["bbox"] = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    panel.annotate(text, (x, height), (offset, 0), **style)


def _finish(panel, table: Table, test: str, lanes: Sequence[tuple[str, str]]) -> None:
    dense = table.dense.mean(test) if table.dense else None
    named = test
    if dense is not None and math.isfinite(dense):
        panel.axvline(dense, color=GREY, linestyle="--", linewidth=1.2)
        named = f"{test} (dense {dense:.4g})"
    panel.set_title(f"measured on {named}", fontsize=11)
    panel.set_xscale("log")
    panel.set_xlabel("perplexity per token (log scale; +%: over dense)")
    panel.set_yticks(range(len(lanes)), [f"{method} {setting}" for setting, method in lanes])
    panel.set_ylim(len(lanes) - 0.4, -0.6)
    low, high = panel.get_xlim()
    room = high / low
    panel.set_xlim(low / room**0.14, high * room**0.38)  # for the figures beside the marks
    plot_style.open_axes(panel)
    plot_style.log_ticks(panel.xaxis)


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
