"""Shared by all pictures: colours for the colour-blind, titles that fit, axes, files.

matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lib.report.results import NONE
from lib.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design (2008); yellow is left out, it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
BLACK = "#000000"
GREY = "#555555"
DOTS_PER_INCH = 150
CHARACTERS_PER_INCH = 10.0  # of a title at its size
PANEL_CHARACTERS = 44  # in the title of a panel about 4.5 inches wide


def can_draw() -> bool:
    """Whether matplotlib is installed; where not, a line on stderr says so."""
    installed = find_spec("matplotlib") is not None
    if not installed:
        print("no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return installed


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def title(figure: Figure, text: str) -> None:
    """Set the title of a figure, wrapped to its width into lines of similar length."""
    columns = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    lines = textwrap.wrap(text, columns)
    while len(narrower := textwrap.wrap(text, columns - 1)) == len(lines) and columns > 20:
        lines, columns = narrower, columns - 1
    figure.suptitle("\n".join(lines), fontsize=12, fontweight="bold")


def pick(options: tuple, index: int):
    """The option for the index-th series, of any number."""
    return options[index % len(options)]


def calibration_style(labels: Sequence[str], label: str) -> tuple[str, object, str]:
    """Colour, line and marker of a calibration set; black where there is none."""
    if label == NONE:
        return BLACK, ":", "X"
    index = labels.index(label)
    return pick(COLOURS, index), pick(LINES, index), pick(MARKERS, index)


def name_panel(panel: Axes, table: Table, test: str, draw_line: Callable) -> None:
    """Set the title of a panel to its test set, and draw the dense model by axhline or axvline."""
    dense = table.dense.mean(test) if table.dense else None
    text = f"measured on {test}"
    if dense is not None and math.isfinite(dense):
        draw_line(dense, color=GREY, linestyle="--", linewidth=1.2)
        value = f"dense {dense:,.0f}" if dense >= 1000 else f"dense {dense:.4g}"
        fits = len(text) + len(value) < PANEL_CHARACTERS
        text += f" ({value})" if fits else f"\n({value})"
    panel.set_title(text, fontsize=11)


def open_axes(axes: Axes) -> None:
    """Replace the box around the data by a light grid behind them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def log_ticks(axis) -> None:
    """Put about five plain numbers on a logarithmic axis, however wide its range is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    if high / low < 4:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the PNG; the same figures give the same bytes."""
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path
