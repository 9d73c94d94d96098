"""Pictures of a report: loss by calibration and test text, curves over a flag, layer errors."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...run.results import NONE
from .table import DENSE, SETTING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

WIDEST = 13.0  # maximum width of a picture in inches
BARS = "bars: 95% intervals of KL and of the loss over the dense model's, over documents and seeds"


def picture(table: DataFrame) -> Figure | None:
    """Draw bits per byte over the dense model's, calibrated on (rows) x measured on (columns).

    Unlike perplexities, they compare languages with different scripts. Each type and method has its
    axes, with a row for methods that read no text. Colors have one logarithmic scale and suit the
    color-blind. Returns None with fewer than two calibration texts, or without a dense run.
    """
    import pandas
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

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
    groups = dict(list(rows.groupby(["strictness", "ratio", "type", "method"], dropna=False)))
    width, height = 1.2 + 0.62 * max(3, len(tests)), 1.2 + 0.42 * max(3, len(labels))
    columns = max(1, min(rows["method"].nunique(), int(WIDEST / width)))
    lines = math.ceil(len(groups) / columns)
    size = max(7.0, columns * width), 0.8 + lines * height
    figure = Figure(figsize=size, layout="constrained")
    title = f"{Path(table['model'].iloc[0]).name}: bits per byte over dense"
    title = textwrap.fill(title, int(9 * size[0]))
    figure.suptitle(title, fontsize=12, fontweight="bold")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    shown = rows["more_bits"].clip(lower=1e-3)
    norm = LogNorm(shown.min() / 1.05, shown.max() * 1.05, clip=True)
    for axes, ((*_, kind, method), group) in zip(panels, groups.items(), strict=False):
        plain = without[without["type"] == kind].assign(calibrated_on="no text")
        own = pandas.concat([group, plain.drop_duplicates("measured_on")])
        cells = own.pivot_table("more_bits", "calibrated_on", "measured_on", sort=False)
        cells = cells.reindex(index=[*labels, *["no text"] * (len(plain) > 0)], columns=tests)
        cells = cells.dropna(how="all")
        cells.index = [n if len(n) < 25 else f"{n.count('+') + 1} mixed" for n in cells.index]
        form = "+.2f" if cells.stack().median() >= 0.1 else "+.3f"
        image = heat_map(axes, cells, norm, form)
        axes.set_title(f"{method} {kind}", fontsize=10)
        axes.set(ylabel="calibrated on", xlabel="measured on")
    scale = dict(ticks=LogLocator(subs=(1, 2, 5)), format="{x:,.10g}")
    about = "bits per byte over dense (log scale)"
    figure.colorbar(image, ax=panels, aspect=40, label=about, **scale).minorticks_off()
    return figure


def heat_map(axes: Any, cells: DataFrame, norm: Any, form: str, cmap: str = "cividis") -> Any:
    """Draw a table with its figures in format `form`; nan stays blank."""
    values = cells.to_numpy(float)
    image = axes.imshow(values, aspect="auto", cmap=cmap, norm=norm)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    long = max(len(str(name)) for name in cells.columns) > 4
    axes.set_xticks(range(cells.shape[1]), cells.columns, **slanted if long else {})
    axes.set_yticks(range(cells.shape[0]), cells.index)
    size = 7.5 if len(values.T) > 6 else 9
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if math.isfinite(value):
                dark = sum(image.cmap(norm(value))[:3]) < 1.35
                look = {"color": "white" if dark else "black", "fontsize": size}
                axes.text(column, row, format(value, form), ha="center", va="center", **look)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def curves(table: DataFrame, keys: list[str]) -> dict[str, Figure]:
    """Draw perplexity and KL over each flag that has several numbers: {name of the flag: figure}.

    `keys`: the columns that tell rows apart; rows that differ in the flag alone are one line. Its
    bars are those of `statistics.add_intervals`.
    """
    import pandas
    from matplotlib.figure import Figure

    pruned = table[table["type"] != DENSE]
    figures = {}
    for flag in [name for name in keys if name.startswith(SETTING)] + ["ratio"]:
        others = [name for name in keys if name != flag]
        rows = pruned
        if flag == "ratio":  # of which the type is the name
            rows = rows[rows["strictness"] == 0]
            others.remove("type")
        rows = rows.assign(x=pandas.to_numeric(rows[flag], errors="coerce")).dropna(subset="x")
        by_line = rows.groupby([*others, "measured_on"], sort=False, dropna=False)["x"]
        rows = rows[by_line.transform("nunique") > 1]
        measures = [name for name in ("perplexity", "kl") if name in rows and rows[name].any()]
        if rows.empty or not measures:
            continue
        tests = list(dict.fromkeys(rows["measured_on"]))
        size = max(7.0, min(WIDEST, 4.2 * len(tests))), 0.6 + 3 * len(measures)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(measures), len(tests), squeeze=False, sharex=True)
        name = flag.removeprefix(SETTING)
        varied = [key for key in others if rows[key].nunique() > 1] or others[:1]
        wide = rows["x"].min() > 0 and rows["x"].max() >= 8 * rows["x"].min()
        for axes, (measure, test) in zip(panels.flat, product(measures, tests), strict=True):
            ends = [f"{measure}_low", f"{measure}_high"]
            for label, of_line in rows[rows["measured_on"] == test].groupby(varied, sort=False):
                of_line = of_line.sort_values("x")
                bars = of_line.reindex(columns=ends).sub(of_line[measure], axis=0).abs().fillna(0).T
                look = {"marker": "o", "markersize": 4, "capsize": 3}
                legend = " ".join(map(str, label))
                axes.errorbar(of_line["x"], of_line[measure], bars, label=legend, **look)
            if wide:
                axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(rows["x"].unique()), minor=False)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.minorticks_off()
            axes.set_title(str(test), fontsize=10)
            axes.grid(alpha=0.3)
            axes.set(ylabel={"kl": "KL, nats per token"}.get(measure, measure), xlabel=name)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        title = f"{Path(table['model'].iloc[0]).name}, over {name}"
        figure.suptitle(f"{title}\n{BARS}", fontsize=9)
        figures[name] = figure
    return figures


def layer_errors(
    table: DataFrame, keys: list[str], runs: Mapping[Path, dict[str, Any]]
) -> Figure | None:
    """Draw the relative squared errors of linear layers' outputs by depth, a panel for each kind.

    A line is a row of the table, told apart by `keys`: the mean over its seeds, and over experts.
    Returns None if no run in `runs` has errors.
    """
    import pandas
    from matplotlib.figure import Figure

    pruned = table[table["type"] != DENSE].drop_duplicates(keys)
    varied = [key for key in keys if pruned[key].nunique() > 1] or keys[:1]
    points = [
        (" ".join(str(row[key]) for key in varied), re.sub(r"\d+", "*", kind), int(block), error)
        for _, row in pruned.iterrows()
        for folder in row["runs"].values()
        for layer, error in (runs[folder].get("errors") or {}).items()
        for block, kind in re.findall(r"\.(\d+)\.(.+)", layer)[:1]
    ]
    if not points:
        return None
    lines = pandas.DataFrame(points, columns=["label", "kind", "block", "error"])
    names, kinds = (list(dict.fromkeys(lines[column])) for column in ("label", "kind"))
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    size = max(7.0, 3.2 * columns), 0.8 + 2.4 * rows
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(kinds) :]:
        axes.set_axis_off()
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for number, label in enumerate(names):  # in every panel, so that a look stays with its row
            line = lines[(lines["kind"] == kind) & (lines["label"] == label)]
            look = {"color": f"C{number}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            errors = line.groupby("block")["error"].mean()
            axes.plot(errors, marker="o", markersize=3, label=label, **look)
        axes.set_title(kind, fontsize=10)
        axes.set(yscale="log", xlabel="block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    title = f"{Path(table['model'].iloc[0]).name}: relative squared error of layer outputs"
    figure.suptitle(title, fontsize=11)
    return figure
