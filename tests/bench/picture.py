"""Draw what each calibration text loses on each test text, by the runs of a sweep.

python tests/bench/picture.py OUT.png RUN [RUN ...]
"""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from lib.commands.report import DENSE, load_runs, tables
from lib.run.results import NONE
from lib.util.command import run
from lib.util.errors import UserError

WIDEST = 13.0  # inches of a picture


def picture(table: pandas.DataFrame) -> Figure | None:
    """Draw bits per byte over the dense model's, calibrated on (rows) x measured on (columns).

    Unlike perplexities, they compare languages of different scripts. Each type and method has axes
    of its own, with a row for a method that reads no text; their colors, which the color-blind tell
    apart, have one logarithmic scale. None where fewer than two texts were calibrated on, or
    without a dense run.
    """
    labels = set(table.loc[table["type"] != DENSE, "calibrated_on"]) - {NONE}
    first = [name for name in dict.fromkeys(table["measured_on"]) if name in labels]
    labels = first + sorted(labels - set(first))  # in the order of the tests
    if "more_bits" not in table or len(labels) < 2:
        return None
    rows = table[table["more_bits"].map(math.isfinite)]
    without, rows = (rows[(rows["calibrated_on"] == NONE) == none] for none in (True, False))
    if rows.empty:
        return None
    tests = list(dict.fromkeys(rows["measured_on"]))
    types = list(rows.sort_values(["strictness", "ratio"])["type"].unique())
    groups = dict(list(rows.groupby(["type", "method"], sort=False)))
    width, height = 1.2 + 0.62 * max(3, len(tests)), 1.2 + 0.42 * max(3, len(labels))
    columns = max(1, min(rows["method"].nunique(), int(WIDEST / width)))
    lines = math.ceil(len(groups) / columns)
    size = max(7.0, columns * width), 0.8 + lines * height
    figure = Figure(figsize=size, layout="constrained")
    title = f"{Path(table['model'].iloc[0]).name}: bits per byte over dense, by calibration and "
    title = textwrap.fill(f"{title}test text", int(9 * size[0]))
    figure.suptitle(title, fontsize=12, fontweight="bold")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    shown = rows["more_bits"].clip(lower=1e-3)
    norm = LogNorm(shown.min() / 1.05, shown.max() * 1.05, clip=True)
    names = sorted(groups, key=lambda name: types.index(name[0]))
    for axes, (kind, method) in zip(panels, names, strict=False):
        plain = without[without["type"] == kind].assign(calibrated_on="no text")
        own = pandas.concat([groups[kind, method], plain.drop_duplicates("measured_on")])
        cells = own.pivot_table("more_bits", "calibrated_on", "measured_on", sort=False)
        cells = cells.reindex(index=[*labels, *["no text"] * (len(plain) > 0)], columns=tests)
        cells = cells.dropna(how="all")
        cells.index = [n if len(n) < 25 else f"{n.count('+') + 1} mixed" for n in cells.index]
        image = _heat_map(axes, cells, norm)
        axes.set_title(f"{method} {kind}", fontsize=10)
        axes.set(ylabel="calibrated on", xlabel="measured on")
    scale = dict(ticks=LogLocator(subs=(1, 2, 5)), format="{x:,.10g}")
    about = "bits per byte over dense (log scale)"
    figure.colorbar(image, ax=panels, aspect=40, label=about, **scale).minorticks_off()
    return figure


def _heat_map(axes: Any, cells: pandas.DataFrame, norm: Any) -> Any:
    """Draw a table with its figures; nan stays blank."""
    values = cells.to_numpy(float)
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    long = max(len(str(name)) for name in cells.columns) > 4
    axes.set_xticks(range(cells.shape[1]), cells.columns, **slanted if long else {})
    axes.set_yticks(range(cells.shape[0]), cells.index)
    form, size = "+.2f" if cells.max(axis=None) >= 0.1 else "+.3f", 7.5 if len(values.T) > 6 else 9
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if math.isfinite(value):
                dark = sum(image.cmap(norm(value))[:3]) < 1.35
                look = {"color": "white" if dark else "black", "fontsize": size}
                axes.text(column, row, format(value, form), ha="center", va="center", **look)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def main(argv: list[str]) -> None:
    out, *runs = argv
    (table,) = tables(load_runs(runs))  # of one model
    if not (figure := picture(table)):
        raise UserError("RUN: no dense run, or fewer than two calibration texts")
    figure.savefig(out, dpi=150, metadata={"Software": None})  # the same figures, the same bytes


if __name__ == "__main__":
    sys.exit(run(main))
