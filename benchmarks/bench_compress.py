"""What `compress` makes: its steps, seconds, peak memory, size, tokens per second.

    python benchmarks/bench_compress.py LABEL MODEL OUT --json FILE -- --data uk

Runs the command and adds a record to FILE. bench_types.py measures OUT.gguf beside llama.cpp's
types (`--files`).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import child

from lib.util.cli import add_debug_flag, run, split_argv

KEPT = "name", "perplexity", "bits_per_byte", "kl", "kl_standard_error", "top1_agreement", "dense"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("label", "model", "out"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args, start = parser.parse_args(own), time.monotonic()
    child(sys.executable, "-m", "lib.commands", "compress", args.model, args.out, *passed_on)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # KiB, of the largest process
    folder = Path(f"{args.out}-compress")
    facts = json.loads((folder / "steps.json").read_text("utf-8"))["facts"]
    results = json.loads((folder / "compressed" / "results.json").read_text("utf-8"))
    recover = results["flags"]["recover"] or 0
    plan = {"windows": facts["nsamples"], "tokens": recover, "tests": facts["tests"]}
    record = {"label": args.label, "seconds": seconds, "peak": 1024 * peak, "plan": plan}
    record |= {"bytes": Path(f"{args.out}.gguf").stat().st_size, "recovery": {}}
    if "recovery" in results:
        kept = "tokens", "seconds", "kept"
        record["recovery"] = {k: v for k, v in results["recovery"].items() if k in kept}
    record["steps"] = results.get("seconds")
    record["evaluation"] = [{k: t[k] for k in KEPT if k in t} for t in results["evaluation"]]
    record["table"] = (folder / "compressed.md").read_text("utf-8")
    records = json.loads(args.json.read_text("utf-8")) if args.json.is_file() else []
    args.json.write_text(json.dumps([*records, record], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
