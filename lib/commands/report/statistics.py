"""Which differences between runs are significant, paired by window and corrected by Holm's rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from ...run.results import NONE
from ...util.errors import first_of
from ...util.markdown import EMPTY
from ...util.statistics import LIMIT, MeanInterval, holm, mean_interval
from .table import DENSE, dense_lines, row_keys

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Losses = Mapping[Path, Mapping[str, Mapping[str, ndarray]]]  # {folder: `read_losses`}
ONE_KEY = ["calibrated_on"], ["method"]  # by which rows differ that are compared
COMPARED = {"loss": "perplexity", "kl": "kl"}  # {figure by window: column of the table}


def paired(
    one: Series, other: Series | None, losses: Losses, figure: str
) -> tuple[ndarray, ndarray, ndarray] | None:
    """Return a figure of one line minus that of another on the same windows, and of these the
    documents and counted tokens.

    Shapes: (seeds, windows), (windows,), (windows,). Common seeds are paired; a model without a
    seed is paired with each. Returns None without a common seed, or without figures by window.
    """
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
        np.stack([of.get(seed, next(iter(of.values())))[figure] for seed in seeds]).astype(float)
        for of in kept
    ]
    values = each[0] - each[1] if len(each) > 1 else each[0]
    measured = np.isfinite(values).all(0)
    windows = next(iter(kept[0].values()))
    tokens = windows.get("tokens", np.ones(len(measured)))  # of earlier versions: texts, cut evenly
    if not measured.any():
        return None
    return values[:, measured], windows["document"][measured], tokens[measured]


def add_intervals(table: DataFrame, losses: Losses) -> None:
    """Add 95% intervals to a table of `tables`: perplexity_low, perplexity_high, kl_low, kl_high.

    That of a perplexity is of the loss minus the dense model's, if it is in the table: texts that
    are hard for both models do not widen it.
    """
    dense = dense_lines(table)
    for index, line in table.iterrows():
        over = dense.get(index) if line["type"] != DENSE else None
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

    Rows that differ only in the calibration text are compared, rows that differ only in the method
    (a method that reads no text with each text), and every row with that of `against`: `dense`, or
    a run's folder. `difference` is a row's figure minus the other's, with `low`, `high`, and `p` by
    Holm's rule over all lines. Adds columns perplexity_best and kl_best to `table`: whether a cell
    is significantly below all rows that differ only in the calibration text.
    """
    import pandas

    keys, lines = row_keys(table), []
    problems: dict[str, list[str]] = defaultdict(list)
    by_row = table.reset_index().groupby(keys, sort=False)
    rows = [row.set_index("measured_on") for _, row in by_row]
    for one, other in combinations(rows, 2):
        if is_named(one, against) > is_named(other, against):  # the named one is subtracted
            one, other = other, one
        apart = [key for key in keys if one[key].iloc[0] != other[key].iloc[0]]
        texts = {one["calibrated_on"].iloc[0], other["calibrated_on"].iloc[0]}
        by_text = apart == ["calibrated_on"] and NONE not in texts
        by_method = apart == ["method"] or (apart == ["method", "calibrated_on"] and NONE in texts)
        if not (by_text or by_method) and is_named(one, against) == is_named(other, against):
            continue
        names = [row_name(row.iloc[0], keys) for row in (one, other)]
        tests = [test for test in one.index if test in other.index]
        problem = None if tests else "no common test windows"
        for test, figure in product(tests, COMPARED):
            first, second = one.loc[test], other.loc[test]
            pair = paired(first, second, losses, figure)
            line = {"one": first["index"], "other": second["index"], "by_text": by_text}
            line |= {"measured_on": test, "figure": figure} | dict(first[keys])
            line |= {"minus": second[apart[0]] if apart in ONE_KEY else names[1]}
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


def row_name(row: Series, keys: Sequence[str]) -> str:
    return " ".join(dict.fromkeys(row[key] for key in keys if row[key] not in (NONE, EMPTY)))


def is_named(row: DataFrame, against: str | None) -> bool:
    """Return whether a row is that of `against`: `dense`, or a run's folder."""
    first = row.iloc[0]
    if against in (None, DENSE):
        return against == first["type"]
    return Path(against).resolve() in {folder.resolve() for folder in first["runs"].values()}
