"""All pictures, in one style; matplotlib is imported only where something is drawn.

Their colours are told apart by the colour-blind. The tables are those of lib/commands/report.py.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy import ndenumerate

from lib.methods.sparsity import SMALLER
from lib.run.results import NONE

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from pandas import DataFrame

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "grid.color": "#DDDDDD",
}
PANELS_IN_A_ROW = 4
WIDEST = 13.0  # inches
STRICTNESS = ("unstructured", "4:8", "2:4", *SMALLER)  # the order of sparsity types


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG; the same figures give the same bytes."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _panels(
    title: str, count: int, columns: int, width: float, height: float
) -> tuple[Figure, list[Any]]:
    """Return a figure of no window and its axes, each of so many inches, `columns` in a row."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(count / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(7.0, columns * width), 0.8 + rows * height))
        panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in panels[count:]:
        panel.set_axis_off()
    lines = textwrap.fill(title, int(9 * figure.get_figwidth()))
    figure.suptitle(lines, fontsize=12, fontweight="bold")
    return figure, list(panels[:count])


def _log_ticks(axis: Axis) -> None:
    """Put plain numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    few = (1, 2, 5) if high / low < 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=range(1, 10) if high / low < 10 else few))
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_locator(NullLocator())


def _heat_map(axes: Any, cells: DataFrame, norm: Any) -> Any:
    """Draw a table with its figures; nan stays blank."""
    values = cells.to_numpy(float)
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    long = max(len(str(name)) for name in cells.columns) > 4
    axes.set_xticks(range(cells.shape[1]), cells.columns, **slanted if long else {})
    axes.set_yticks(range(cells.shape[0]), cells.index)
    form, size = "+.2f" if cells.max(axis=None) >= 0.1 else "+.3f", 7.5 if len(values.T) > 6 else 9
    for (row, column), value in ndenumerate(values):
        if math.isfinite(value):
            dark = sum(image.cmap(norm(value))[:3]) < 1.35
            look = {"color": "white" if dark else "black", "fontsize": size}
            axes.text(column, row, format(value, form), ha="center", va="center", **look)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def targets(table: DataFrame) -> list[str]:
    """Return the types of a table, unstructured ratios first, each from loose to strict."""
    order = table["kind"].map({kind: place for place, kind in enumerate(STRICTNESS)}).fillna(-1)
    lines = table.assign(order=order).sort_values(["order", "ratio"], kind="stable")
    return list(dict.fromkeys(lines["type"]))


def cross_language(table: DataFrame) -> Figure | None:
    """Draw bits per byte over the dense model's, calibrated on (rows) x measured on (columns).

    Unlike perplexities, they compare languages of different scripts. Each type and method has axes
    of its own, with a row for a method that reads no text; their colours have one logarithmic
    scale. None where fewer than two texts were calibrated on, or without a dense run.
    """
    import pandas
    from matplotlib.colors import LogNorm

    labels = set(table.loc[table["type"] != "dense", "calibrated_on"]) - {NONE}
    first = [name for name in dict.fromkeys(table["measured_on"]) if name in labels]
    labels = first + sorted(labels - set(first))  # in the order of the tests
    if "more_bits" not in table or len(labels) < 2:
        return None
    rows = table[table["more_bits"].map(math.isfinite)]
    without, rows = (rows[(rows["calibrated_on"] == NONE) == none] for none in (True, False))
    if rows.empty:
        return None
    tests = [test for test in dict.fromkeys(table["measured_on"]) if test in set(rows.measured_on)]
    groups = dict(list(rows.groupby(["type", "method"], sort=False)))
    names = [(t, m) for t in targets(rows) for m in dict.fromkeys(rows["method"])]
    names = [name for name in names if name in groups]
    width, height = 1.2 + 0.62 * max(3, len(tests)), 1.2 + 0.42 * max(3, len(labels))
    columns = max(1, min(rows["method"].nunique(), PANELS_IN_A_ROW, int(WIDEST / width)))
    title = Path(table["model"].iloc[0]).name
    title += ": bits per byte over dense, by calibration and test text"
    figure, panels = _panels(title, len(names), columns, width, height)
    shown = rows["more_bits"].clip(lower=1e-3)
    norm = LogNorm(shown.min() / 1.05, shown.max() * 1.05, clip=True)
    for axes, (kind, method) in zip(panels, names, strict=True):
        plain = without[without["type"] == kind].assign(calibrated_on="no text")
        own = pandas.concat([groups[kind, method], plain.drop_duplicates("measured_on")])
        cells = own.pivot_table("more_bits", "calibrated_on", "measured_on", sort=False)
        cells = cells.reindex(index=[*labels, *["no text"] * (len(plain) > 0)], columns=tests)
        cells = cells.dropna(how="all")
        cells.index = [n if len(n) < 25 else f"{n.count('+') + 1} mixed" for n in cells.index]
        image = _heat_map(axes, cells, norm)
        axes.set(title=f"{method} {kind}", ylabel="calibrated on", xlabel="measured on")
    bar = figure.colorbar(image, ax=panels, aspect=40, label="bits per byte over dense (log scale)")
    _log_ticks(bar.ax.yaxis)
    return figure


def recovery_curve(results: Mapping[str, Any]) -> Figure:
    """Draw the perplexity of training text held out against tokens trained on; dense is dashed."""
    recovery = results["recovery"]
    curve = [(point["tokens"], point["perplexity"]) for point in recovery["curve"]]
    points = [(x, y) for x, y in curve if y is not None and math.isfinite(y)]
    title = f"{Path(results['model']).name}, {results['method']}: recovery by training"
    figure, (axes,) = _panels(title, 1, 1, 4.2, 3.8)
    axes.plot(*zip(*points, strict=True), color="#0072B2", marker="o")
    axes.axhline(recovery["held_out"]["dense"], color="#555555", linestyle="--", label="dense")
    axes.set(xlabel="tokens trained on", yscale="log", ylabel="perplexity of text held out (log)")
    axes.legend()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _log_ticks(axes.yaxis)
    return figure
