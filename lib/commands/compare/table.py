"""What a comparison says: a table by text and file, pairs of files, and a sentence on each file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ...util.files import write_text
from ...util.markdown import EMPTY, escape, padded_table
from ...util.statistics import LIMIT, SHARES, MeanInterval, holm, mean_interval, ratio_interval

LOSS, KL = "bits per byte", "KL"
NAMES = ["Text", "File"]
BITS, OVER, SAME = "Bits per byte, ↓", "Over the reference (%), ↓", "Same first token (%), ↑"
OF_TEXT = [BITS, OVER, *(f"KL, {name}, ↓" for name in ("mean", *SHARES)), SAME]
OF_FILE = ["MB", "Prompt (tokens/s), ↑", "Generation (tokens/s), ↑"]
PAIR_HEAD = ["Text", "File", "Against", "Figure", "Difference", "p (Holm)"]
MARKS, COLORS = "os^Dv", 10  # of files in the picture: another mark once colors repeat
MOST_PAIRS = 40  # that are printed; a table in --out has all
NOTES = (
    "Bits per byte: of each file on its own tokens. KL: nats per token from the reference. "
    "Brackets: 95% intervals, paired over documents. Bold: significantly lower than all other "
    "files but the reference, after Holm's correction over all pairs."
)
Pair = tuple[str, str, str, str, MeanInterval]  # text, file, against, figure, difference
Row = dict[str, str]  # {column: cell}


class Figures:
    """The figures of a record by text and file."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.reference = record, record["asked"]["reference"]
        self.texts, self.labels = record["asked"]["texts"], [*record["asked"]["files"]]
        self.megabytes = {n: size / 1e6 for n, (size, _) in record["asked"]["files"].items()}
        self.others = [label for label in self.labels if label != self.reference]

    def losses(self, label: str, text: str) -> np.ndarray:
        return np.array(self.record["losses"][label][text])

    def bits(self, label: str, text: str) -> float:
        return self.losses(label, text).sum() / math.log(2) / sum(self.texts[text]["bytes"])

    def over(self, label: str, other: str, text: str) -> MeanInterval:
        """Return by how much a file's loss is above that of another, as a share."""
        return ratio_interval(self.losses(label, text), self.losses(other, text))

    def compared(self, label: str, text: str) -> dict[str, Any] | None:
        return self.record["compared"].get(label, {}).get(text)

    def kl_over(self, label: str, other: str, text: str) -> MeanInterval | None:
        """Return the difference of the KL of two files, if both are of the same tokens."""
        both = [self.compared(each, text) for each in (label, other)]
        if not all(both) or any(each["renormalized"] for each in both):
            return None
        values = np.subtract(*(each["kl_by_document"] for each in both))
        documents, tokens = np.arange(len(values)), np.array(both[0]["tokens"], float)
        return mean_interval(values[None], documents, tokens)

    def pairs(self) -> list[Pair]:
        """Return the differences of the others among each other, with p corrected over all."""
        found = []
        for text in self.texts:
            for one, other in combinations(self.others, 2):
                found.append((text, one, other, LOSS, self.over(one, other, text)))
                if apart := self.kl_over(one, other, text):
                    found.append((text, one, other, KL, apart))
        corrected = holm([line[-1].p for line in found])
        return [
            (*line, apart._replace(p=float(p)))
            for (*line, apart), p in zip(found, corrected, strict=True)
        ]


