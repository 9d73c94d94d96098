"""This project and llm-compressor prune one model on the same windows, turn by turn.

    python -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1
    python benchmarks/bench.py SmolLM2-135M --data en --peer PEER/bin/python --out FOLDER

Prints a record of each method and pattern: the seconds of pruning alone in each round, the peak
resident bytes, and the perplexity of what both saved. `--out` has all in bench.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import ROOT, child
from safetensors.torch import save_file

from lib.run.check import check
from lib.run.flags import build_parser
from lib.util.cli import add_debug_flag, run


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="Hub name or local folder")
    parser.add_argument("--data", required=True, metavar="TEXTS", help="to calibrate and test on")
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="has llm-compressor")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--nsamples", default="32", help="windows (default: 32)")
    parser.add_argument("--seqlen", default="512", help="window in tokens (default: 512)")
    parser.add_argument("--eval_windows", default="16", help="of the test text (default: 16)")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--types", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True)
    common = ["--device", "cpu", "--dtype", "float32", "--calibration_data", args.data]
    common += ["--seqlen", args.seqlen, "--completions", "0", "--save", str(args.out / "run")]
    model = ["--model", args.model, "--nsamples", args.nsamples]
    windows, saved, records = args.out / "windows.safetensors", args.out / "saved", []
    flags = [*model, *common, "--prune_method", args.methods[0]]
    ids = check(build_parser().parse_args(flags)).windows.calibration.ids
    save_file({"windows": ids.contiguous()}, windows)

    def run_here(*flags: object) -> dict[str, Any]:
        child(sys.executable, ROOT / "main.py", *common, *flags)
        return json.loads((args.out / "run/results.json").read_text("utf-8"))

    def run_peer(method: str, kind: str, *save: Path) -> dict[str, Any]:
        report, script = args.out / "peer.json", ROOT / "benchmarks/bench_peer.py"
        child(args.peer, script, args.model, windows, method, kind, "0.5", report, *save)
        return json.loads(report.read_text("utf-8"))

    for method, kind in product(args.methods, args.types):
        record = {"method": method, "type": kind, "here": [], "peer": []}
        for number in range(args.rounds):
            brief = ["--eval_windows", "1" if number else args.eval_windows]
            flags = ["--prune_method", method, "--sparsity_type", kind, *brief]
            ours = run_here(*model, *flags)
            record["here"].append([ours["seconds"]["prune"], ours["peak_memory"]["host"]])
            theirs = run_peer(method, kind, *[] if number else [saved])
            record["peer"].append([theirs["seconds"], theirs["peak"]])
            if not number:
                its = run_here("--model", saved, "--eval_only", *brief)
                both = (each["evaluation"][0]["perplexity"] for each in (ours, its))
                record |= dict(zip(("perplexity", "its_perplexity"), both, strict=True))
        records.append(record | {"processor": ours["processor"], "versions": ours["versions"]})
        print(json.dumps(records[-1]), flush=True)
        (args.out / "bench.json").write_text(json.dumps(records, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
