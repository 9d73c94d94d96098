"""Time of each method in forward passes, and beside its floor.

    python benchmarks/passes.py MODEL TEXT.jsonl [--dtype ...] [--blocks N]

The unit is one forward pass of the same windows through the same blocks by transformers alone,
without the head. All runs take turns in one process, and the smallest time of each counts.

The floor of a method is what it must do: two passes (one in the dense model or to observe, one
through the changed blocks), its sums over tokens, and the products and factorizations of its
solution, each as fast as a plain float32 product of the same shapes. Lookups of scales, rounding
and masks count nothing. Time is told apart by kind: passes, sums, solving.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.calibration.allocation import allocate
from lib.calibration.inputs import Group
from lib.calibration.planned_inputs import SharedInput, expected_inputs
from lib.data.windows import WindowSpec
from lib.formats.registry import FORMATS, GRIDS
from lib.methods import admm
from lib.methods.gptq import GPTQ
from lib.methods.registry import method_of
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.device import default_batch_size
from lib.prune import Pruner, windows_of_texts
from lib.run.record import processor
from lib.stages.quantize import Quantizer, quantize


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


def timed(owner: Any, name: str, kind: str, spent: Counter[str]) -> None:
    """Add the seconds of a method to those of its kind of work."""
    plain = getattr(owner, name)

    def run(*args, **kinds):
        start = time.perf_counter()
        try:
            return plain(*args, **kinds)
        finally:
            spent[kind] += time.perf_counter() - start
            spent[f"{kind}, calls"] += 1

    setattr(owner, name, run)


def batch_size(windows, model) -> int:
    return default_batch_size(torch.device("cpu"), windows.shape[1], model.config.hidden_size)


RUNS: dict[str, Callable] = {
    "one pass": one_pass,
    "Wanda": lambda *a: pruned(*a, "wanda", "unstructured"),
    "Wanda 2:4": lambda *a: pruned(*a, "wanda", "2:4"),
    "SparseGPT": lambda *a: pruned(*a, "sparsegpt", "unstructured"),
    "ADMM": lambda *a: pruned(*a, "admm", "unstructured"),
} | {f"Quantizing to {name}": partial(quantized, name=name) for name in GRIDS}
PARTS = (
    (Group, "observe", "sums"),
    (Pruner, "solve", "solving"),
    (Quantizer, "solve", "solving"),
    (admm, "masked", "masks"),  # counted
)


def work(name: str, each: SharedInput, tokens: int, iterations: float) -> tuple[float, float]:
    """Return the operations of a method's sums and of its solution for the layers of an input.

    `iterations` of ADMM, on average.
    """
    n, m = each.width, each.outputs
    square, product = 2 * n**2 * tokens, 2 * n**2 * m
    factor, half = n**3 / 3, square / 2  # X^T X is symmetric
    error = 2 * n * tokens * min(n, m) if each.ends else square
    if name == "SparseGPT":
        return half, factor + product / 2
    if name == "ADMM":  # two factorizations, an inverse; B, constant, residual, least steps
        return half + error, 4 * factor + (3 + iterations + 3) * product
    if name.startswith("Quantizing"):
        steps = GPTQ.refinements + GPTQ.sweeps
        return half + error, 2 * factor + (steps + 1 / 2) * product
    return 0, 0


def rate(rows: int, inner: int, columns: int) -> float:
    """Return the operations per second of a plain float32 product, the best of three."""
    a, b = torch.rand(rows, inner), torch.rand(inner, columns)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(seconds)


def floors(model, tokens: int, one: float, iterations: float) -> dict[str, dict[str, float]]:
    """Return the least seconds of each method by kind of work, given those of a pass."""
    blocks = BlockRunner(model, torch.device("cpu"))
    [inputs] = expected_inputs(model, blocks.name)  # of one kind of block
    at_once = min(tokens, 2048)
    found, rates = {}, {}
    for each in inputs:
        of_sums = rate(each.width, at_once, each.width)
        rates[each] = of_sums, rate(each.width, each.width, each.outputs)
    for name in RUNS:
        least = {"passes": 2 * one, "sums": 0.0, "solving": 0.0}
        for each in inputs:
            counts = work(name, each, tokens, iterations)
            seconds = (count / speed for count, speed in zip(counts, rates[each], strict=True))
            for kind, of_block in zip(("sums", "solving"), seconds, strict=True):
                least[kind] += len(blocks.blocks) * of_block
        found[name] = least
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="beginnings of names of runs")
    parser.add_argument("--blocks", type=int, help="use only the first blocks of the model")
    parser.add_argument("--json", type=Path, help="file to add the seconds to")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.eval().requires_grad_(False)
    model.model.layers = model.model.layers[: args.blocks]
    model.config.num_hidden_layers = len(model.model.layers)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [json.loads(line)["text"] for line in args.text.open(encoding="utf-8")]
    windows = windows_of_texts(texts, WindowSpec(tokenizer, args.seqlen), args.windows)
    names = [name for name in RUNS if name == "one pass" or name.startswith(tuple(args.only))]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    one_pass(model, windows[:2])
    kinds: dict[str, dict[str, float]] = {}
    iterations = 0.0  # of ADMM, if it runs
    spent: Counter[str] = Counter()
    for owner, name, kind in PARTS:
        timed(owner, name, kind, spent)
    for _ in range(args.rounds):
        for name in names:
            own = copy.deepcopy(model)
            spent.clear()
            start = time.perf_counter()
            RUNS[name](own, windows)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
            if seconds[name][-1] == min(seconds[name]):
                kinds[name] = {kind: spent[kind] for kind in ("sums", "solving")}
                kinds[name]["passes"] = seconds[name][-1] - sum(kinds[name].values())
            if name == "ADMM":
                layers = sum(1 for _ in BlockRunner(own, torch.device("cpu")).each_linear())
                iterations = spent["masks, calls"] / layers
    best = {name: min(each) for name, each in seconds.items()}
    unit = 2 * best["one pass"]
    least = floors(model, windows.numel(), best["one pass"], iterations)
    print(
        f"{args.dtype}, {args.windows} windows of {args.seqlen}, {torch.get_num_threads()} threads"
    )
    print("| | seconds | of two passes | passes | sums | solving | floor | of the floor |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in names[1:]:
        floor = sum(least[name].values())
        each = (f"{kinds[name][k]:.1f} ({least[name][k]:.1f})" for k in least[name])
        row = f"{best[name]:.1f}", f"{best[name] / unit:.2f}", *each, f"{floor:.1f}"
        print(f"| {name} | {' | '.join(row)} | {best[name] / floor:.2f} |")
    if args.json:
        found = json.loads(args.json.read_text("utf-8")) if args.json.is_file() else []
        facts = {"model": args.model, "blocks": len(model.model.layers)}
        facts |= {"dtype": args.dtype, "windows": args.windows, "seqlen": args.seqlen}
        facts |= {"threads": torch.get_num_threads(), "processor": processor()}
        facts |= {"seconds": seconds, "kinds": kinds, "floor": least}
        args.json.write_text(json.dumps([*found, facts], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
