"""What recovery gives back: perplexity against the tokens that the pruned model was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.report.plots import style as plot_style
from lib.report.plots.style import COLOURS, GREY, MARKERS

PANEL = 4.2  # inches


def recovery_curve(results: Mapping[str, Any], path: Path) -> Path:
    """The run's curve on training text held out, and each test set before and after, in panels.

    Dense perplexities are dashed lines.
    """
    recovery, after = results["recovery"], results["perplexity"]
    picture = plot_style.figure(max(8.0, PANEL * (1 + len(after))), 4.2)
    panels = picture.subplots(1, 1 + len(after))
    points = [(one["tokens"], one["perplexity"]) for one in recovery["curve"]]
    _panel(panels[0], "training text, held out", points, recovery["held_out"]["dense"], 0)
    for panel, (name, value) in zip(panels[1:], after.items(), strict=True):
        points = [(0, recovery["before"][name]), (recovery["tokens"], value)]
        _panel(panel, f"measured on {name}", points, recovery["dense"][name], 1)
    panels[0].set_ylabel("perplexity per token (log scale)")
    for panel in panels:
        panel.set_xlabel("tokens trained on")
    plot_style.title(picture, f"{Path(results['model']).name}, {_what(results)}: recovery")
    return plot_style.save(picture, path)


def _what(results: Mapping[str, Any]) -> str:
    method, kind = results["method"], results["sparsity_type"]
    if kind is None:
        return method
    share = f"{100 * results['sparsity_ratio']:g}%"
    return f"{method} {share if kind == 'unstructured' else kind}"


def _panel(axes, name: str, points: list[tuple[int, float]], dense: float, style: int) -> None:
    """A curve, or, where only two points are known, these and a faint line between them."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    look = {"color": COLOURS[style], "marker": MARKERS[style], "markersize": 8, "mec": "white"}
    axes.plot(*zip(*known, strict=True), linestyle=("-", ":")[style], linewidth=2, **look)
    axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.2)
    axes.set_title(f"{name}\n(dense {dense:,.4g})", fontsize=11)
    axes.set_yscale("log")
    axes.margins(x=0.3, y=0.12)
    plot_style.open_axes(axes)
    plot_style.log_ticks(axes.yaxis)
    axes.xaxis.set_major_locator(_few())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 0 else "")
    for (x, y), side in zip((known[0], known[-1]), ("right", "left"), strict=True):
        offset = (-9 if side == "right" else 9, 0)
        text = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 9}
        axes.annotate(f"{y:,.4g}", (x, y), offset, color=COLOURS[style], **text)


def _few():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)
