"""One table over many runs, and a picture of what each calibration text loses on each test.

    bash launch.sh report RUN [RUN ...] [--out FOLDER]

A RUN is a run's `--save` folder, or a folder that holds such folders. The table and the picture go
to report.md, unrounded figures to report.csv. The terminal gets a table of one figure for each test
set.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..methods.sparsity import SMALLER
from ..run.plan import PRUNED_BEFORE
from ..run.results import NONE, RESULTS, read_results
from ..util import command
from ..util.command import one_line
from ..util.errors import UserError
from ..util.files import check_writable, write_text
from ..util.markdown import EMPTY, padded_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

Runs = Mapping[Path, Mapping[str, Any]]  # {folder: results}
DENSE = "dense"  # the method and the type of a model that was not pruned
SETTING, TASK = "setting ", "task "  # what the columns of settings and of tasks begin with
STRICTNESS = ("unstructured", "4:8", "2:4", *SMALLER)  # the order of sparsity types
WIDEST = 13.0  # inches of a picture
WITH_COLUMN = "seed prune_method sparsity_type sparsity_ratio use_variant prune_on_c4 eval_only"
RUN_COLUMNS = {  # title: figure, format, unit
    "zeros": ("zeros", ".2%"),
    "seeds": ("seeds", ".0f"),
    "MB": ("saved_bytes", ",.1f", 1e6),
}
TEST_COLUMNS = {
    "perplexity": ("perplexity", ",.2f"),
    "s.e.": ("standard_error", ",.2f"),
    "rise": ("rise", "+,.1%"),
    "bits/byte": ("bits_per_byte", ".3f"),
    "KL": ("kl", ".3f"),
    "agreement": ("top1_agreement", ".1%"),
}
MEASURES = [name for name, _ in TEST_COLUMNS.values() if name != "rise"]
NOTES = {
    "MB": "MB: bytes of the saved model's files, in millions.",
    "perplexity": "Perplexity: lower is better; ± is the standard deviation over seeds.",
    "s.e.": "s.e.: standard error of the perplexity over the test windows, mean over seeds.",
    "rise": "rise: perplexity over the dense model's.",
    "KL": "KL: divergence from the dense model's predictions, in nats a token.",
    "agreement": "agreement: share of positions with the dense model's most likely token.",
    "bits/byte": "Bits per byte compare models of different tokenizers; perplexities do not.",
}


def load_runs(paths: Iterable[str | Path]) -> dict[Path, dict[str, Any]]:
    """Read the results of every run in the folders, or below them, in the order of their names.

    Raises UserError for a path that is no folder or holds no run, and for a results.json that
    can't be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"RUN {path}: no such folder; name a run's --save folder or its parent")
        files = [path / RESULTS] if (path / RESULTS).is_file() else sorted(path.rglob(RESULTS))
        if not files:
            raise UserError(f"RUN {path}: holds no {RESULTS}; name a run's --save folder")
        folders |= {file.parent.resolve(): file.parent for file in files}
    return {folder: read_results(folder) for folder in folders.values()}


def tables(runs: Runs) -> list[DataFrame]:
    """Return the tables of runs that may be compared: those of one model and vocabulary.

    A table has a line for each row and test set. Runs that differ in nothing but the seed are one
    row, with the means of their figures; of one seed twice, the first run counts. `rise` is the
    perplexity over the dense model's on the same test text, less one.
    """
    import pandas

    lines = [
        _run_columns(folder, results)
        | {"measured_on": test["name"]}
        | {"digest": (test.get("digest") or f"{test.get('source')} {test.get('tokens')}")[:8]}
        | {name: test.get(name) for name in MEASURES}
        for folder, results in runs.items()
        for test in results["evaluation"]
    ]
    if not lines:
        return []
    frame = pandas.DataFrame(lines).astype(dict.fromkeys([*MEASURES, "saved_bytes"], float))
    return [_summarised(model) for _, model in frame.groupby(["model", "vocabulary"], sort=False)]


