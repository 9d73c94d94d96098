"""Write tables and pictures of finished runs, and test which differences are significant.
For researchers; the tables are also written for LaTeX.

    bash launch.sh report RUN [RUN ...] [--against dense] [--latex FILE] [--csv FILE] [--out FOLDER]

A RUN is a run's `--save` folder, or a folder of such folders. Tables and pictures go to report.md,
unrounded figures to report.csv, differences to differences.csv. The terminal shows one figure for
each test set.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations, product
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..methods.sparsity import SMALLER
from ..run.flags import named
from ..run.plan import PRUNED_BEFORE
from ..run.results import NONE, RESULTS, is_trained, read_losses, read_results
from ..run.significance import MeanInterval, holm, mean_interval
from ..util import command
from ..util.command import one_line
from ..util.errors import UserError, first_of
from ..util.files import check_writable, write_text
from ..util.markdown import EMPTY, padded_table
from .report_pictures import DENSE, SETTING, curves, layer_errors, picture

if TYPE_CHECKING:
    from numpy import ndarray
    from pandas import DataFrame, Series

Runs = Mapping[Path, Mapping[str, Any]]  # {folder: results}
Losses = Mapping[Path, Mapping[str, Mapping[str, "ndarray"]]]  # {folder: `read_losses`}
Columns = dict[tuple[str, str], list[str]]  # {(test set or "", title): a cell for each row}
TASK = "task "  # prefix of the columns of tasks
STRICTNESS = ("unstructured", "4:8", "2:4", *SMALLER)  # the order of sparsity types
COMPARED = {"loss": "perplexity", "kl": "kl"}  # {figure by window: column of the table}
LIMIT = 0.05  # of the corrected p; below it a difference is significant
NOT_SIGNIFICANT = "(n.s.)"
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
SIZES = "windows", "tokens", "compared_windows"  # sizes of a test set
NOTES = {
    "MB": "MB: bytes of the saved model's files, in millions.",
    "perplexity": "Perplexity: lower is better; ± is the standard deviation over seeds.",
    "s.e.": "s.e.: standard error of the perplexity over the test windows, mean over seeds.",
    "rise": "rise: perplexity increase over the dense model.",
    "KL": "KL: divergence from the dense model's predictions, in nats per token.",
    "agreement": "agreement: share of positions with the dense model's most likely token.",
    "bits/byte": "Bits per byte compare models with different tokenizers; perplexities do not.",
}
BOLD = "Bold: significantly the best of the rows that differ only in the calibration text."
DIFFERENCES = f"""\
Differences: of the loss or of KL from the dense model, in nats per token, paired by test window.
Brackets: 95% intervals, each by itself, over documents and seeds; with one seed for that draw only.
p is corrected by Holm's rule over the table. {NOT_SIGNIFICANT}: not significant, as p is {LIMIT} or
more, or the test has only one document.""".replace("\n", " ")
FITTED = "\\medskip\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
SHORT = f"differences of the loss, nats per token ({NOT_SIGNIFICANT}: not significant):"


def load_runs(paths: Iterable[str | Path]) -> dict[Path, dict[str, Any]]:
    """Read the results of every run in the folders, or below them, in the order of their names.

    Raises UserError for a path that is not a folder or has no run, and for an unreadable
    results.json.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"RUN {path}: no such folder exists. Name the --save folder of a run.")
        files = [path / RESULTS] if (path / RESULTS).is_file() else sorted(path.rglob(RESULTS))
        if not files:
            raise UserError(f"RUN {path}: no {RESULTS} is there. Name the --save folder of a run.")
        folders |= {file.parent.resolve(): file.parent for file in files}
    return {folder: read_results(folder) for folder in folders.values()}


