"""Spearman's rank correlation of perplexity with every other figure of pruned models' quality.

    python tests/bench/rank_quality.py tests/bench/results/quality/smollm2.json

A file holds, by the run's name, the evaluation, abilities and fidelity of its results.json; the
dense model is left out. Where both figures order the models alike the correlation is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from lib.report.markdown import padded_table


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a run by name, each higher where the model is better."""
    test, written = results["evaluation"], results["fidelity"][0]["model"]
    found = {"perplexity": -test["perplexity"], "KL": -test["kl"]}
    found["likeliest token"] = test["top1_agreement"]
    for ability in results["abilities"]:
        found[f"{ability['name']} chosen"] = ability["model"]["accuracy"]
        if "said" in ability["model"]:
            found[f"{ability['name']} said"] = ability["model"]["said"]
    found["lines in the language"] = written["language"]
    found["words known"] = written["known_words"]
    found["repetition"] = -written["repeated_4grams"]
    return found | {"variety": written["distinct_2grams"]}


def ranks(values: list[float]) -> np.ndarray:
    """Return the rank of each value, equal ones sharing the mean of theirs."""
    given = np.asarray(values)
    return (given < given[:, None]).sum(1) + (given == given[:, None]).sum(1) / 2


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for file in parser.parse_args(argv).files:
        runs = json.loads(file.read_text("utf-8"))
        models = [figures(results) for name, results in runs.items() if name != "dense"]
        by_figure = {name: ranks([model[name] for model in models]) for name in models[0]}
        first = by_figure.pop("perplexity")
        cells = [f"{np.corrcoef(first, other)[0, 1]:.2f}" for other in by_figure.values()]
        head = ["", *by_figure]
        print(padded_table(head, [[f"{file.stem}, {len(models)} models", *cells]]), "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
