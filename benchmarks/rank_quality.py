"""Spearman's rank correlation of perplexity with every other figure of pruned models' quality.

    python benchmarks/rank_quality.py RUN [RUN ...]

A RUN is a run's `--save` folder or a folder of them; the dense model is left out. Figures are
signed so that higher is better: where two order the models alike the correlation is 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.commands.report.table import DENSE, TASK, load_runs, tables
from lib.util.cli import run
from lib.util.markdown import padded_table


def main(argv: list[str]) -> None:
    for table in tables(load_runs(argv)):
        for test, models in table[table["type"] != DENSE].groupby("measured_on", sort=False):
            figures = {"perplexity": -models["perplexity"]}
            figures |= {"KL": -models["kl"]} if "kl" in models else {}
            shown = [n for n in models if n.startswith(TASK) and "_stderr" not in n]
            shown = [n for n in ["top1_agreement", *shown] if n in models and "_deviation" not in n]
            figures |= {name.removeprefix(TASK): models[name] for name in shown}
            ranks = models.assign(**figures)[list(figures)].rank()
            line = ranks.corrwith(ranks.pop("perplexity"))
            cells = [f"{test}, {len(models)} models", *(f"{value:.2f}" for value in line)]
            print(padded_table(["", *line.index], [cells]), "\n")


if __name__ == "__main__":
    sys.exit(run(main))
