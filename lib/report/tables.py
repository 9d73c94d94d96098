"""Which runs may be compared, and which are averaged.

Perplexities compare only between runs of one model and vocabulary on one test set, and only runs
that differ in nothing but the seed are averaged: `comparable_tables` sorts runs by these two rules.
Importing this file imports nothing heavy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.report.results import NONE, STRICTNESS, EvaluationRecord, Run, VocabularyRecord


@dataclass(frozen=True, eq=False)
class Row:
    """Runs that differ in nothing but the seed; a row of a table."""

    runs: tuple[Run, ...]
    label: str  # what they were calibrated on; unique within its table for different sources

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def target(self) -> str:
        return self.runs[0].target

    @property
    def ratio(self) -> float:
        return self.runs[0].ratio

    @property
    def kind(self) -> str | None:
        """The sparsity type; None of a dense model, or one that was pruned before."""
        return self.runs[0].results.get("sparsity_type")

    @property
    def removed(self) -> float:
        """Share of the blocks' weights that were pruned, or went with their neurons."""
        return self.runs[0].removed

    @property
    def saved_bytes(self) -> float | None:
        """Bytes of the saved model's files, mean over the runs that saved it."""
        sizes = [run.results["saved_bytes"] for run in self.runs if "saved_bytes" in run.results]
        return statistics.fmean(sizes) if sizes else None

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    @property
    def order(self) -> tuple[float, int]:
        """A key that sorts targets from the loosest to the strictest."""
        strictness = STRICTNESS.index(self.kind) if self.kind in STRICTNESS else len(STRICTNESS)
        return self.ratio, strictness

    def values(self, test: str, key: str = "perplexity") -> list[float]:
        """The runs' values of a figure, such as `perplexity` or `kl`, on a test set."""
        values = (run.tests.get(test, {}).get(key) for run in self.runs)
        return [value for value in values if value is not None and not math.isnan(value)]

    def mean(self, test: str, key: str = "perplexity") -> float | None:
        """Mean over the runs, or None where none has it."""
        values = self.values(test, key)
        return statistics.fmean(values) if values else None

    def deviation(self, test: str, key: str = "perplexity") -> float | None:
        """Sample standard deviation over the runs, or None for fewer than two."""
        return deviation(self.values(test, key))

    @property
    def sparsity(self) -> float | None:
        """Measured share of zeros in the pruned linears, mean over the runs."""
        records = (run.results.get("sparsity") for run in self.runs)
        shares = [record["overall"] for record in records if record]
        return statistics.fmean(shares) if shares else None

    def task_values(self, name: str) -> list[float]:
        """The runs' values of a task's metric."""
        return [run.tasks[name] for run in self.runs if name in run.tasks]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that may be compared: one model, one vocabulary, the same test sets."""

    model: str
    tests: dict[str, Any]  # {name: digest of its windows, or what identifies them}
    rows: list[Row]

    @property
    def short_model(self) -> str:
        """The model without its owner or the folders it lies in, for titles."""
        return Path(self.model).name

    @property
    def vocabulary(self) -> VocabularyRecord | dict[str, Any]:
        """The record of the vocabulary where it was trimmed; then bits per byte come first."""
        return self.rows[0].runs[0].vocabulary

    @property
    def dense(self) -> Row | None:
        return next((row for row in self.rows if row.target == "dense"), None)

    @property
    def pruned(self) -> list[Row]:
        return [row for row in self.rows if row.target != "dense"]

    @property
    def targets(self) -> list[str]:
        """The sparsities asked for, `50%`, `4:8`, `2:4`, ..., from the loosest to the strictest."""
        rows = sorted(self.pruned, key=lambda row: row.order)
        return list(dict.fromkeys(row.target for row in rows))

    @property
    def calibrations(self) -> list[str]:
        """The calibration sets: in the order of the test sets, then the others, `none` last."""
        labels = {row.label for row in self.pruned}
        first = [name for name in self.tests if name in labels]
        return first + sorted(labels - set(first), key=lambda label: (label == NONE, label))

    @property
    def varying(self) -> list[str]:
        """The further flags in which the pruned runs differ."""
        names = sorted({name for row in self.rows for name in row.settings})
        rows = self.pruned or self.rows
        return [n for n in names if len({repr(row.settings.get(n)) for row in rows}) > 1]

    @property
    def tasks(self) -> list[str]:
        """`task metric` of every metric that a run has."""
        return sorted({name for row in self.rows for run in row.runs for name in run.tasks})

    def rise(self, row: Row, test: str) -> float | None:
        """Perplexity over the dense model's, less one; None where either is missing."""
        dense = self.dense.mean(test) if self.dense else None
        mean = row.mean(test)
        return mean / dense - 1 if mean is not None and dense else None


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation, or None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def comparable_tables(runs: Iterable[Run]) -> list[Table]:
    """Sort runs into tables whose rows may be compared; failed runs are left out.

    A run joins the first table of its model and vocabulary that shares a test set with it and has
    no other test set under one of its names.
    """
    groups: list[tuple[tuple, dict[str, Any], list[Run]]] = []  # model, tests, runs
    for run in (run for run in runs if run.error is None):
        tests = {name: _identity(test) for name, test in run.tests.items()}
        model = run.model, run.vocabulary.get("rows"), run.vocabulary.get("digest")
        for group_model, group_tests, members in groups:
            shared = group_tests.keys() & tests.keys()
            same = all(group_tests[name] == tests[name] for name in shared)
            if group_model == model and same and (shared or not tests):
                group_tests.update(tests)
                members.append(run)
                break
        else:
            groups.append((model, tests, [run]))
    return [Table(model, tests, _rows(members)) for (model, *_), tests, members in groups]


def _identity(test: EvaluationRecord) -> Any:
    """What two test sets must have in common to be the same."""
    return test.get("digest") or (test.get("source"), test.get("revision"), test.get("tokens"))


def _rows(runs: list[Run]) -> list[Row]:
    """Runs of one table, averaged over seeds; of one seed twice, the first run counts."""
    groups: dict[tuple, list[Run]] = {}
    sources: dict[str, set] = {}
    for run in runs:
        settings = sorted(run.settings.items())
        key = (run.method, run.target, run.calibration, run.sources, repr(settings))
        groups.setdefault(key, []).append(run)
        sources.setdefault(run.calibration, set()).add(run.sources)
    rows = []
    for members in groups.values():
        first = members[0]
        label = first.calibration
        if len(sources[label]) > 1:  # several texts of one name
            label += f" ({', '.join(source for source, _ in first.sources)})"
        by_seed = {run.seed: run for run in reversed(members)}
        rows.append(Row(tuple(by_seed[seed] for seed in sorted(by_seed)), label))
    return sorted(rows, key=lambda row: (row.target != "dense", row.method, row.order, row.label))
