"""Heat maps of a mask comparison by block and linear: what masks share, and the difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.report.comparison import Comparison
from lib.report.plots import style as plot_style
from lib.report.plots.heatmaps import blocks_by_linear

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mask_overlap(comparison: Comparison) -> Figure:
    """Draw the shared weights in percent; with a noise floor also those of the seeds, and excess.

    Shares have one colour scale; the excess, in points, has its own around zero.
    """
    cells = comparison.by(lambda key: key)
    blocks = sorted({block for block, _ in cells})
    linears = list(dict.fromkeys(linear for _, linear in cells))
    shares = {"between runs, % of kept": {key: cell.between.shared for key, cell in cells.items()}}
    excess = None
    if comparison.noise:
        shares["between seeds, % of kept"] = {key: cell.noise for key, cell in cells.items()}
        excess = {key: cell.excess for key, cell in cells.items()}
    count = len(shares) + (excess is not None)
    width = 1.4 + count * max(2.6, 0.62 * len(linears) + 0.5)
    figure = plot_style.figure(max(7.0, width), 2.6 + 0.28 * len(blocks))
    panels = figure.subplots(1, count, squeeze=False)[0]
    percents = [100 * value for panel in shares.values() for value in panel.values()]
    scale = {"vmin": min(percents), "vmax": max(percents), "cmap": "cividis"}
    for panel, (title, values) in zip(panels, shares.items(), strict=False):
        image = blocks_by_linear(panel, values, blocks, linears, text=lambda v: f"{v:.0f}", **scale)
        panel.set_title(title, fontsize=10)
    figure.colorbar(image, ax=list(panels[: len(shares)]), label="kept by both masks, %")
    if excess is not None:
        reach = 100 * max(1e-6, *map(abs, excess.values()))
        scale = {"vmin": -reach, "vmax": reach, "cmap": "PuOr_r"}
        image = blocks_by_linear(
            panels[-1], excess, blocks, linears, text=lambda v: f"{v:+.1f}", **scale
        )
        panels[-1].set_title("seeds minus runs, points", fontsize=10)
        figure.colorbar(image, ax=panels[-1], label="language-specific, points")
    plot_style.title(figure, comparison.title)
    return figure
