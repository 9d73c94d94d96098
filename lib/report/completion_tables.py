"""`completions` of results.json, for a terminal and as Markdown tables of a card and a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lib.report.markdown import EMPTY, compact_table, escape
from lib.report.results import Run
from lib.report.tables import Row, Table, comparable_tables
from lib.util.terminal import one_line

MODELS = {"dense": "dense model", "model": "this model"}


def terminal_lines(completions: Sequence[dict[str, Any]], width: int = 100) -> list[str]:
    """The first prompt of each test set and a line for each model, cut to `width` characters."""
    lines = []
    first_by_test = {entry["test"]: entry for entry in reversed(completions)}
    for test in dict.fromkeys(entry["test"] for entry in completions):
        entry = first_by_test[test]
        lines.append(f"{one_line(test)}: {_cut(entry['prompt'], width)} ...")
        lines += [
            f"  {name}: {_cut(entry[key], width)}" for key, name in MODELS.items() if key in entry
        ]
    return lines


def _cut(text: str, width: int) -> str:
    line = one_line(text)
    return line if len(line) <= width else f"{line[:width]} ..."


def completions_of_run(completions: Sequence[dict[str, Any]]) -> str:
    """One run's completions: a row for each prompt, the dense and this model side by side."""
    models = [key for key in MODELS if any(key in entry for entry in completions)]
    head = ["test text", "prompt", *(MODELS[key] for key in models)]
    keys = ["test", "prompt", *models]
    rows = ([escape(entry.get(key, "")) for key in keys] for entry in completions)
    return compact_table(head, rows)


def completions_of_runs(runs: Sequence[Run]) -> str:
    """Completions of all runs: a table for each test set, a column for each prompt; may be empty.

    Of runs that differ in nothing but the seed, the first one's.
    """
    all_tables = comparable_tables(runs)
    parts = []
    for table in all_tables:
        for test in table.tests:
            if not (prompts := _prompts(table, test)):
                continue
            title = f"{table.short_model}, {test}" if len(all_tables) > 1 else test
            head = ["method", "type", "calibrated on", *(f"{escape(text)} …" for text in prompts)]
            parts.append(f"### Completions: {escape(title)}")
            parts.append(compact_table(head, _lines(table, test, prompts)))
    if parts:
        parts.append("Beginnings of test documents, continued greedily.")
    return "\n\n".join(parts)


def _entries(run: Run, test: str) -> list[dict[str, Any]]:
    return [entry for entry in run.results.get("completions", []) if entry["test"] == test]


def _prompts(table: Table, test: str) -> list[str]:
    runs = (row.runs[0] for row in table.rows)
    return list(dict.fromkeys(entry["prompt"] for run in runs for entry in _entries(run, test)))


def _lines(table: Table, test: str, prompts: list[str]) -> Iterable[list[str]]:
    """A line for the dense model, from whichever run has its completions, and one for each row."""
    dense: dict[str, str] = {}
    for row in reversed(table.rows):
        dense |= _by_prompt(row, test, "model" if row is table.dense else "dense")
    if dense:
        yield ["dense", EMPTY, EMPTY, *(_cell(dense, prompt) for prompt in prompts)]
    for row in table.pruned:
        if by_prompt := _by_prompt(row, test, "model"):
            varying = ((name, row.settings.get(name)) for name in table.varying)
            settings = [f"{name} {value}" for name, value in varying if value is not None]
            names = [row.method, row.target, ", ".join([row.label, *settings])]
            yield [*map(escape, names), *(_cell(by_prompt, prompt) for prompt in prompts)]


def _by_prompt(row: Row, test: str, model: str) -> dict[str, str]:
    """{prompt: completion} by the `dense` or the run's own `model`."""
    entries = _entries(row.runs[0], test)
    return {entry["prompt"]: entry[model] for entry in entries if model in entry}


def _cell(by_prompt: dict[str, str], prompt: str) -> str:
    return escape(by_prompt[prompt]) if prompt in by_prompt else ""
