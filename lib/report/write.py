"""The report on many runs: report.md, report.csv and pictures, written into one folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.report.completion_tables import completions_of_runs
from lib.report.markdown import EMPTY, padded_table
from lib.report.plots.choice_against_saying import choice_against_saying
from lib.report.plots.cost import pruning_cost
from lib.report.plots.cross_language import cross_language
from lib.report.plots.depth import kl_by_depth
from lib.report.plots.perplexity import perplexity_against_sparsity
from lib.report.plots.sparsity_by_linear import sparsity_by_linear
from lib.report.plots.style import can_draw, save_figure
from lib.report.quality_tables import quality_means, quality_of_runs
from lib.report.results import Run
from lib.report.tables import Row, Table, comparable_tables, deviation
from lib.util.terminal import one_line

PICTURES = {
    "perplexity": perplexity_against_sparsity,
    "pruning_cost": pruning_cost,
    "languages": cross_language,
    "sparsity": sparsity_by_linear,
    "abilities": choice_against_saying,
    "depth": kl_by_depth,
}
MEASURES = ("perplexity", "standard_error", "bits_per_byte")  # of every run, in report.csv
ROW_COLUMNS = (
    "table model method type ratio calibrated_on zeros seeds saved_bytes".split()
    + "measured_on digest rise".split()
)
COMPARED = ("kl", "kl_standard_error", "top1_agreement", "top1_agreement_standard_error")
NOTES = {  # by what a column's title ends with
    "saved": "saved: bytes of the saved model's files, in millions.",
    "perplexity": "Perplexity: lower is better; ± is the standard deviation over seeds.",
    "s.e.": "s.e.: standard error of the perplexity over the test windows, mean over seeds.",
    "rise": "rise: perplexity over the dense model's.",
    "KL": "KL: divergence from the dense model's predictions, in nats a token.",
    "agreement": "agreement: share of positions with the dense model's most likely token.",
    "bits/byte": "Bits per byte compare models of different tokenizers; perplexities do not.",
}


def number(value: float | None, places: int = 2) -> str:
    """A figure as the tables print it: `12.34`, `1,234`, `inf`, or `–` for None."""
    if value is None:
        return EMPTY
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.{places}f}"


def percent(value: float | None) -> str:
    """`+12%`, `+1.2%`, or `–` for None."""
    if value is None:
        return EMPTY
    return f"{value:+.1%}" if abs(value) < 0.0995 else f"{value:+,.0%}"


def mean_and_deviation(values: Sequence[float], places: int = 2, scale: float = 1.0) -> str:
    """Mean of values, `±` their standard deviation where there is one; `–` without values."""
    if not values:
        return EMPTY
    mean = number(scale * sum(values) / len(values), places)
    spread = deviation(values)
    return f"{mean} ± {number(scale * spread, places)}" if spread else mean


def report_text(runs: Sequence[Run]) -> str:
    """All runs as Markdown: one table, or several where a comparison would not be fair."""
    tables = comparable_tables(runs)
    parts = []
    if len(tables) > 1:
        parts.append(
            f"**{len(tables)} tables, not to be compared with each other:** "
            "their runs are of different models or vocabularies, or were measured on different "
            "test texts."
        )
    titles: set[str] = set()
    for table in tables:
        parts.append(_heading(table))
        parts += [table.vocabulary["note"]] if table.vocabulary else []
        columns = _columns(table)
        titles |= {title.rpartition(" ")[2] for title in columns}
        parts.append(padded_table(list(columns), list(zip(*columns.values(), strict=True)), left=3))
    if tables:
        parts.append("\n".join(f"- {note}" for end, note in NOTES.items() if end in titles))
    if failed := [run for run in runs if run.failure is not None]:
        lines = (f"- {run.folder}: {one_line(run.failure)}" for run in failed)
        parts.append("\n".join([f"**Failed runs: {len(failed)}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _heading(table: Table) -> str:
    """The model, what is left of its vocabulary, and the test sets with their sizes."""
    vocabulary, left = table.vocabulary, ""
    if vocabulary:
        rows = f"{vocabulary['rows']:,} of {vocabulary['rows_before']:,}"
        left = f", {rows} rows of its vocabulary"
    tests = ", ".join(_test_size(table, name) for name in table.tests) or "nothing"
    return f"### {one_line(table.model)}{left}, measured on {one_line(tests)}"


def _test_size(table: Table, name: str) -> str:
    tests = (run.tests[name] for row in table.rows for run in row.runs if name in run.tests)
    test = next(tests)
    if not test.get("tokens"):
        return name
    digest = f", digest {test['digest'][:8]}" if test.get("digest") else ""
    return f"{name} ({test['tokens']:,} tokens{digest})"


def _columns(table: Table) -> dict[str, list[str]]:
    """{title: a cell for each row}; of those beyond the first three only what says something."""
    lines = [_line(table, row) for row in table.rows]
    titles = list(lines[0])
    return {
        title: [line[title] for line in lines]
        for index, title in enumerate(titles)
        if index < 3 or any(line[title] != EMPTY for line in lines)
    }


def _line(table: Table, row: Row) -> dict[str, str]:
    """The cells of a row by the titles of their columns."""
    is_dense = row.target == "dense"
    cells = {
        "method": row.method,
        "type": EMPTY if is_dense else row.target,
        "calibrated on": row.label,
        "zeros": EMPTY if row.sparsity is None else f"{row.sparsity:.2%}",
        "seeds": EMPTY if is_dense else str(len(row.runs)),
        "saved": EMPTY if row.saved_bytes is None else f"{row.saved_bytes / 1e6:,.1f} MB",
    }
    for name in table.varying:
        value = row.settings.get(name)
        cells[name] = EMPTY if value is None else str(value)
    for test in table.tests:
        bits = {f"{test} bits/byte": mean_and_deviation(row.values(test, "bits_per_byte"), 3)}
        perplexity = {
            f"{test} perplexity": mean_and_deviation(row.values(test)),
            f"{test} s.e.": number(row.mean(test, "standard_error")),
            f"{test} rise": EMPTY if row is table.dense else percent(table.rise(row, test)),
        }
        cells |= bits | perplexity if table.vocabulary else perplexity | bits
        cells[f"{test} KL"] = mean_and_deviation(row.values(test, "kl"), 3)
        agreement = mean_and_deviation(row.values(test, "top1_agreement"), 1, scale=100)
        cells[f"{test} agreement"] = agreement + ("%" if agreement != EMPTY else "")
    for name in table.tasks:
        cells[name] = mean_and_deviation(row.task_values(name), 4)
    return cells


def report_csv(runs: Sequence[Run]) -> str:
    """The same figures as CSV, one line per row and test set, unrounded."""
    tables = comparable_tables(runs)
    settings = sorted({name for table in tables for name in table.varying})
    tasks = sorted({name for table in tables for name in table.tasks})
    lines = [
        {"table": index, **_csv_line(table, row, test, settings, tasks)} | quality_means(row, test)
        for index, table in enumerate(tables, 1)
        for row in table.rows
        for test in table.tests
    ]
    quality = {
        name: None
        for table in tables
        for row in table.rows
        for test in table.tests
        for name in quality_means(row, test)
    }
    compared = [name for name in COMPARED if any(line[name] is not None for line in lines)]
    vocabulary = ["vocabulary"] if any(table.vocabulary for table in tables) else []
    measures = [f"{name}{suffix}" for name in MEASURES for suffix in ("", "_deviation")]
    columns = [
        *ROW_COLUMNS,
        *measures,
        *compared,
        *quality,
        *settings,
        *tasks,
        *vocabulary,
        "folders",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(
    table: Table, row: Row, test: str, settings: list[str], tasks: list[str]
) -> dict[str, Any]:
    """What report.csv holds of a row and a test set, by column."""
    line = {
        "model": table.model,
        "method": row.method,
        "type": row.target,
        "ratio": row.ratio,
        "calibrated_on": row.label,
        "zeros": row.sparsity,
        "seeds": len(row.runs),
        "saved_bytes": row.saved_bytes,
        "measured_on": test,
        "digest": table.tests[test],
        "rise": table.rise(row, test),
        "vocabulary": table.vocabulary.get("rows"),
        "folders": " ".join(str(run.folder) for run in row.runs),
    }
    line |= {name: row.mean(test, name) for name in (*MEASURES, *COMPARED)}
    line |= {f"{name}_deviation": row.deviation(test, name) for name in MEASURES}
    line |= {name: row.settings.get(name) for name in settings}
    by_task = {name: row.task_values(name) for name in tasks}
    return line | {name: sum(v) / len(v) if v else None for name, v in by_task.items()}


def draw_all(tables: Sequence[Table], out: Path) -> list[Path]:
    """Every picture that the tables have figures for, as PNGs in `out`; returns their paths."""
    paths = []
    for index, table in enumerate(tables, 1):
        suffix = f"-{index}" if len(tables) > 1 else ""
        for name, draw in PICTURES.items():
            if figure := draw(table):
                paths.append(save_figure(figure, out / f"{name}{suffix}.png"))
    return paths


def write_report(runs: Sequence[Run], out: str | Path) -> list[Path]:
    """Write report.md, report.csv and the pictures into folder `out`; return their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(comparable_tables(runs), out) if can_draw() else []
    parts = [report_text(runs)]
    parts += [f"{text}\n" for text in (quality_of_runs(runs), completions_of_runs(runs)) if text]
    parts += [f"![{path.stem}]({path.name})\n" for path in pictures]
    texts = {"report.md": "\n".join(parts), "report.csv": report_csv(runs)}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *pictures]