def tables(runs: Runs) -> list[DataFrame]:
    """Return the tables of comparable runs: those of one model and vocabulary.

    A table has a line for each row and test set. Runs that differ only in the seed are one row,
    with the means of their figures; if a seed occurs twice, the first run counts. `rise` is the
    perplexity over the dense model's on the same test text, minus one.
    """
    import pandas

    lines = [
        _run_columns(folder, results)
        | {"measured_on": test["name"]}
        | {"digest": test.get("digest") or f"{test.get('source')} {test.get('tokens')}"}
        | {name: test.get(name) for name in (*MEASURES, *SIZES)}
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
        share = (zeros or 0.0) if results["method"] == PRUNED_BEFORE else 0.0  # rounding adds some
    names = {None: f"{share:.0%}" if share else "whole", "unstructured": f"{100 * share:g}%"}
    names |= {kind: f"{100 * share:g}% {kind}" for kind in SMALLER}
    vocabulary, rows = results.get("vocabulary") or {}, ""
    if vocabulary:
        rows = f"{vocabulary['rows']:,} of {vocabulary['rows_before']:,} rows of its vocabulary"
        rows += f" ({vocabulary.get('digest')})"
    text = results.get("calibration") or results.get("recovery", {}).get("text") or {}
    variant = " variant" if results.get("flags", {}).get("use_variant") else ""
    trained = is_trained(results) and results["method"] != "recovered"
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
    in_columns = named(has_column=True)
    for name, value in results.get("fingerprint", {}).get("pruning", {}).items():
        if name.startswith("--") and name[2:] not in in_columns and value is not None:
            columns[SETTING + name[2:]] = str(value)
    for task, metrics in results.get("tasks", {}).items():
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        columns |= {f"{TASK}{task} {name}": float(value) for name, value in numbers.items()}
    return columns


def _keys(names: Iterable[str]) -> list[str]:
    return ["method", "type", "calibrated_on", *(n for n in names if n.startswith(SETTING))]


def _summarised(lines: DataFrame) -> DataFrame:
    """Average the runs of one model that differ only in the seed."""
    import pandas

    pruned = lines[lines["type"] != DENSE]
    counts = (lines if pruned.empty else pruned).nunique()
    same = [name for name in lines if name.startswith(SETTING) and counts[name] < 2]
    lines = lines.drop(columns=same).dropna(axis="columns", how="all")
    keys = [*_keys(lines), "measured_on"]
    lines = lines.fillna(dict.fromkeys(keys, EMPTY))
    lines["measured_on"] = _unique_names(lines["measured_on"], lines["digest"].str[:8])
    lines["calibrated_on"] = _unique_names(lines["calibrated_on"], lines["sources"])
    sizes = "zeros", "saved_bytes"
    means = [name for name in lines if name in (*MEASURES, *sizes) or name.startswith(TASK)]
    groups = lines.drop_duplicates([*keys, "seed"]).groupby(keys, sort=False)
    table = groups.first()
    table[means] = groups[means].mean()
    spread = [name for name in means if name not in (*sizes, "standard_error")]
    table = table.join(groups[spread].std().add_suffix("_deviation"))
    table["seeds"] = groups["seed"].nunique()
    table["folders"] = groups["folder"].agg(lambda folders: " ".join(map(str, folders)))
    table["runs"] = groups[["seed", "folder"]].apply(lambda run: dict(run.values.tolist()))
    table = table.reset_index()
    is_dense = table["type"] == DENSE
    dense = table[is_dense].drop_duplicates("measured_on").set_index("measured_on")
    if "perplexity" in table:
        before = dense.reindex(table["measured_on"]).set_axis(table.index)
        table["rise"] = (table["perplexity"] / before["perplexity"] - 1).mask(is_dense)
        table["more_bits"] = (table["bits_per_byte"] - before["bits_per_byte"]).mask(is_dense)
    tests = list(lines["measured_on"].unique())
    table = table.assign(pruned=~is_dense, test=table["measured_on"].map(tests.index))
    order = ["pruned", "method", "strictness", "ratio", *keys[1:-1], "test"]

    def numbers(column: Series) -> Series:
        found = pandas.to_numeric(column, errors="coerce")
        return found if column.name in keys and found.notna().any() else column

    table = table.sort_values(order, ignore_index=True, key=numbers)
    return table.drop(columns=["pruned", "test"])


def _unique_names(names: Series, identities: Series) -> Series:
    """Return the names, with the identity added where several things have one name."""
    several = identities.groupby(names).transform("nunique") > 1
    return names.where(~several, names + " (" + identities + ")")


def paired(
    one: Series, other: Series | None, losses: Losses, figure: str
) -> tuple[ndarray, ndarray] | None:
    """Return a figure of one line minus that of another on the same windows, and their documents.

    Shapes: (seeds, windows), (windows,). Common seeds are paired; a model without a seed is paired
    with each. Returns None without a common seed, or without figures by window.
    """
    import numpy

    kept, common = [], None
    for line in (one,) if other is None else (one, other):
        of_runs = {seed: losses[run].get(line["digest"], {}) for seed, run in line["runs"].items()}
        kept.append({seed: of_run for seed, of_run in of_runs.items() if figure in of_run})
        if line["calibrated_on"] != NONE or len(kept[-1]) != 1:  # depends on the seed
            common = {*kept[-1]} if common is None else common & {*kept[-1]}
    seeds = sorted({*kept[0]} if common is None else common)
    if not seeds:
        return None
    each = [
        numpy.stack([of.get(seed, next(iter(of.values())))[figure] for seed in seeds]).astype(float)
        for of in kept
    ]
    values = each[0] - each[1] if len(each) > 1 else each[0]
    measured = numpy.isfinite(values).all(0)
    documents = next(iter(kept[0].values()))["document"]
    return (values[:, measured], documents[measured]) if measured.any() else None


def add_intervals(table: DataFrame, losses: Losses) -> None:
    """Add 95% intervals to a table of `tables`: perplexity_low, perplexity_high, kl_low, kl_high.

    That of a perplexity is of the loss minus the dense model's, if it is in the table: texts that
    are hard for both models do not widen it.
    """
    of_dense = table[table["type"] == DENSE].drop_duplicates("measured_on")
    dense = {line["measured_on"]: line for _, line in of_dense.iterrows()}
    for index, line in table.iterrows():
        over = dense.get(line["measured_on"]) if line["type"] != DENSE else None
        for figure, name in COMPARED.items():
            pair = paired(line, over if figure == "loss" else None, losses, figure)
            if pair is None or name not in table:
                continue
            found = mean_interval(*pair)
            for end in ("low", "high"):
                away = getattr(found, end) - found.mean
                value = line[name] * exp(away) if figure == "loss" else line[name] + away
                table.loc[index, f"{name}_{end}"] = value


def differences(
    table: DataFrame, losses: Losses, against: str | None = None
) -> tuple[DataFrame, list[str]]:
    """Compare rows on the same test windows; return a line for each pair, and why others have none.

    Rows that differ only in the calibration text are compared, and every row with that of
    `against`: `dense`, or a run's folder. `difference` is a row's figure minus the other's, with
    `low`, `high`, and `p` by Holm's rule over all lines. Adds columns perplexity_best and kl_best
    to `table`: whether a cell is significantly below all rows that differ only in the calibration
    text.
    """
    import pandas

    keys, lines = _keys(table), []
    problems: dict[str, list[str]] = defaultdict(list)
    by_row = table.reset_index().groupby(keys, sort=False)
    rows = [row.set_index("measured_on") for _, row in by_row]
    for one, other in combinations(rows, 2):
        if _is_named(one, against) > _is_named(other, against):  # the named one is subtracted
            one, other = other, one
        apart = [key for key in keys if one[key].iloc[0] != other[key].iloc[0]]
        texts = {one["calibrated_on"].iloc[0], other["calibrated_on"].iloc[0]}
        by_text = apart == ["calibrated_on"] and NONE not in texts
        if not by_text and _is_named(one, against) == _is_named(other, against):
            continue
        names = [_row_name(row.iloc[0], keys) for row in (one, other)]
        tests = [test for test in one.index if test in other.index]
        problem = None if tests else "no common test windows"
        for test, figure in product(tests, COMPARED):
            first, second = one.loc[test], other.loc[test]
            pair = paired(first, second, losses, figure)
            line = {"one": first["index"], "other": second["index"], "by_text": by_text}
            line |= {"measured_on": test, "figure": figure} | dict(first[keys])
            line |= {"minus": second["calibrated_on"] if by_text else names[1]}
            lines.append(line | (mean_interval(*pair)._asdict() if pair else {}))
            if pair is None and figure == "loss":
                problem = "no losses by window with a common seed"
        if problem:
            problems[problem].append(" minus ".join(names))
    reasons = [f"not compared, {reason}: {first_of(of)}" for reason, of in problems.items()]
    own = ["one", "other", "by_text"]
    columns = [*own, "measured_on", "figure", *keys, "minus", *MeanInterval._fields]
    frame = pandas.DataFrame(lines, columns=columns).rename(columns={"mean": "difference"})
    frame["p"] = holm(frame["p"])
    frame["significant"] = frame["p"] < LIMIT
    for figure, name in COMPARED.items():
        pairs = frame[frame["by_text"].astype(bool) & (frame["figure"] == figure)]
        apart = pairs["difference"].where(pairs["significant"], 0)
        beaten = {*pairs["one"][apart >= 0], *pairs["other"][apart <= 0]}
        table[f"{name}_best"] = table.index.isin({*pairs["one"], *pairs["other"]} - beaten)
    return frame.drop(columns=own).dropna(subset="difference"), reasons


def _row_name(row: Series, keys: Sequence[str]) -> str:
    return " ".join(dict.fromkeys(row[key] for key in keys if row[key] not in (NONE, EMPTY)))


def _is_named(row: DataFrame, against: str | None) -> bool:
    first = row.iloc[0]
    if against in (None, DENSE):
        return against == first["type"]
    return Path(against).resolve() in {folder.resolve() for folder in first["runs"].values()}


def report_text(tables: Sequence[DataFrame], brief: bool = False, more: Sequence[str] = ()) -> str:
    """Return all runs as Markdown: one table, or one for each model and vocabulary.

    `brief`: one figure for each test set, for a terminal. `more`: text after each table.
    """
    parts, titles = [], set()
    if len(tables) > 1:
        parts.append(
            f"**{len(tables)} tables, not to be compared with each other:** "
            "their runs are of different models or vocabularies."
        )
    for number, table in enumerate(tables):
        columns = _columns(table)
        if brief:
            left_out = {*RUN_COLUMNS, *TEST_COLUMNS} - {_titles(table)[0]}
            columns = {key: cells for key, cells in columns.items() if key[1] not in left_out}
        titles |= {title for _, title in columns}
        tests = ", ".join(dict.fromkeys(table["measured_on"]))
        about = [table["model"][0], *filter(None, table["vocabulary"][:1]), f"measured on {tests}"]
        parts.append(f"### {one_line(', '.join(about))}")
        parts += list(table["note"][:1]) if "note" in table else []
        parts += [_markdown(columns, 3), *more[number : number + 1]]
    parts.append("\n".join(f"- {note}" for title, note in NOTES.items() if title in titles))
    return "\n\n".join(part for part in parts if part) + "\n"


def _titles(table: DataFrame) -> list[str]:
    """Return the titles of a test set's columns: perplexity depends on the number of tokens."""
    return sorted(TEST_COLUMNS, key=lambda title: title != "bits/byte" and "note" in table)


def _columns(table: DataFrame) -> Columns:
    """Return the columns of a table in which there are figures."""
    keys = _keys(table)
    rows = table.drop_duplicates(keys).set_index(keys, drop=False)
    columns = {("", _title(name)): list(rows[name]) for name in keys}
    columns |= {("", title): _cells(rows, *of) for title, of in RUN_COLUMNS.items()}
    for test in dict.fromkeys(table["measured_on"]):
        lines = table[table["measured_on"] == test].set_index(keys).reindex(rows.index)
        columns |= {(test, title): _cells(lines, *TEST_COLUMNS[title]) for title in _titles(table)}
    tasks = (name for name in table if name.startswith(TASK) and not name.endswith("_deviation"))
    columns |= {("", name.removeprefix(TASK)): _cells(rows, name, ".4f") for name in tasks}
    return {key: cells for key, cells in columns.items() if set(cells) != {EMPTY}}


def _cells(lines: DataFrame, name: str, form: str, unit: float = 1) -> list[str]:
    """Return a figure of each line as text, `±` its deviation over seeds; `–` if missing.

    Significantly best figures are between `**`.
    """
    cells = []
    for _, line in lines.iterrows():
        value, spread = line.get(name), line.get(f"{name}_deviation", 0)
        text = EMPTY if value is None or value != value else format(value / unit, form)
        text += f" ± {format(spread, form)}" if spread > 0 else ""
        cells.append(f"**{text}**" if line.get(f"{name}_best") in (True,) else text)
    return cells


def _difference_columns(lines: DataFrame) -> Columns:
    """Return the columns of `differences`; a significant difference is bold."""
    columns = {("", _title(name)): list(lines[name]) for name in lines.loc[:, :"minus"]}
    columns["", "figure"] = [{"kl": "KL"}.get(figure, figure) for figure in lines["figure"]]
    cells = []
    for line in lines.itertuples():
        text, tested = f"{line.difference:+.4f}", line.p == line.p
        text = f"**{text}**" if line.significant else f"{text} {NOT_SIGNIFICANT}"
        interval = f"[{line.low:+.4f}, {line.high:+.4f}]" if tested else EMPTY
        p = f"{line.p:.2g}" if tested else EMPTY
        cells.append([text, interval, p, f"{line.seeds:.0f}", f"{line.documents:.0f}"])
    for place, title in enumerate(("difference", "95% interval", "p", "seeds", "documents")):
        columns["", title] = [line[place] for line in cells]
    return columns


def _title(name: str) -> str:
    return name.removeprefix(SETTING).replace("_", " ")


def _markdown(columns: Columns, left: int) -> str:
    head = [" ".join(key).strip() for key in columns]
    return padded_table(head, list(zip(*columns.values(), strict=True)), left)


def caption(table: DataFrame, runs: Runs) -> str:
    """Return the conditions of a table: calibration, test windows, dtype, processor, commit."""
    results = [runs[folder] for of_row in table["runs"] for folder in of_row.values()]

    def values(*path: str) -> str:
        found = (reduce(lambda value, key: (value or {}).get(key), path, run) for run in results)
        return " or ".join(dict.fromkeys(str(value) for value in found if value is not None))

    parts = []
    if count := values("calibration", "windows"):
        length = values("calibration", "seqlen")
        parts.append(f"calibrated on {count} windows of {length} tokens")
    for test, lines in table.groupby("measured_on", sort=False):
        windows, tokens, compared = lines.reindex(columns=SIZES).max()
        if windows == windows:
            parts.append(f"measured on {test}: {windows:.0f} windows, {tokens:,.0f} tokens")
            if compared < windows:
                parts[-1] += f" (KL and agreement on {compared:.0f} of these windows)"
    parts += [values("fingerprint", "pruning", "--dtype"), values("processor")]
    commits = [run["commit"] for run in results if run.get("commit")]
    names = dict.fromkeys(of["hash"][:10] + ", with changes" * of["changed"] for of in commits)
    parts += [f"commit {' or '.join(names)}"] * bool(names)
    text = one_line("; ".join(filter(None, parts)))
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def latex(models: Iterable[Compared]) -> str:
    """Return tables of perplexity and KL, and differences, for LaTeX with `booktabs`."""
    parts = ["% \\usepackage{booktabs,graphicx}"]
    for table, lines, _, conditions in models:
        about = f"{Path(table['model'].iloc[0]).name}. {conditions}"
        titles = {*map(_title, _keys(table)), "perplexity", "KL"}
        shown = {key: cells for key, cells in _columns(table).items() if key[1] in titles}
        bold = any(cell.startswith("**") for cells in shown.values() for cell in cells)
        notes = [NOTES["perplexity"], NOTES["KL"], *[BOLD] * bold]
        parts.append(_booktabs(shown, 3, " ".join([about, *notes])))
        if len(lines):
            columns = _difference_columns(lines)
            parts.append(_booktabs(columns, len(columns) - 5, f"{about} {DIFFERENCES}"))
    return "\n\n".join(parts) + "\n"


def _booktabs(columns: Columns, left: int, about: str) -> str:
    from pandas import DataFrame

    groups = [group for group, _ in columns]
    cells = {tuple(map(_tex, key)): [*map(_tex, cells)] for key, cells in columns.items()}
    frame = DataFrame(cells) if any(groups) else DataFrame(cells).droplevel(0, axis="columns")
    starts = {group: groups.index(group) + 1 for group in groups if group}
    rules = [f"\\cmidrule(lr){{{s}-{s + groups.count(g) - 1}}}" for g, s in starts.items()]
    form = {"column_format": "l" * left + "r" * (len(columns) - left), "multicol_align": "c"}
    form |= {"hrules": True, "position_float": "centering", "caption": _tex(about)}
    text = frame.style.hide(axis="index").to_latex(**form).strip()
    text = text.replace("\\\\\n", "\n".join(["\\\\", *rules, ""]), 1)
    return text.replace("\\begin{tabular}", f"{FITTED}\\begin{{tabular}}").replace(
        "\\end{tabular}", "\\end{tabular}}"
    )


def _tex(text: str) -> str:
    """Return any text, and `**bold**`, for LaTeX."""
    names = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum"}
    names |= {"<": "less", ">": "greater", "|": "bar"}
    special = {letter: f"\\text{name}{{}}" for letter, name in names.items()}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"±": "$\\pm$", EMPTY: "--"}
    text = "".join(special.get(letter, letter) for letter in one_line(str(text)))
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)
    text = re.sub(r"(?<=\d)e-0*(\d+)", r"$\\times10^{-\1}$", text)
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)


