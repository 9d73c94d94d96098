"""Time of each method in forward passes: python benchmarks/passes.py MODEL TEXT.jsonl [--dtype ...]

The unit is one forward pass of the same windows through the same blocks by transformers alone,
without the head. Wanda needs two, one to observe the inputs and one through the pruned block. All
runs take turns in one process, and the smallest time of each counts. Of Wanda's last run it says
what the masks and the errors by layer took; --profile prints the rest by operation.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.calibration.allocation import allocate
from lib.calibration.output_error import TokenSample
from lib.data.windows import WindowSpec
from lib.formats.registry import FORMATS
from lib.methods.registry import method_of
from lib.methods.sparsity import Sparsity
from lib.methods.wanda import Wanda
from lib.model.blocks import BlockRunner
from lib.model.device import default_batch_size
from lib.prune import Pruner, windows_of_texts
from lib.run.record import processor
from lib.stages.quantize import quantize


def pruned(model, windows, method: str, kind: str) -> None:
    wanted = Sparsity.parse(kind, 0.5 if kind == "unstructured" else None)
    runner = BlockRunner(model, torch.device("cpu"), batch_size=batch_size(windows, model))
    layers = allocate(runner, windows, wanted, "uniform", 0)
    Pruner(runner, method_of(method, kind=kind), layers).run(windows)


def quantized(model, windows, name: str) -> None:
    runner = BlockRunner(model, torch.device("cpu"), batch_size=batch_size(windows, model))
    quantize(runner, windows, FORMATS[name])


@torch.no_grad()
def one_pass(model, windows) -> None:
    for batch in windows.split(batch_size(windows, model)):
        model.model(batch, use_cache=False)


def timed(owner: type, name: str, spent: Counter[str]) -> None:
    """Add the seconds of a method to `spent`."""
    plain = getattr(owner, name)

    def run(*args, **kinds):
        start = time.perf_counter()
        try:
            return plain(*args, **kinds)
        finally:
            spent[name] += time.perf_counter() - start

    setattr(owner, name, run)


def batch_size(windows, model) -> int:
    return default_batch_size(torch.device("cpu"), windows.shape[1], model.config.hidden_size)


RUNS: dict[str, Callable] = {
    "one pass": one_pass,
    "Wanda": lambda *a: pruned(*a, "wanda", "unstructured"),
    "Wanda 2:4": lambda *a: pruned(*a, "wanda", "2:4"),
    "SparseGPT": lambda *a: pruned(*a, "sparsegpt", "unstructured"),
    "ADMM": lambda *a: pruned(*a, "admm", "unstructured"),
    "Quantizing to q4_0": lambda *a: quantized(*a, "q4_0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="beginnings of names of runs")
    parser.add_argument("--profile", action="store_true", help="print what Wanda is spent on")
    parser.add_argument("--json", type=Path, help="file to add the seconds to")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [json.loads(line)["text"] for line in args.text.open(encoding="utf-8")]
    windows = windows_of_texts(texts, WindowSpec(tokenizer, args.seqlen), args.windows)
    names = [name for name in RUNS if name == "one pass" or name.startswith(tuple(args.only))]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    one_pass(model, windows[:2])
    spent: Counter[str] = Counter()
    for owner, name in ((TokenSample, "add"), (Pruner, "solve"), (Wanda, "prune_")):
        timed(owner, name, spent)
    for _ in range(args.rounds):
        for name in names:
            own = copy.deepcopy(model)
            spent.clear()
            start = time.perf_counter()
            RUNS[name](own, windows)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
            if name == "Wanda":
                whole = seconds[name][-1]
                masks = spent["prune_"] / whole
                errors = (spent["add"] + spent["solve"] - spent["prune_"]) / whole
    best = {name: min(each) for name, each in seconds.items()}
    unit = 2 * best["one pass"]
    print(
        f"{args.dtype}, {args.windows} windows of {args.seqlen}, {torch.get_num_threads()} threads"
    )
    print("| | seconds | of two passes |\n|---|---:|---:|")
    for name, each in best.items():
        print(f"| {name} | {each:.2f} | {each / unit:.2f} |")
    if "Wanda" in best:
        print(f"\nWanda: masks {masks:.1%}, errors by layer {errors:.1%} of the time")
    if args.json:
        found = json.loads(args.json.read_text("utf-8")) if args.json.is_file() else []
        facts = {"dtype": args.dtype, "windows": args.windows, "seqlen": args.seqlen}
        facts |= {"threads": torch.get_num_threads(), "processor": processor(), "seconds": seconds}
        if "Wanda" in best:
            facts |= {"masks": masks, "errors": errors}
        args.json.write_text(json.dumps([*found, facts], indent=1) + "\n", "utf-8")
    if args.profile:
        own = copy.deepcopy(model)
        with torch.profiler.profile() as profile:
            RUNS["Wanda"](own, windows)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
