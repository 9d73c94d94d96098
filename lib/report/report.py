"""One table over many runs, and the pictures that go with it.

    python -m lib.report RUN [RUN ...] [--out FOLDER]

A RUN is a run's `--save` folder, or a folder that holds such folders. The table goes to the
terminal and to report.md, in machine form to report.csv; the pictures are beside them.
Completions are in report.md alone.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.report.completion_tables import completions_of_runs
from lib.report.markdown import padded_table
from lib.report.plots.cost import pruning_cost
from lib.report.plots.languages import cross_language
from lib.report.plots.perplexity import perplexity_against_sparsity
from lib.report.plots.sparsity import sparsity_by_linear
from lib.report.plots.style import can_draw
from lib.report.results import Run, load_runs
from lib.report.tables import Row, Table, deviation, tables
from lib.util import command
from lib.util.files import check_output_folder

NOTES = (
    "Perplexity: lower is better; ± is the standard deviation over seeds.",
    "s.e.: standard error of the perplexity over the test windows, mean over seeds.",
    "rise: perplexity over the dense model's.",
    "Bits per byte compare models of different tokenizers; perplexities do not.",
)


def number(value: float | None, places: int = 2) -> str:
    """A figure as the tables print it: `12.34`, `1,234`, `inf`, or `–` for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.{places}f}"


def percent(value: float | None) -> str:
    """`+12%`, `+1.2%`, or `–` for None."""
    if value is None:
        return "–"
    return f"{value:+.1%}" if abs(value) < 0.0995 else f"{value:+,.0%}"


def _tasks(table: Table) -> list[str]:
    return sorted({name for row in table.rows for run in row.runs for name in run.tasks})


def _spread(values: list[float], places: int = 2) -> str:
    """Mean of values, `±` their deviation where there is one."""
    if not values:
        return "–"
    spread = deviation(values)
    text = number(sum(values) / len(values), places)
    return f"{text} ± {number(spread, places)}" if spread else text


def _line(table: Table, row: Row) -> list[str]:
    sparsity = "–" if row.sparsity is None else f"{row.sparsity:.2%}"
    seeds = "–" if row.target == "dense" else str(len(row.runs))
    kind = "–" if row.target == "dense" else row.target
    cells = [row.method, kind, row.label, sparsity, seeds]
    settings = row.settings
    varying = (settings.get(name) for name in table.varying)
    cells += ["–" if value is None else str(value) for value in varying]
    for test in table.tests:
        figures = [_spread(row.values(test)), number(row.mean(test, "standard_error"))]
        figures.append("–" if row is table.dense else percent(table.rise(row, test)))
        bits = _spread(row.values(test, "bits_per_byte"), 3)
        cells += [bits, *figures] if table.vocabulary else [*figures, bits]
    for name in _tasks(table):
        cells.append(_spread([run.tasks[name] for run in row.runs if name in run.tasks], 4))
    return cells


def _markdown_table(table: Table) -> str:
    head = ["method", "type", "calibrated on", "zeros", "seeds", *table.varying]
    for test in table.tests:
        figures, bits = [f"{test} perplexity", "s.e.", "rise"], f"{test} bits/byte"
        head += [bits, *figures] if table.vocabulary else [*figures, bits]
    head += _tasks(table)
    body = [_line(table, row) for row in table.rows]
    empty = [i for i in range(3, len(head)) if all(line[i] == "–" for line in body)]
    keep = [i for i in range(len(head)) if i not in empty]
    return padded_table([head[i] for i in keep], [[line[i] for i in keep] for line in body], left=3)