def all_settings(runs: Runs) -> DataFrame:
    """Return a line for each run: its command, every setting, and the figures of each test set."""
    import pandas

    lines = []
    for folder, results in runs.items():
        names = [test["name"] for test in results["evaluation"]]
        tests = {
            test["name"] if names.count(test["name"]) == 1 else f"{test['name']} {number}": test
            for number, test in enumerate(results["evaluation"])
        }
        left_out = "allocation", "errors", "perplexity", "notes"  # by layer; a copy; sentences
        kept = {name: value for name, value in results.items() if name not in left_out}
        first = {"folder": str(folder), "command": results.get("command")}
        lines.append(first | kept | {"evaluation": tests})
    frame = pandas.json_normalize(lines)
    lists = [n for n in frame if n[:6] != "flags." and frame[n].map(type).isin([list]).any()]
    linears = [name for name in frame if name.startswith("sparsity.linears.")]
    return frame.drop(columns=[*lists, *linears])


class Compared(NamedTuple):
    """The rows of one model and vocabulary, their differences, and why there are not more."""

    table: DataFrame
    lines: DataFrame
    problems: list[str]
    caption: str

    def text(self) -> str:
        """Return what stands after the table in report.md."""
        parts = [self.caption, *(f"- {problem}" for problem in self.problems)]
        if len(self.lines):
            columns = _difference_columns(self.lines)
            parts += [DIFFERENCES, _markdown(columns, len(columns) - 5)]
        parts += [BOLD] * bool(self.table.filter(like="_best").to_numpy().any())
        return "\n\n".join(filter(None, parts))

    def short(self) -> str:
        """Return what stands after the table in a terminal: lines for differences of losses."""
        lines = self.lines[self.lines["figure"] == "loss"]
        texts = [*(f"- {problem}" for problem in self.problems), *[SHORT] * bool(len(lines))]
        marks = _difference_columns(lines)["", "difference"]
        for mark, (_, line) in zip(marks, lines.iterrows(), strict=True):
            name = f"{_row_name(line, _keys(self.table))} minus {line['minus']}, on "
            texts.append(f"  {one_line(name + line['measured_on'])}: {mark.strip('*')}")
        return "\n".join(texts)