def print_table(record: Mapping[str, Any]) -> dict[str, str]:
    """Print the tables, notes and sentences; return all as Markdown and the main table as CSV."""
    figures = Figures(record)
    pairs = figures.pairs()
    rows = [_row(figures, text, of, pairs) for text in figures.texts for of in figures.labels]
    parts = [_table(rows, [*NAMES, *OF_TEXT]), NOTES]
    parts.append(_table(rows[: len(figures.labels)], [NAMES[1], *OF_FILE]))
    parts += ["\n".join(f"- {line}" for line in lines)] if (lines := _lines(figures)) else []
    printed = [*parts]
    if pairs:
        body = [[*map(escape, line[:4]), _difference(line), f"{line[-1].p:.2g}"] for line in pairs]
        parts.append(padded_table(PAIR_HEAD, body, left=4))
        many = f"the differences of pairs are {len(pairs)} lines, which table.md in --out has"
        printed.append(parts[-1] if len(pairs) <= MOST_PAIRS else many)
    print("", "\n\n".join(printed), "", sep="\n", flush=True)
    markdown = "\n\n".join(parts)
    table, signs = io.StringIO(), re.compile(rf"\*\*|{EMPTY}|(?<=\d),(?=\d)")
    cells = [[signs.sub("", cell) for cell in row.values()] for row in rows]
    csv.writer(table, lineterminator="\n").writerows([rows[0], *cells])
    return {"md": f"{markdown}\n", "csv": table.getvalue()}


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a table of the columns that have a figure."""
    columns = [each for each in columns if any(row[each] != EMPTY for row in rows)]
    left = sum(each in NAMES for each in columns)
    return padded_table(columns, [[row[each] for each in columns] for row in rows], left)


def _row(figures: Figures, text: str, label: str, pairs: Sequence[Pair]) -> Row:
    speeds = figures.record["speeds"][label]
    cells = [f"{figures.megabytes[label]:,.1f}", *(f"{speed:,.1f}" for speed in speeds)]
    row = dict(zip([*NAMES, *OF_FILE], [escape(text), escape(label), *cells], strict=True))
    best = _best(figures, text, label, pairs)
    row |= dict.fromkeys(OF_TEXT, EMPTY)
    row[BITS] = f"{figures.bits(label, text):.4f}"
    if figures.reference not in (None, label):
        row[OVER] = _share(figures.over(label, figures.reference, text))
    if found := figures.compared(label, text):
        row |= {f"KL, {name}, ↓": f"{value:.4g}" for name, value in found["kl"].items()}
        row[SAME] = f"{100 * found['equal']:.2f}"
    for name in best:
        row[name] = f"**{row[name]}**"
    return row


def _best(figures: Figures, text: str, label: str, pairs: Sequence[Pair]) -> list[str]:
    """Return the columns by which a file is significantly below all others but the reference."""
    columns, needed = {LOSS: BITS, KL: "KL, mean, ↓"}, len(figures.others) - 1
    below = [
        figure
        for of, one, other, figure, apart in pairs
        if of == text and apart.p < LIMIT and label == (one if apart.mean < 0 else other)
    ]
    return [column for name, column in columns.items() if 0 < needed == below.count(name)]


def _share(found: MeanInterval) -> str:
    interval = f" ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
    return f"{100 * found.mean:+.2f}" + interval * math.isfinite(found.low)


def _difference(pair: Pair) -> str:
    *_, figure, apart = pair
    if figure == LOSS:
        return f"{_share(apart)}%"
    return f"{apart.mean:+.4f} ({apart.low:+.4f} to {apart.high:+.4f}) nats"


def _lines(figures: Figures) -> list[str]:
    """Return a sentence on each file, and on what was left out of its comparison."""
    lines = []
    for label in figures.others if figures.reference else ():
        clauses = []
        for text in figures.texts:
            found = figures.over(label, figures.reference, text)
            sign, word = (-1, "fewer") if found.mean < 0 else (1, "more")
            low, high = sorted(100 * sign * end for end in (found.low, found.high))
            share = f"{100 * sign * found.mean:.2f}% ({low:.2f} to {high:.2f}) {word}"
            subject, than = (f"{label} needs ", f" bits per byte than {figures.reference}")
            if clauses:
                subject = than = ""
            unclear = ", which is not significant" * (not found.p < LIMIT)
            clauses.append(f"in {text} {subject}{share}{than}{unclear}")
        lines.append("; ".join(clauses))
        lines += filter(None, (_left_out(figures, label, text) for text in figures.texts))
    return lines


def _left_out(figures: Figures, label: str, text: str) -> str:
    found, count = figures.compared(label, text), figures.texts[text]["documents"]
    if not found:
        return f"{label}, {text}: it has other tokens, so bits per byte alone are compared"
    if not found["renormalized"]:
        return ""
    of_reference, of_file = found["left_out"]
    return (
        f"{label}, {text}: KL is among the tokens of both, on {len(found['documents'])} of {count} "
        f"documents; left out are {of_reference:.2%} of the reference's probability, and "
        f"{of_file:.2%} of the file's (with fewer tokens, bits per byte fall by themselves)"
    )


def write_files(out: Path, record: Mapping[str, Any], tables: Mapping[str, str]) -> None:
    """Write the tables, and a picture where matplotlib is installed."""
    for ending, text in tables.items():
        write_text(out / f"table.{ending}", text)
    if find_spec("matplotlib"):
        _draw(Figures(record)).savefig(out / "sizes.png", dpi=120)


def _draw(figures: Figures) -> Any:
    """Draw the loss of files over their sizes, a panel for each text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(figures.texts) + 2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(figures.texts), squeeze=False)[0]
    for axes, text in zip(panels, figures.texts, strict=True):
        for number, label in enumerate(figures.labels):
            place = figures.megabytes[label], figures.bits(label, text)
            mark = MARKS[number // COLORS % len(MARKS)]
            axes.plot(*place, mark, markersize=6, label=label)
        axes.set(title=text, xlabel="MB", ylabel="bits per byte")
        axes.grid(alpha=0.3)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right", frameon=False, fontsize=8)
    return figure
