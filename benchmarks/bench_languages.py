"""What quantizing on one language costs each of several: bits per byte and KL, as CSV.

    python benchmarks/bench_languages.py MODEL --texts uk=texts/uk en=texts/en de=texts/de \\
        --out FOLDER --csv FILE -- --quantize q4_0 --seqlen 512 --nsamples 16 --device cpu

MODEL has the tokens of all languages. It is quantized on each text alone, and on a mix of all but
the first in equal parts ("ten mixed" of eleven), and measured on all. Runs are kept in FOLDER, from
which the same command continues; the original's states are computed once.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.commands.sweep.run import main as run_in_sweep
from lib.util.cli import add_debug_flag, run, split_argv

FIGURES = "windows bits_per_byte kl kl_standard_error loss_change loss_change_standard_error"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=SOURCE")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--csv", required=True, type=Path)
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args = parser.parse_args(own)
    texts = dict(each.split("=", 1) for each in args.texts)
    names = list(texts)
    calibration = {name: [texts[name]] for name in names}
    share = round(1 / (len(names) - 1), 4)
    calibration["ten mixed"] = [f"{texts[name]}={share}" for name in names[1:]]
    common = ["--model", args.model, "--completions", "0", *passed_on, "--eval_data"]
    rows = []
    for name, sources in calibration.items():
        folder = args.out / name.replace(" ", "-")
        flags = [*common, *texts.values(), "--calibration_data", *sources, "--save", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        run_in_sweep([str(args.out / "shared"), "--", *flags])
        results = json.loads((folder / "results.json").read_text("utf-8"))
        for test, measured in zip(names, results["evaluation"], strict=True):
            row = {"calibrated_on": name, "trained_tokens": 0, "measured_on": test}
            row |= {figure: measured[figure] for figure in FIGURES.split()}
            rows.append(row | {"dense_bits_per_byte": measured["dense"]["bits_per_byte"]})
    with args.csv.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    sys.exit(run(main))