def write_report(
    runs: Runs,
    out: Path,
    against: str | None = None,
    latex_file: str | None = None,
    csv_file: str | None = None,
) -> str:
    """Write report.md, report.csv, differences.csv and pictures into `out`; return brief tables.

    `latex_file` gets the tables for LaTeX, `csv_file` all settings of every run. Raises UserError
    if no row is that of `against`.
    """
    losses = {folder: read_losses(folder, results) for folder, results in runs.items()}
    models = []
    for table in tables(runs):
        add_intervals(table, losses)
        models.append(Compared(table, *differences(table, losses, against), caption(table, runs)))
    by_model = [model.table for model in models]
    rows = (row for table in by_model for _, row in table.groupby(_keys(table)))
    if against and not any(_is_named(row, against) for row in rows):
        raise UserError(
            f"--against {against}: no run matches. Name the folder of a run, or add a RUN."
        )
    out.mkdir(parents=True, exist_ok=True)
    text = [report_text(by_model, more=[model.text() for model in models]).strip()]
    text += _write_pictures(by_model, runs, out)
    write_text(out / "report.md", "\n\n".join(text) + "\n")
    _write_csv(by_model, out / "report.csv")
    of_models = [m.lines.assign(model=m.table["model"].iloc[0]) for m in models if len(m.lines)]
    if of_models:
        _write_csv(of_models, out / "differences.csv")
    if latex_file:
        write_text(Path(latex_file), latex(models))
    if csv_file:
        write_text(Path(csv_file), all_settings(runs).to_csv(index=False))
    return report_text(by_model, brief=True, more=[model.short() for model in models])