def table(runs: Sequence[Run]) -> str:
    """All runs as Markdown: one table, or several where a comparison would not be fair."""
    found = tables(runs)
    failed = [run for run in runs if run.error is not None]
    parts = []
    if len(found) > 1:
        parts.append(
            f"**{len(found)} tables, not to be compared with each other:** "
            "their runs are of different models or vocabularies, or were measured on different "
            "test texts."
        )
    for each in found:
        sizes = (_test_size(each, name) for name in each.tests)
        its = each.vocabulary
        left = f", {its['rows']:,} of {its['rows_before']:,} rows of its vocabulary" if its else ""
        parts.append(f"### {each.model}{left}, measured on {', '.join(sizes) or 'nothing'}")
        parts += [its["note"]] if its else []
        parts.append(_markdown_table(each))
    if found:
        parts.append("\n".join(f"- {note}" for note in NOTES))
    if failed:
        lines = (f"- {run.folder}: {' '.join(run.error.split())}" for run in failed)
        parts.append("\n".join([f"**Failed runs: {len(failed)}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _test_size(table: Table, name: str) -> str:
    tests = (run.tests[name] for row in table.rows for run in row.runs if name in run.tests)
    test = next(tests)
    if not test.get("tokens"):
        return name
    digest = f", digest {test['digest'][:8]}" if test.get("digest") else ""
    return f"{name} ({test['tokens']:,} tokens{digest})"


def comma_separated(runs: Sequence[Run]) -> str:
    """The same figures as CSV, one line per row and test set, unrounded."""
    head = "table,model,method,type,ratio,calibrated_on,zeros,seeds,measured_on,digest".split(",")
    measures = ("perplexity", "standard_error", "bits_per_byte")
    head += ["rise", *(f"{m}{end}" for m in measures for end in ("", "_deviation"))]
    found = tables(runs)
    settings = sorted({name for each in found for name in each.varying})
    tasks = sorted({name for each in found for name in _tasks(each)})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    trimmed = ["vocabulary"] if any(each.vocabulary for each in found) else []
    writer.writerow([*head, *settings, *tasks, *trimmed, "folders"])
    for index, each in enumerate(found, 1):
        for row in each.rows:
            shared = [index, each.model, row.method, row.target, row.ratio, row.label]
            shared += [row.sparsity, len(row.runs)]
            last = [row.settings.get(name) for name in settings]
            for name in tasks:
                values = [run.tasks[name] for run in row.runs if name in run.tasks]
                last.append(sum(values) / len(values) if values else None)
            last += [each.vocabulary.get("rows") for _ in trimmed]
            last.append(" ".join(str(run.folder) for run in row.runs))
            for test in each.tests:
                line = [test, each.tests[test], each.rise(row, test)]
                for measure in measures:
                    line += [row.mean(test, measure), row.deviation(test, measure)]
                writer.writerow([*shared, *line, *last])
    return text.getvalue()


def draw_all(tables: Sequence[Table], out: Path) -> list[Path]:
    """Every picture that the tables have figures for, as PNGs in `out`; returns their paths."""
    pictures = {
        "perplexity": perplexity_against_sparsity,
        "pruning_cost": pruning_cost,
        "languages": cross_language,
        "sparsity": sparsity_by_linear,
    }
    drawn = []
    for index, each in enumerate(tables, 1):
        suffix = f"-{index}" if len(tables) > 1 else ""
        drawn += [draw(each, out / f"{name}{suffix}.png") for name, draw in pictures.items()]
    return [path for path in drawn if path]


def write_report(runs: Sequence[Run], out: str | Path) -> list[Path]:
    """Write report.md, report.csv and the pictures into folder `out`; return their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(tables(runs), out) if can_draw() else []
    shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    completions = completions_of_runs(runs)
    whole = table(runs) + (f"\n{completions}\n" if completions else "") + shown
    texts = {"report.md": whole, "report.csv": comma_separated(runs)}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *pictures]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of them")
    parser.add_argument("--out", default="report", help="folder for the files (default: report)")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    runs = load_runs(args.runs)
    check_output_folder("--out", args.out)
    for path in write_report(runs, args.out):
        print(f"wrote {path}", file=sys.stderr)
    print(table(runs))
