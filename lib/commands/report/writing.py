"""A report in words: Markdown, LaTeX and CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...run.figures import FIGURES, shown
from ...util.errors import one_line
from ...util.files import write_text
from ...util.markdown import EMPTY, padded_table
from ...util.statistics import LIMIT
from ...util.terminal import table_width
from .table import SETTING, SIZES, TASK, Runs, row_keys

if TYPE_CHECKING:
    from pandas import DataFrame

Columns = dict[tuple[str, str], list[str]]  # {(test set or "", title): a cell for each row}
NOT_SIGNIFICANT = "(n.s.)"
RUN_COLUMNS = "zeros", "saved_bytes"
TEST_COLUMNS = "perplexity standard_error rise bits_per_byte kl kl_99 top1_agreement".split()
NOTES = {
    "MB": "MB: bytes of the saved model's files, in millions.",
    "perplexity": "Perplexity: lower is better; ± is the standard deviation over seeds.",
    "s.e.": "s.e.: standard error of the perplexity over windows or dialogues, mean over seeds.",
    "rise": "rise: perplexity increase over the dense model.",
    "KL": "KL: divergence from the dense model's predictions, in nats per token.",
    "KL 99%": "KL 99%: 99% of the tokens have a lower one.",
    "agreement": "agreement: share of positions with the dense model's most likely token.",
    "bits/byte": "Bits per byte do not depend on the tokens of a text, as perplexities do, but "
    "fall by themselves where a vocabulary was trimmed.",
}
BOLD = "Bold: significantly the best of the rows that differ only in the calibration text."
DIFFERENCES = f"""\
Differences: of the loss or of KL from the dense model, in nats per token, paired by test window.
Brackets: 95% intervals, each by itself, over documents and seeds; with one seed for that draw only.
p is corrected by Holm's rule over the table. {NOT_SIGNIFICANT}: not significant, as p is {LIMIT} or
more, or the test has only one document.""".replace("\n", " ")
LEFT_OUT = "KL 99%,documents,bits/byte,s.e.,seeds,seed,MB,zeros,agreement,KL,rise,p".split(",")
ONCE = "type", "method", "figure", "measured on"  # left out after these if one value stands in all
INTERVAL = "95% interval"  # left out where its words are too wide
FITTED = "\\medskip\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"


class Compared(NamedTuple):
    """The rows of one model and vocabulary, their differences, and why there are not more."""

    table: DataFrame
    lines: DataFrame
    problems: list[str]
    caption: str

    def text(self, width: int | None = None) -> str:
        """Return what stands after the table in report.md, see `report_text`."""
        parts = [self.caption, *(f"- {problem}" for problem in self.problems)]
        if len(self.lines):
            columns = _fitting(_difference_columns(self.lines), width)
            parts += [DIFFERENCES, _markdown(columns, [*columns].index(("", "difference")))]
        parts += [BOLD] * bool(self.table.filter(like="_best").to_numpy().any())
        return "\n\n".join(filter(None, parts))


def report_text(models: Sequence[Compared], missing: str = "", width: int | None = None) -> str:
    """Return all runs as Markdown: one table, or one for each model and vocabulary.

    It begins with the line `missing`. Columns that do not fit into `width` characters are left out.
    """
    parts, titles = [one_line(missing)], set()
    if len(models) > 1:
        parts.append(
            f"**{len(models)} tables, not to be compared with each other:** "
            "their runs are of different models or vocabularies."
        )
    for model in models:
        table, columns = model.table, _fitting(_columns(model.table), width)
        titles |= {title for _, title in columns}
        tests = ", ".join(dict.fromkeys(table["measured_on"]))
        about = [table["model"][0], *filter(None, table["vocabulary"][:1]), f"measured on {tests}"]
        parts.append(f"### {one_line(', '.join(about))}")
        parts += list(table["note"][:1]) if "note" in table else []
        parts += [_markdown(columns, 3), model.text(width)]
    parts.append("\n".join(f"- {note}" for title, note in NOTES.items() if title in titles))
    return "\n\n".join(part for part in parts if part) + "\n"


def _columns(table: DataFrame) -> Columns:
    """Return the columns of a table in which there are figures."""
    keys = row_keys(table)
    rows = table.drop_duplicates(keys).set_index(keys, drop=False)
    columns = {("", _title(name)): list(rows[name]) for name in keys}
    columns["", "seed"] = list(rows["seed"])
    columns |= {("", FIGURES[name].column): _cells(rows, name) for name in RUN_COLUMNS}
    # perplexity depends on the number of tokens
    first = ["bits_per_byte"] if "note" in table else []
    for test in dict.fromkeys(table["measured_on"]):
        lines = table[table["measured_on"] == test].set_index(keys).reindex(rows.index)
        names = dict.fromkeys([*first, *TEST_COLUMNS])
        columns |= {(test, FIGURES[name].column): _cells(lines, name) for name in names}
    tasks = (name for name in table if name.startswith(TASK) and not name.endswith("_deviation"))
    columns |= {("", name.removeprefix(TASK)): _cells(rows, name, "task") for name in tasks}
    return {key: cells for key, cells in columns.items() if set(cells) != {EMPTY}}


def _fitting(columns: Columns, width: int | None) -> Columns:
    """Return the columns that fit into `width` characters, less important ones left out first."""
    once = (title for title in ONCE if len({*columns.get(("", title), "  ")}) == 1)
    for title in (*LEFT_OUT, *once, INTERVAL):
        cells = [[" ".join(key).strip(), *column] for key, column in columns.items()]
        if width is None or table_width(cells, broken=title == INTERVAL) <= width:
            break
        columns = {key: column for key, column in columns.items() if key[1] != title}
    return columns


def _cells(lines: DataFrame, name: str, figure: str = "") -> list[str]:
    """Return a figure of each line as text, `±` its deviation over seeds; `–` if missing.

    Significantly best figures are between `**`.
    """
    cells = []
    for _, line in lines.iterrows():
        spread = line.get(f"{name}_deviation", 0)
        text = shown(figure or name, line.get(name), spread if spread > 0 else None) or EMPTY
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
    for place, title in enumerate(("difference", INTERVAL, "p", "seeds", "documents")):
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


def latex(models: Iterable[Compared], missing: str = "") -> str:
    """Return tables of perplexity and KL, and differences, for LaTeX with `booktabs`."""
    parts = ["% \\usepackage{booktabs,graphicx}"]
    for table, lines, _, conditions in models:
        about = f"{Path(table['model'].iloc[0]).name}. {f'{missing} {conditions}'.strip()}"
        titles = {*map(_title, row_keys(table)), "seed", "perplexity", "KL"}
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


def all_settings(runs: Runs, missing: Sequence[Path] = ()) -> DataFrame:
    """Return a line for each run: its command, every setting, and the figures of each test set.

    A run that is `missing` has a line with its folder alone.
    """
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
    return _with_folders(frame.drop(columns=[*lists, *linears]), "folder", missing)


def _with_folders(frame: DataFrame, column: str, folders: Sequence[Path]) -> DataFrame:
    """Add lines that have a folder alone; other columns keep their numbers as they are."""
    import pandas

    added = pandas.DataFrame({column: [str(folder) for folder in folders]})
    return pandas.concat([frame.astype(object), added]) if folders else frame


def write_csv(frames: Sequence[DataFrame], file: Path, missing: Sequence[Path] = ()) -> None:
    """Write lines of all models; those of `tables` without what is for this command alone."""
    import pandas

    frame = pandas.concat(frames) if frames else pandas.DataFrame()
    frame = _with_folders(frame, "folders", missing)
    dropped = ["folder", "strictness", "runs", *frame.filter(like="_best")]
    frame = frame.drop(columns=dropped, errors="ignore")
    short = {name: name.removeprefix(SETTING).removeprefix(TASK) for name in frame}
    write_text(file, frame.rename(columns=short).to_csv(index=False))