def _write_pictures(by_model: Sequence[DataFrame], runs: Runs, out: Path) -> Iterator[str]:
    """Write every picture as PNG and PDF; yield the Markdown of each."""
    from matplotlib import rc_context

    for number, table in enumerate(by_model, 1):
        keys = _keys(table)
        figures = {"languages": picture(table)} | curves(table, keys)
        figures["errors"] = layer_errors(table, keys, runs)
        for name, figure in figures.items():
            name = f"{name}-{number}" if len(by_model) > 1 else name
            if figure:  # the same figures give the same bytes
                figure.savefig(out / f"{name}.png", dpi=150, metadata={"Software": None})
                with rc_context({"pdf.fonttype": 42}):  # publishers require it
                    figure.savefig(out / f"{name}.pdf", metadata={"CreationDate": None})
                yield f"![{name}]({name}.png)"


def _write_csv(frames: Sequence[DataFrame], file: Path) -> None:
    """Write lines of all models; those of `tables` without what is for this module alone."""
    import pandas

    frame = pandas.concat(frames) if frames else pandas.DataFrame()
    dropped = ["folder", "strictness", "seed", "runs", *frame.filter(like="_best")]
    frame = frame.drop(columns=dropped, errors="ignore")
    short = {name: name.removeprefix(SETTING).removeprefix(TASK) for name in frame}
    write_text(file, frame.rename(columns=short).to_csv(index=False))


def main(argv: list[str]) -> None:
    parser = command.make_parser("report", __doc__)
    parser.add_argument("--out", default="report", help="folder for the files (default: report)")
    about = "compare every row also with this one: dense, or a run's folder (default: none)"
    parser.add_argument("--against", metavar="RUN", help=about)
    about = "write the tables for LaTeX with booktabs to this file (default: none)"
    parser.add_argument("--latex", metavar="FILE", help=about)
    about = "write a line for each run to this file: its command and all settings (default: none)"
    parser.add_argument("--csv", metavar="FILE", help=about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of several")
    args = parser.parse_args(argv)
    check_writable("--out", args.out)
    for flag in ("latex", "csv"):
        if file := getattr(args, flag):
            check_writable(f"--{flag}", str(Path(file).parent))
    more = [args.against] if args.against not in (None, DENSE) else []
    runs = load_runs([*args.runs, *more])
    print(write_report(runs, Path(args.out), args.against, args.latex, args.csv))
    print(f"wrote {args.out}/report.md", file=sys.stderr)
