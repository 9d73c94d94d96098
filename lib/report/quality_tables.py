"""`abilities` and `fidelity` of results.json as Markdown tables of a card and a report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lib.report.completion_tables import MODELS
from lib.report.markdown import EMPTY, compact_table, escape, padded_table
from lib.report.results import AbilityRecord, FidelityRecord, Run
from lib.report.tables import Row, Table, comparable_tables

SHARES = {"accuracy": "right", "said": "said"}  # of an ability
FIDELITY = {  # of completions
    "language": "lines in the language",
    "foreign_script": "letters in foreign scripts",
    "known_words": "words of the train text",
    "repeated_4grams": "repeated 4-grams",
    "distinct_2grams": "distinct 2-grams",
}
NOTES = (
    "Right: share of questions whose right option is the likeliest; said: share whose answer is "
    "what the model writes greedily.",
    "Lines, letters, words and n-grams: shares of what the models write after beginnings of test "
    "documents.",
)


def abilities_of_run(records: Sequence[AbilityRecord]) -> str:
    """One run's abilities: a row for each kind of question, the dense and this model beside it."""
    models = [key for key in MODELS if any(key in record for record in records)]
    shares = [key for key in SHARES if any(key in record["model"] for record in records)]
    titles = [f"{MODELS[model]}, {SHARES[share]}" for share in shares for model in models]
    has_flips = any("flips" in record for record in records)
    head = ["test text", "questions", "chance", *titles, *(["lost, gained"] if has_flips else [])]
    rows = []
    for record in records:
        cells = [escape(record["text"]), f"{record['questions']} {escape(record['name'])}"]
        cells.append(f"{record['chance']:.0%}")
        cells += [_percent(record.get(m, {}).get(share)) for share in shares for m in models]
        if has_flips:
            flips = record.get("flips")
            cells.append(f"{flips['lost']}, {flips['gained']}" if flips else EMPTY)
        rows.append(cells)
    return compact_table(head, rows)


def fidelity_of_run(records: Sequence[FidelityRecord]) -> str:
    """One run's fidelity: a row for the test text itself and for each model."""
    writers = {"reference": "the text itself", **MODELS}
    rows = [
        [escape(record["text"]), name, *(_percent(record[key].get(figure)) for figure in FIDELITY)]
        for record in records
        for key, name in writers.items()
        if key in record
    ]
    return compact_table(["test text", "written by", *FIDELITY.values()], rows)


def quality_of_runs(runs: Sequence[Run]) -> str:
    """Abilities and fidelity of all runs, a table for each text; empty where no run has any."""
    tables = comparable_tables(runs)
    parts = []
    for table in tables:
        records = (record for row in table.rows for run in row.runs for record in _records(run))
        for text in dict.fromkeys(record["text"] for record in records):
            title = f"{table.short_model}, {text}" if len(tables) > 1 else text
            parts += [f"### Abilities and fidelity: {escape(title)}", _table(table, text)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in NOTES)]) if parts else ""


def _table(table: Table, text: str) -> str:
    """A line for the dense model, and one for each row."""
    dense = dense_means(table, text)
    lines = [(["dense", EMPTY, EMPTY], dense)] if dense else []
    for row in table.pruned:
        if figures := quality_means(row, text):
            varying = ((name, row.settings.get(name)) for name in table.varying)
            settings = [f"{name} {value}" for name, value in varying if value is not None]
            lines.append(([row.method, row.target, ", ".join([row.label, *settings])], figures))
    titles = list(dict.fromkeys(title for _, figures in lines for title in figures))
    body = [
        [*names, *(_percent(figures.get(title)) for title in titles)] for names, figures in lines
    ]
    return padded_table(["method", "type", "calibrated on", *titles], body, left=3)


def dense_means(table: Table, text: str) -> dict[str, float]:
    """{figure: share} of the dense model, from whichever run of the table measured it."""
    figures: dict[str, float] = {}
    for row in reversed(table.rows):
        figures |= quality_means(row, text, "model" if row is table.dense else "dense")
    return figures


def quality_means(row: Row, text: str, model: str = "model") -> dict[str, float]:
    """{figure: share}, means over the runs of a row, of their own `model` or of the `dense` one."""
    values: dict[str, list[float]] = {}
    for run in row.runs:
        for record in _records(run):
            if record["text"] == text:
                for title, value in _figures(record, model).items():
                    values.setdefault(title, []).append(value)
    return {title: statistics.fmean(shares) for title, shares in values.items()}


def _records(run: Run) -> list[AbilityRecord | FidelityRecord]:
    return [*run.results.get("abilities", []), *run.results.get("fidelity", [])]


def _figures(record: AbilityRecord | FidelityRecord, model: str) -> dict[str, float]:
    """{title: share} of one model in a record of an ability or of fidelity."""
    measured = record.get(model, {})
    if "questions" in record:
        titles = {key: f"{record['name']} {word}" for key, word in SHARES.items()}
    else:
        titles = FIDELITY
    return {title: measured[key] for key, title in titles.items() if measured.get(key) is not None}


def _percent(share: float | None) -> str:
    return EMPTY if share is None else f"{share:.1%}"