def _run_columns(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that all lines of a run have in common."""
    kind, share = results.get("sparsity_type"), results.get("sparsity_ratio")
    zeros = (results.get("sparsity") or {}).get("overall")
    if share is None:
        share = (zeros or 0.0) if results["method"] == PRUNED_BEFORE else 0.0  # not rounding's
    names = {None: f"{share:.0%}" if share else "whole", "unstructured": f"{100 * share:g}%"}
    names |= {kind: f"{100 * share:g}% {kind}" for kind in SMALLER}
    vocabulary, rows = results.get("vocabulary") or {}, ""
    if vocabulary:
        rows = f"{vocabulary['rows']:,} of {vocabulary['rows_before']:,} rows of its vocabulary"
        rows += f" ({vocabulary.get('digest')})"
    text = results.get("calibration") or results.get("recovery", {}).get("text") or {}
    variant = " variant" if results.get("flags", {}).get("use_variant") else ""
    trained = "recovery" in results and results["method"] != "recovered"
    columns = {
        "folder": folder,
        "model": results["model"].rstrip("/"),
        "vocabulary": rows,
        "note": vocabulary.get("note"),
        "method": results["method"] + variant + (" + recovery" if trained else ""),
        "strictness": STRICTNESS.index(kind) if kind in STRICTNESS else -1,
        "type": DENSE if results["method"] == DENSE else names.get(kind, kind),
        "ratio": share,
        "calibrated_on": text.get("name") or NONE,
        "sources": ", ".join(source["source"] for source in text.get("sources", [])),
        "seed": results.get("seed") or 0,
        "zeros": zeros,
        "saved_bytes": results.get("saved_bytes"),
    }
    for name, value in results.get("fingerprint", {}).get("pruning", {}).items():
        if name.startswith("--") and name[2:] not in WITH_COLUMN.split() and value is not None:
            columns[SETTING + name[2:]] = str(value)
    for task, metrics in results.get("tasks", {}).items():
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        columns |= {f"{TASK}{task} {name}": float(value) for name, value in numbers.items()}
    return columns


def _keys(names: Iterable[str]) -> list[str]:
    return ["method", "type", "calibrated_on", *(n for n in names if n.startswith(SETTING))]


def _summarised(lines: DataFrame) -> DataFrame:
    """Average the runs of one model that differ in nothing but the seed."""
    pruned = lines[lines["type"] != DENSE]
    counts = (lines if pruned.empty else pruned).nunique()
    same = [name for name in lines if name.startswith(SETTING) and counts[name] < 2]
    lines = lines.drop(columns=same).dropna(axis="columns", how="all")
    keys = [*_keys(lines), "measured_on"]
    lines = lines.fillna(dict.fromkeys(keys, EMPTY))
    lines["measured_on"] = _unique_names(lines["measured_on"], lines["digest"])
    lines["calibrated_on"] = _unique_names(lines["calibrated_on"], lines["sources"])
    spread = {*MEASURES, *(name for name in lines if name.startswith(TASK))}
    means = [name for name in lines if name in spread | {"zeros", "saved_bytes"}]
    groups = lines.drop_duplicates([*keys, "seed"]).groupby(keys, sort=False)
    table = groups.first()
    table[means] = groups[means].mean()
    spread = [name for name in means if name in spread and "standard_error" not in name]
    table = table.join(groups[spread].std().add_suffix("_deviation"))
    table["seeds"] = groups["seed"].nunique()
    table["folders"] = groups["folder"].agg(lambda folders: " ".join(map(str, folders)))
    table = table.reset_index()
    is_dense = table["type"] == DENSE
    dense = table[is_dense].drop_duplicates("measured_on").set_index("measured_on")
    if "perplexity" in table:
        of_dense = dense.reindex(table["measured_on"]).reset_index()
        table["rise"] = (table["perplexity"] / of_dense["perplexity"] - 1).mask(is_dense)
        table["more_bits"] = (table["bits_per_byte"] - of_dense["bits_per_byte"]).mask(is_dense)
    tests = list(lines["measured_on"].unique())
    table = table.assign(pruned=~is_dense, test=table["measured_on"].map(tests.index))
    order = ["pruned", "method", "strictness", "ratio", *keys[1:-1], "test"]
    return table.sort_values(order, ignore_index=True).drop(columns=["pruned", "test"])


def _unique_names(names: Series, identities: Series) -> Series:
    """Return the names, with what tells them apart where one name is of several things."""
    several = identities.groupby(names).transform("nunique") > 1
    return names.where(~several, names + " (" + identities + ")")


def report_text(tables: Sequence[DataFrame], brief: bool = False) -> str:
    """Return all runs as Markdown: one table, or one for each model and vocabulary.

    `brief`: with one figure for each test set, for a terminal.
    """
    parts, titles = [], set()
    if len(tables) > 1:
        parts.append(
            f"**{len(tables)} tables, not to be compared with each other:** "
            "their runs are of different models or vocabularies."
        )
    for table in tables:
        columns = _columns(table, brief)
        titles |= {title.rpartition(" ")[2] for title in columns}
        tests = ", ".join(dict.fromkeys(table["measured_on"]))
        about = [table["model"][0], *filter(None, table["vocabulary"][:1]), f"measured on {tests}"]
        parts.append(f"### {one_line(', '.join(about))}")
        parts += list(table["note"][:1]) if "note" in table else []
        parts.append(padded_table(list(columns), list(zip(*columns.values(), strict=True)), left=3))
    parts.append("\n".join(f"- {note}" for title, note in NOTES.items() if title in titles))
    return "\n\n".join(part for part in parts if part) + "\n"


def _columns(table: DataFrame, brief: bool) -> dict[str, list[str]]:
    """Return {title: a cell for each row}; beyond the first three, only those with figures."""
    keys = _keys(table)
    rows = table.drop_duplicates(keys).set_index(keys, drop=False)
    named = {name.removeprefix(SETTING).replace("_", " "): list(rows[name]) for name in keys}
    columns = {title: _cells(rows, *of) for title, of in RUN_COLUMNS.items()}
    titles = list(TEST_COLUMNS)
    if "note" in table:  # perplexities fall with the number of tokens
        titles.insert(0, titles.pop(titles.index("bits/byte")))
    if brief:
        columns, titles = {}, titles[:1]
    for test in dict.fromkeys(table["measured_on"]):
        lines = table[table["measured_on"] == test].set_index(keys).reindex(rows.index)
        columns |= {f"{test} {title}": _cells(lines, *TEST_COLUMNS[title]) for title in titles}
    for name in table:
        if name.startswith(TASK) and not name.endswith("_deviation"):
            columns[name.removeprefix(TASK)] = _cells(rows, name, ".4f")
    return named | {title: cells for title, cells in columns.items() if set(cells) != {EMPTY}}


def _cells(lines: DataFrame, name: str, form: str, unit: float = 1) -> list[str]:
    """Return a figure of each line as text, `±` its deviation over seeds; `–` for none."""
    cells = []
    for _, line in lines.iterrows():
        value, spread = line.get(name), line.get(f"{name}_deviation", 0)
        text = EMPTY if value is None or value != value else format(value / unit, form)
        cells.append(text + (f" ± {format(spread, form)}" if spread > 0 else ""))
    return cells


def picture(table: DataFrame) -> Figure | None:
    """Draw bits per byte over the dense model's, calibrated on (rows) x measured on (columns).

    Unlike perplexities, they compare languages of different scripts. Each type and method has axes
    of its own, with a row for a method that reads no text; their colors, which the color-blind tell
    apart, have one logarithmic scale. None where fewer than two texts were calibrated on, or
    without a dense run.
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
    title = f"{Path(table['model'].iloc[0]).name}: bits per byte over dense, by calibration and "
    title = textwrap.fill(f"{title}test text", int(9 * size[0]))
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


def write_report(runs: Runs, out: Path) -> str:
    """Write report.md, report.csv and the picture into folder `out`; return brief tables."""
    import pandas

    out.mkdir(parents=True, exist_ok=True)
    by_model = tables(runs)
    parts = [report_text(by_model).strip()]
    for number, table in enumerate(by_model, 1):
        name = f"languages-{number}" if len(by_model) > 1 else "languages"
        if figure := picture(table):  # the same figures give the same bytes
            figure.savefig(out / f"{name}.png", dpi=150, metadata={"Software": None})
            parts.append(f"![{name}]({name}.png)")
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    frame = pandas.concat(by_model) if by_model else pandas.DataFrame()
    frame = frame.drop(columns=["folder", "strictness", "seed"], errors="ignore")
    short = {name: name.removeprefix(SETTING).removeprefix(TASK) for name in frame}
    write_text(out / "report.csv", frame.rename(columns=short).to_csv(index=False))
    return report_text(by_model, brief=True)


def main(argv: list[str]) -> None:
    parser = command.make_parser("report", __doc__)
    parser.add_argument("--out", default="report", help="folder for the files (default: report)")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of them")
    args = parser.parse_args(argv)
    check_writable("--out", args.out)
    print(write_report(load_runs(args.runs), Path(args.out)))
    print(f"wrote {args.out}/report.md", file=sys.stderr)
