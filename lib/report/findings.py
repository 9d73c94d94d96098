"""What the figures of a table say, in a sentence computed from them: the pictures' titles.

Nothing is said that the runs do not show: effects are given with their sign, averaged
geometrically over the methods, and an effect below half a percent is called none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lib.report.results import NONE
from lib.report.tables import Row, Table

NEGLIGIBLE = 0.005  # share of the perplexity


@dataclass(frozen=True)
class Effect:
    """On one test set: calibrated on the set's own language against calibrated on another."""

    test: str
    other: str
    method: str
    setting: str
    change: float  # perplexity calibrated on `test` over perplexity calibrated on `other`, less one


def effects(table: Table) -> list[Effect]:
    """Every such comparison in a table, in its order.

    A language is recognised by its name: the calibration set's is the test set's. The others are
    the calibration sets named as some other test set, or, where there are none, all others.
    """
    found = []
    for own in table.pruned:
        if own.label not in table.tests:
            continue
        rivals = [row for row in table.pruned if _comparable(row, own) and row.label != own.label]
        pure = [row for row in rivals if row.label in table.tests]
        for rival in pure or rivals:
            mine, theirs = own.mean(own.label), rival.mean(own.label)
            if mine and theirs and math.isfinite(mine) and math.isfinite(theirs):
                change = mine / theirs - 1
                found.append(Effect(own.label, rival.label, own.method, own.setting, change))
    return found


def _comparable(row: Row, other: Row) -> bool:
    alike = row.runs[0].settings == other.runs[0].settings
    calibrated = row.runs[0].calibration != NONE
    return alike and calibrated and (row.method, row.setting) == (other.method, other.setting)


def settings(table: Table) -> list[str]:
    """What occurs in the table of `50%`, `4:8`, `2:4`, ..., from the loosest to the strictest."""
    rows = sorted(table.pruned, key=lambda row: row.order)
    return list(dict.fromkeys(row.setting for row in rows))


def mean_change(changes: Iterable[float]) -> float:
    """Geometric mean of relative changes."""
    logs = [math.log1p(change) for change in changes]
    return math.expm1(sum(logs) / len(logs))


def compared(change: float) -> str:
    """`9% lower`, `0.8% higher`, `about equal`."""
    if abs(change) < NEGLIGIBLE:
        return "about equal"
    size = f"{abs(change):.0%}" if abs(change) >= 0.0995 else f"{abs(change):.1%}"
    return f"{size} {'lower' if change < 0 else 'higher'}"


def language_finding(table: Table, shown: Iterable[str] | None = None) -> str:
    """What calibrating on the right language saves, for each setting; empty where not measured."""
    found = effects(table)
    parts = []
    for setting in shown or settings(table):
        changes = [effect.change for effect in found if effect.setting == setting]
        if changes:
            parts.append(f"{compared(mean_change(changes))} at {setting}")
    if not parts:
        return ""
    pairs = {(effect.test, effect.other) for effect in found}
    if len(pairs) == 1:
        how = "on {} rather than on {}".format(*pairs.pop())
    else:
        how = "on the language itself rather than on another"
    return f"Calibrated {how}, perplexity is {_listed(parts)}"


def cost_finding(table: Table, shown: Iterable[str] | None = None) -> str:
    """What pruning costs at best, for each setting, mean over the test sets.

    On every test set a method counts with the calibration that suits it best.
    """
    best: dict[str, tuple[float, str]] = {}
    for setting in shown or settings(table):
        lowest: dict[str, dict[str, float]] = {}
        for row in (row for row in table.pruned if row.setting == setting):
            for test in table.tests:
                rise = table.rise(row, test)
                if rise is not None and math.isfinite(rise):
                    of_method = lowest.setdefault(row.method, {})
                    of_method[test] = min(rise, of_method.get(test, rise))
        costs = [
            (mean_change(rises.values()), method)
            for method, rises in lowest.items()
            if len(rises) == len(table.tests)
        ]
        if costs:
            best[setting] = min(costs)
    methods = {method for _, method in best.values()}
    if len(methods) == 1:
        parts = [f"{cost:+,.0%} at {setting}" for setting, (cost, _) in best.items()]
        return f"Perplexity over dense with {methods.pop()}, the best here, is {_listed(parts)}"
    parts = [f"{cost:+,.0%} at {setting} ({by})" for setting, (cost, by) in best.items()]
    return f"Perplexity over dense is at best {_listed(parts)}" if parts else ""


def best_finding(table: Table) -> str:
    """Which method keeps the perplexity lowest at the strictest setting."""
    strictest = settings(table)[-1]
    test = next(iter(table.tests))
    rows = [row for row in table.pruned if row.setting == strictest and row.mean(test) is not None]
    if not rows:
        return ""
    best = min(rows, key=lambda row: row.mean(test))
    return f"{best.method} keeps perplexity on {test} lowest at {strictest}: {best.mean(test):.4g}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
