"""What models said, `samples` of results.json, as Markdown tables: in the report and in a card."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from lib.report.results import Run
from lib.report.tables import Row, Table, tables

NOTHING = "–"
NAMES = {"dense": "dense model", "model": "this model"}
_TURNS = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # directions
# what Markdown, on the hub and elsewhere, gives a meaning within a line
_MARKS = re.compile(r"[\\`*_\[\]~#$@]|:(?=//)|(?<=www)\.")


def one_line(text: str) -> str:
    """Any text on one line, without what a terminal would obey or what turns a line around."""
    line = " ".join(text.split())
    return "".join(one for one in line if unicodedata.category(one) != "Cc" and one not in _TURNS)


def first_lines(samples: Sequence[dict[str, Any]], width: int = 100) -> list[str]:
    """The first sample of each test set, for a terminal: a line for each model, cut."""
    lines, seen = [], set()
    for one in samples:
        if one["test"] in seen:
            continue
        seen.add(one["test"])
        lines.append(f"{one['test']}: {_cut(one['beginning'], width)} ...")
        lines += [f"  {name}: {_cut(one[who], width)}" for who, name in NAMES.items() if who in one]
    return lines


def _cut(text: str, width: int) -> str:
    line = one_line(text)
    return line if len(line) <= width else f"{line[:width]} ..."


def escaped(text: str) -> str:
    """Any text as plain words in a cell of a Markdown table: one line, no markup, no HTML."""
    line = html.escape(_MARKS.sub(r"\\\g<0>", one_line(text)), quote=False)
    return line.replace("|", "&#124;") or NOTHING


def rows_of(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def side_by_side(samples: Sequence[dict[str, Any]]) -> str:
    """One run's samples: a row for each beginning, what the dense and this model say beside it."""
    who = [name for name in NAMES if any(name in one for one in samples)]
    head = ["test text", "beginning", *(NAMES[name] for name in who)]
    keys = ["test", "beginning", *who]
    return rows_of(head, ([escaped(one.get(key, "")) for key in keys] for one in samples))


def what_they_say(runs: Sequence[Run]) -> str:
    """Samples of all runs: a table for each test set, a column for each beginning; may be empty.

    Of runs that differ in nothing but the seed, the first one's.
    """
    found = tables(runs)
    parts = []
    for table in found:
        for test in table.tests:
            if not (begun := _beginnings(table, test)):
                continue
            of = f"{table.short_model}, {test}" if len(found) > 1 else test
            head = ["method", "type", "calibrated on", *(f"{escaped(one)} …" for one in begun)]
            parts.append(f"### What they say: {escaped(of)}")
            parts.append(rows_of(head, _lines(table, test, begun)))
    if parts:
        parts.append("Beginnings of test documents, gone on with by the most likely tokens.")
    return "\n\n".join(parts)


def _samples(run: Run, test: str) -> list[dict[str, Any]]:
    return [one for one in run.results.get("samples", []) if one["test"] == test]


def _beginnings(table: Table, test: str) -> list[str]:
    runs = (row.runs[0] for row in table.rows)
    return list(dict.fromkeys(one["beginning"] for run in runs for one in _samples(run, test)))


def _lines(table: Table, test: str, begun: list[str]) -> Iterable[list[str]]:
    """A line for the dense model, whichever run has heard it, and one for each row."""
    dense: dict[str, str] = {}
    for row in reversed(table.rows):
        heard = "model" if row is table.dense else "dense"
        dense |= _said(row, test, heard)
    if dense:
        yield ["dense", NOTHING, NOTHING, *(_cell(dense, one) for one in begun)]
    for row in table.pruned:
        if said := _said(row, test, "model"):
            varying = ((name, row.settings.get(name)) for name in table.varying)
            settings = [f"{name} {value}" for name, value in varying if value is not None]
            named = [row.method, row.target, ", ".join([row.label, *settings])]
            yield [*map(escaped, named), *(_cell(said, one) for one in begun)]


def _said(row: Row, test: str, who: str) -> dict[str, str]:
    return {one["beginning"]: one[who] for one in _samples(row.runs[0], test) if who in one}


def _cell(said: dict[str, str], beginning: str) -> str:
    return escaped(said[beginning]) if beginning in said else ""
