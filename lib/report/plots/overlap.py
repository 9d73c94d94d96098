"""The picture of a mask comparison: block by linear, what is shared and what the language makes."""

from __future__ import annotations

from pathlib import Path

from lib.report.comparison import Comparison
from lib.report.plots import style as plot_style
from lib.report.plots.heatmaps import blocks_by_linear


def draw(found: Comparison, path: Path) -> Path:
    """A heat map of what is shared, in percent; with a noise floor also of the seeds' and excess.

    What is shared has one colour scale; the excess, in points, has its own around zero.
    """
    cells = found.by(lambda where: where)
    blocks = sorted({block for block, _ in cells})
    linears = list(dict.fromkeys(linear for _, linear in cells))
    shares = {"between runs, % of kept": {w: c.between.shared for w, c in cells.items()}}
    excess = None
    if found.noise:
        shares["between seeds, % of kept"] = {w: c.noise for w, c in cells.items()}
        excess = {where: cell.excess for where, cell in cells.items()}
    count = len(shares) + (excess is not None)
    width = 1.4 + count * max(2.6, 0.62 * len(linears) + 0.5)
    picture = plot_style.figure(max(7.0, width), 2.6 + 0.28 * len(blocks))
    panels = picture.subplots(1, count, squeeze=False)[0]
    values = [100 * value for panel in shares.values() for value in panel.values()]
    scale = {"vmin": min(values), "vmax": max(values), "cmap": "cividis"}
    for panel, (title, placed) in zip(panels, shares.items(), strict=False):
        image = blocks_by_linear(panel, placed, blocks, linears, text=lambda v: f"{v:.0f}", **scale)
        panel.set_title(title, fontsize=10)
    picture.colorbar(image, ax=list(panels[: len(shares)]), label="kept by both masks, %")
    if excess is not None:
        reach = 100 * max(1e-6, *map(abs, excess.values()))
        scale = {"vmin": -reach, "vmax": reach, "cmap": "PuOr_r"}
        image = blocks_by_linear(
            panels[-1], excess, blocks, linears, text=lambda v: f"{v:+.1f}", **scale
        )
        panels[-1].set_title("seeds less runs, points", fontsize=10)
        picture.colorbar(image, ax=panels[-1], label="language-specific, points")
    plot_style.title(picture, found.title)
    return plot_style.save(picture, path)
