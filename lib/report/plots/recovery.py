"""Perplexity against the tokens that a pruned model was trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lib.report.plots import style as plot_style
from lib.report.plots.style import COLOURS, GREY, MARKERS
from lib.report.results import NEURONS, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 4.2  # inches


def recovery_curve(results: Results) -> Figure:
    """Draw the curve on training text held out, and each test set before and after, in panels.

    Dense perplexities are dashed lines.
    """
    recovery, after = results["recovery"], results["perplexity"]
    figure = plot_style.figure(max(8.0, PANEL * (1 + len(after))), 4.2)
    panels = figure.subplots(1, 1 + len(after))
    points = [(point["tokens"], point["perplexity"]) for point in recovery["curve"]]
    _panel(panels[0], "training text, held out", points, recovery["held_out"]["dense"], 0)
    for axes, (name, value) in zip(panels[1:], after.items(), strict=True):
        points = [(0, recovery["before"][name]), (recovery["tokens"], value)]
        _panel(axes, f"measured on {name}", points, recovery["dense"][name], 1)
    panels[0].set_ylabel("perplexity per token (log scale)")
    for axes in panels:
        axes.set_xlabel("tokens trained on")
    plot_style.title(
        figure,
        f"{Path(results['model']).name}, {_method_and_target(results)}: recovery by training",
    )
    return figure


def _method_and_target(results: Results) -> str:
    method, kind = results["method"], results["sparsity_type"]
    if kind is None:
        return method
    share = f"{100 * results['sparsity_ratio']:g}%"
    targets = {"unstructured": share, NEURONS: f"{share} {NEURONS}"}
    return f"{method} {targets.get(kind, kind)}"


def _panel(axes, name: str, points: list[tuple[int, float]], dense: float, style: int) -> None:
    """Draw a curve, or (style 1) two points and a dotted line between them."""
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    look = {"color": COLOURS[style], "marker": MARKERS[style], "markersize": 8, "mec": "white"}
    axes.plot(*zip(*finite, strict=True), linestyle=("-", ":")[style], linewidth=2, **look)
    axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_title(f"{name}\n(dense {dense:,.4g})", fontsize=11)
    axes.set_yscale("log")
    axes.margins(x=0.3, y=0.12)
    plot_style.open_axes(axes)
    plot_style.log_ticks(axes.yaxis)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 0 else "")
    for (x, y), side in zip((finite[0], finite[-1]), ("right", "left"), strict=True):
        offset = (-9 if side == "right" else 9, 0)
        text = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 9}
        axes.annotate(f"{y:,.4g}", (x, y), offset, color=COLOURS[style], **text)


def _few_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)
