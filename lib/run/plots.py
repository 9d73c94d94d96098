"""All pictures, in one style; matplotlib is imported only where something is drawn.

The colours of lines are Okabe and Ito's, those of heat maps matplotlib's `cividis` and `PuOr_r`:
both are told apart by the colour-blind. The tables are those of lib/commands/report.py.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.run.results import NONE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from pandas import DataFrame

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#555555"
DOTS_PER_INCH = 150
CHARACTERS_PER_INCH = 10  # of a title at its size
PANELS_IN_A_ROW = 4
WIDEST = 20.0  # inches
STRICTNESS = ("unstructured", "4:8", "2:4", "neurons")  # the order of sparsity types
MOST_FIGURES = 400  # in the cells of a heat map


def can_draw() -> bool:
    """Return whether matplotlib is installed; where not, a line on stderr says so."""
    installed = find_spec("matplotlib") is not None
    if not installed:
        print("no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return installed


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG; the same figures give the same bytes."""
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path


def set_title(figure: Figure, text: str) -> None:
    """Set the title of a figure, wrapped to its width into lines of similar length."""
    columns = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    lines = textwrap.wrap(text, columns)
    while len(narrower := textwrap.wrap(text, columns - 1)) == len(lines) and columns > 20:
        lines, columns = narrower, columns - 1
    figure.suptitle("\n".join(lines), fontsize=12, fontweight="bold")


def open_axes(axes: Axes) -> None:
    """Replace the box around the data by a light grid behind them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def log_ticks(axis: Axis) -> None:
    """Put about five plain numbers on a logarithmic axis, however wide its range is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    if high / low < 4:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def heat_map(
    axes: Axes,
    cells: DataFrame,
    form: str,
    *,
    size: float = 9,
    **options: Any,
) -> AxesImage:
    """Draw a table as a heat map with its figures in format `form`; nan stays blank.

    `options` are imshow's. Returns the image, for a colour bar.
    """
    image = axes.imshow(cells.to_numpy(float), aspect="auto", **options)
    long = max(len(str(name)) for name in cells.columns) > 4
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(range(cells.shape[1]), cells.columns, **slanted)
    axes.set_yticks(range(cells.shape[0]), cells.index)
    for row, line in enumerate(cells.to_numpy(float)) if cells.size <= MOST_FIGURES else ():
        for column, value in enumerate(line):
            if math.isnan(value):
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            look = {"color": "white" if dark else "black", "fontsize": size}
            axes.text(column, row, format(value, form), ha="center", va="center", **look)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def pick(options: Sequence[Any], index: int) -> Any:
    """Return the option of the index-th series, of any number of series."""
    return options[index % len(options)]


def calibrations(table: DataFrame) -> list[str]:
    """Return the texts calibrated on: the test sets in their order, then others, `none` last."""
    labels = set(table.loc[table["type"] != "dense", "calibrated_on"])
    first = [name for name in dict.fromkeys(table["measured_on"]) if name in labels]
    return first + sorted(labels - set(first), key=lambda label: (label == NONE, label))


def targets(table: DataFrame) -> list[str]:
    """Return the types of a table, unstructured ratios first, each from loose to strict."""
    order = table["kind"].map({kind: place for place, kind in enumerate(STRICTNESS)}).fillna(-1)
    lines = table.assign(order=order).sort_values(["order", "ratio"], kind="stable")
    return list(dict.fromkeys(lines["type"]))


