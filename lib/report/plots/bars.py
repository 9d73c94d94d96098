"""A bar for each model, a panel for each measure: what a compression gave and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lib.report.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_INCHES, PANEL_INCHES = 0.5, 3.4


def bars(names: Sequence[str], panels: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draw `panels`, {measure: one value for each of `names`}, beside each other."""
    figure = style.figure(PANEL_INCHES * len(panels) + 1, ROW_INCHES * len(names) + 1.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for index, (panel, (measure, values)) in enumerate(zip(axes, panels.items(), strict=True)):
        drawn = panel.barh(range(len(names)), values, color=style.pick(style.COLOURS, index))
        panel.bar_label(drawn, [f"{value:,.4g}" for value in values], padding=3, fontsize=9)
        panel.set_yticks(range(len(names)), names if index == 0 else [""] * len(names))
        panel.invert_yaxis()
        panel.set_title(measure, fontsize=11)
        panel.margins(x=0.22)
        style.open_axes(panel)
    style.title(figure, title)
    return figure
