"""A bar for each model, a panel for each measure: what a compression gave and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.report.plots import style

ROW_INCHES, PANEL_INCHES = 0.5, 3.4


def draw_bars(
    names: Sequence[str], panels: Mapping[str, Sequence[float]], title: str, path: Path
) -> Path:
    """Write a picture in which each of `panels` shows one value for each of `names`."""
    picture = style.figure(PANEL_INCHES * len(panels) + 1, ROW_INCHES * len(names) + 1.6)
    axes = picture.subplots(1, len(panels), squeeze=False)[0]
    for index, (panel, (measure, values)) in enumerate(zip(axes, panels.items(), strict=True)):
        bars = panel.barh(range(len(names)), values, color=style.pick(style.COLOURS, index))
        panel.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3, fontsize=9)
        panel.set_yticks(range(len(names)), names if index == 0 else [""] * len(names))
        panel.invert_yaxis()
        panel.set_title(measure, fontsize=11)
        panel.margins(x=0.22)
        style.open_axes(panel)
    style.title(picture, title)
    return style.save(picture, path)