def calibration_style(labels: Sequence[str], label: str) -> dict[str, Any]:
    """Return colour and line of a calibration text; no two of the first 36 have both alike."""
    if label == NONE:
        return {"color": "black", "linestyle": ":"}
    index = labels.index(label)
    return {"color": pick(COLOURS, index), "linestyle": pick(LINES, index + index // len(COLOURS))}


def model_name(table: DataFrame) -> str:
    return Path(table["model"].iloc[0]).name


def _grid(figure: Figure, count: int, **options: Any) -> list[Axes]:
    """Return `count` axes, PANELS_IN_A_ROW in a row."""
    columns = min(count, PANELS_IN_A_ROW)
    panels = figure.subplots(math.ceil(count / columns), columns, squeeze=False, **options)
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    return list(panels.flat[:count])


def perplexity_by_sparsity(table: DataFrame) -> Figure | None:
    """Draw axes for each test set, with a place on the x axis for each sparsity and type.

    Methods differ by their marks, calibration texts by colour and by their place beside each other;
    unstructured ratios are joined by lines, dense is dashed. None where nothing was pruned.
    """
    if "perplexity" not in table:
        return None
    pruned = table[(table["type"] != "dense") & table["perplexity"].map(math.isfinite)]
    if pruned.empty:
        return None
    tests, labels, places = (
        list(dict.fromkeys(table["measured_on"])),
        calibrations(table),
        targets(pruned),
    )
    methods = list(dict.fromkeys(pruned["method"]))
    columns, rows = min(len(tests), PANELS_IN_A_ROW), math.ceil(len(tests) / PANELS_IN_A_ROW)
    figure = new_figure(max(7.5, 4.4 * columns), 1.2 + 4.2 * rows)
    panels = _grid(figure, len(tests))
    for axes, test in zip(panels, tests, strict=True):
        here = pruned[pruned["measured_on"] == test]
        keys = [here["method"], here["calibrated_on"], here["kind"] == "unstructured"]
        for (method, label, has_line), line in here.groupby(keys, sort=False):
            style = calibration_style(labels, label)
            style["linestyle"] = style["linestyle"] if has_line else "none"
            beside = 0.7 * ((labels.index(label) + 0.5) / len(labels) - 0.5)
            line = line.sort_values("ratio")
            spread = line["perplexity_deviation"]
            axes.errorbar(
                [places.index(target) + beside for target in line["type"]],
                line["perplexity"],
                yerr=spread if spread.notna().any() else None,
                marker=pick(MARKERS, methods.index(method)),
                markersize=6,
                capsize=2,
                elinewidth=1,
                linewidth=1,
                **style,
            )
        _mark_dense(axes, table, test)
        axes.set_yscale("log")
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xticks(range(len(places)), [place.replace(" ", "\n") for place in places])
        axes.margins(y=0.08)
        axes.set_xlabel("weights pruned")
        open_axes(axes)
        log_ticks(axes.yaxis)
    for axes in panels[::PANELS_IN_A_ROW]:
        axes.set_ylabel("perplexity per token (log scale)")
    handles = _legend(table, labels, methods)
    figure.legend(handles=handles, loc="outside lower center", ncols=2 + columns)
    set_title(figure, f"{model_name(table)}: perplexity by sparsity")
    return figure


def _mark_dense(axes: Axes, table: DataFrame, test: str) -> None:
    """Set the title to the test set, and draw the dense model's perplexity as a line."""
    title = f"measured on {test}"
    dense = table[(table["type"] == "dense") & (table["measured_on"] == test)]["perplexity"]
    if len(dense) and math.isfinite(dense.iloc[0]):
        axes.axhline(dense.iloc[0], color=GREY, linestyle="--", linewidth=1.2)
        title += f" (dense {dense.iloc[0]:,.4g})"
    axes.set_title(title, fontsize=11)


def _legend(table: DataFrame, labels: Sequence[str], methods: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    for label in labels:
        text = "no calibration" if label == NONE else f"calibrated on {label}"
        handles.append(Line2D([], [], lw=2, label=text, **calibration_style(labels, label)))
    mark = {"color": GREY, "linestyle": "none", "markersize": 7}
    for index, method in enumerate(methods):
        handles.append(Line2D([], [], marker=pick(MARKERS, index), label=method, **mark))
    if (table["type"] == "dense").any():
        handles.append(Line2D([], [], color=GREY, ls="--", label="dense"))
    return handles


def cross_language(table: DataFrame) -> Figure | None:
    """Draw the rise over dense in percent, calibrated on (rows) x measured on (columns).

    Each type and method has axes of its own; their colours have one logarithmic scale. None where
    fewer than two texts were calibrated on, or without a dense run.
    """
    from matplotlib.colors import LogNorm

    rows = table[(table["type"] != "dense") & (table["calibrated_on"] != NONE)]
    labels = [label for label in calibrations(table) if label != NONE]
    if "rise" not in table or len(labels) < 2:
        return None
    rows = rows[rows["rise"].map(math.isfinite)]
    if rows.empty:
        return None
    tests = [test for test in dict.fromkeys(table["measured_on"]) if test in set(rows.measured_on)]
    methods = list(dict.fromkeys(rows["method"]))
    groups = [
        (f"{method} {target}", group)
        for target in targets(rows)
        for method in methods
        if len(group := rows[(rows["type"] == target) & (rows["method"] == method)])
    ]
    width, height = 1.0 + 0.62 * max(3, len(tests)), 1.2 + 0.42 * max(3, len(labels))
    columns = max(1, min(len(methods), PANELS_IN_A_ROW, int(WIDEST / width)))
    lines = math.ceil(len(groups) / columns)
    figure = new_figure(max(6.5, 1.2 + columns * width), 0.8 + lines * height)
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    percents = (100 * rows["rise"]).clip(lower=0.1)
    norm = LogNorm(percents.min() / 1.05, percents.max() * 1.05, clip=True)
    for panel, (title, group) in zip(panels.flat, groups, strict=False):
        cells = group.pivot_table("rise", "calibrated_on", "measured_on", sort=False)
        cells = 100 * cells.reindex(index=labels, columns=tests)
        form = "+,.0f" if cells.max(axis=None) >= 99.5 else "+.1f"
        small = 7.5 if len(tests) > 6 else 9
        image = heat_map(panel, cells, form, size=small, norm=norm, cmap="cividis")
        panel.set_title(title, fontsize=10)
        panel.set_ylabel("calibrated on")
        panel.set_xlabel("measured on")
    bar = figure.colorbar(image, ax=panels, aspect=40, label="perplexity over dense, % (log scale)")
    log_ticks(bar.ax.yaxis)
    set_title(figure, f"{model_name(table)}: rise of perplexity, by calibration and test text")
    return figure


def bytes_against_bits(table: DataFrame) -> Figure | None:
    """Draw the saved models of a table by their bytes, and by bits per byte of its first test set.

    Of models for several languages, those calibrated on that set's. None for fewer than two.
    """
    if "saved_bytes" not in table or "bits_per_byte" not in table:
        return None
    test = table["measured_on"].iloc[0]
    here = table[table["measured_on"] == test]
    saved = here[here["saved_bytes"].notna()]
    own = saved[saved["calibrated_on"].isin([test, NONE])]
    points = []
    for _, row in (saved if own.empty else own).iterrows():
        bits = row.get("bits", math.nan)
        label = row["type"] + (f", {bits:.0f} bits" if bits is not None and bits > 0 else "")
        points.append((row["method"], label, row["saved_bytes"], row["bits_per_byte"]))
    if len(points) < 2:
        return None
    dense = here[here["type"] == "dense"]["bits_per_byte"]
    title = f"{model_name(table)}: bytes against bits per byte of {test}"
    return frontier(points, title, dense=None if dense.empty else dense.iloc[0])


def frontier(
    points: Sequence[tuple[str, str, float, float]],
    title: str,
    dense: float | None = None,
) -> Figure:
    """Draw models (series, label, bytes, bits per byte), a line for each series.

    `dense`: the dense model's bits per byte, a dashed line.
    """
    figure = new_figure(8.5, 5.6)
    axes = figure.subplots()
    for index, series in enumerate(dict.fromkeys(point[0] for point in points)):
        its = [point[1:] for point in points if point[0] == series]
        its.sort(key=lambda point: point[1])
        look = {"color": pick(COLOURS, index), "marker": pick(MARKERS, index), "label": series}
        axes.plot([size / 1e6 for _, size, _ in its], [bits for *_, bits in its], ls=":", **look)
        for label, size, bits in its:
            offset = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(label, (size / 1e6, bits), **offset)
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.2, label="dense")
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel("MB saved (log scale)")
    axes.set_ylabel("bits per byte of test text, lower is better")
    axes.legend(fontsize=9)
    open_axes(axes)
    log_ticks(axes.xaxis)
    set_title(figure, title)
    return figure


def recovery_curve(results: Mapping[str, Any]) -> Figure:
    """Draw perplexity against tokens trained on: of training text held out, and of each test set.

    Dense perplexities are dashed lines.
    """
    recovery, after = results["recovery"], results["perplexity"]
    count = 1 + len(after)
    columns, rows = min(count, PANELS_IN_A_ROW), math.ceil(count / PANELS_IN_A_ROW)
    figure = new_figure(max(8.0, 4.2 * columns), 0.4 + 3.8 * rows)
    panels = _grid(figure, count)
    points = [(point["tokens"], point["perplexity"]) for point in recovery["curve"]]
    _curve(panels[0], "training text, held out", points, recovery["held_out"]["dense"], 0)
    for axes, (name, value) in zip(panels[1:], after.items(), strict=True):
        points = [(0, recovery["before"][name]), (recovery["tokens"], value)]
        _curve(axes, f"measured on {name}", points, recovery["dense"][name], 1)
    for axes in panels[::PANELS_IN_A_ROW]:
        axes.set_ylabel("perplexity per token (log scale)")
    set_title(figure, f"{Path(results['model']).name}, {results['method']}: recovery by training")
    return figure


def _curve(
    axes: Axes, name: str, points: Sequence[tuple[int, float]], dense: float, style: int
) -> None:
    """Draw a curve, or (style 1) two points and a dotted line between them."""
    from matplotlib.ticker import MaxNLocator

    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    look = {"color": COLOURS[style], "marker": MARKERS[style], "markersize": 8, "mec": "white"}
    axes.plot([x for x, _ in finite], [y for _, y in finite], ls="-:"[style], lw=2, **look)
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.2)
        name += f"\n(dense {dense:,.4g})"
    axes.set_title(name, fontsize=11)
    axes.set_yscale("log")
    axes.set_xlabel("tokens trained on")
    axes.margins(x=0.3, y=0.12)
    open_axes(axes)
    log_ticks(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 0 else "")
    for (x, y), side in zip((*finite[:1], *finite[-1:]), ("right", "left"), strict=False):
        offset = (-9 if side == "right" else 9, 0)
        text = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 9}
        axes.annotate(f"{y:,.4g}", (x, y), offset, color=COLOURS[style], **text)


def overlap(cells: DataFrame, title: str, label: str, *, difference: bool = False) -> Figure:
    """Draw what masks share, in percent: blocks (rows) x linears or pairs (columns).

    `label` is that of the colour bar. A `difference`, in points, has colours around zero.
    """
    figure = new_figure(max(6.5, 2.6 + 0.65 * cells.shape[1]), 2.8 + 0.28 * len(cells))
    axes = figure.subplots()
    reach = max(1e-6, cells.abs().max(axis=None))
    scale = {"vmin": -reach, "vmax": reach, "cmap": "PuOr_r"} if difference else {"cmap": "cividis"}
    image = heat_map(axes, cells, "+.1f" if difference else ".0f", size=8, **scale)
    axes.set_ylabel("block")
    figure.colorbar(image, ax=axes, label=label)
    set_title(figure, title)
    return figure
