"""Seconds that pruning takes for each block of a LLaMA of any shape, with random weights.

    python tests/bench/bench_block.py                              # 7B on a GPU, bfloat16
    python tests/bench/bench_block.py --device cpu --dtype float32 --hidden 256 --inner 688 \
        --seqlen 256

Needs neither a model nor a text: time depends on neither. Of a few blocks that are pruned, the
first, which warms up, and the last, whose outputs nobody needs, don't count; `--blocks` of a whole
model are told in proportion. SparseGPT runs with its column loop as a kernel, where the device
takes it, and in steps, in turn. Not a test: run it by hand.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from measure import random_llama, reset_peak, wait_for

from lib.distributed.context import DistContext
from lib.methods import sparsegpt
from lib.methods.column_loop import column_loop
from lib.methods.registry import MethodSpec
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.pretrained import BATCH_TOKENS, pick_device
from lib.prune import Pruner
from lib.pruning.allocation import uniform
from lib.util.command import add_debug_flag, run
from lib.util.host import gib, peak_memory

VOCABULARY = 1000
DEPTH = 4  # blocks that are run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=4096, help="width (default: 4096)")
    parser.add_argument("--inner", type=int, default=11008, help="of the MLP (default: 11008)")
    parser.add_argument("--blocks", type=int, default=32, help="of the whole model (default: 32)")
    parser.add_argument("--nsamples", type=int, default=128, help="windows (default: 128)")
    parser.add_argument("--seqlen", type=int, default=4096, help="window in tokens (default: 4096)")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--types", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--dtype", default="bfloat16", help="of the model (default: bfloat16)")
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (default: cuda:0)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    add_debug_flag(parser)
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    print("| method | type | column loop | s per block | s for all | peak device memory |")
    print("|---|---|---|---|---|---|")
    for method in args.methods:
        for kind in args.types:
            loops = {"in steps": lambda _: None}
            if method == "sparsegpt" and column_loop(device):
                loops["kernel"] = column_loop
            times: dict[str, list[float]] = {name: [] for name in loops}
            reset_peak(device)  # or it is that of the rows before
            for _ in range(args.rounds):
                for name, loop in loops.items():
                    sparsegpt.column_loop = loop
                    times[name] += block_seconds(args, device, method, kind)
            for name, spent in times.items():
                seconds = statistics.median(spent)
                cells = [method, kind, name if method == "sparsegpt" else ""]
                cells += [f"{seconds:.2f}", f"{seconds * args.blocks:.1f}"]
                peak = peak_memory(device).get("device")
                print(f"| {' | '.join([*cells, gib(peak) if peak else ''])} |", flush=True)


def block_seconds(
    args: argparse.Namespace, device: torch.device, method: str, kind: str
) -> list[float]:
    """Of each inner block of a new random model, whose windows are all on the device."""
    torch.manual_seed(0)
    shape = args.hidden, args.inner, DEPTH, VOCABULARY, args.seqlen
    with torch.device(device):
        model = random_llama(*shape, head=128).to(getattr(torch, args.dtype)).eval()
    windows = torch.randint(VOCABULARY, (args.nsamples, args.seqlen))
    batch_size = max(1, BATCH_TOKENS[device.type] // args.seqlen)
    ends: list[float] = []

    def ended(_: int) -> None:
        wait_for(device)
        ends.append(time.perf_counter())

    runner, sparsity = BlockRunner(model, device), Sparsity.parse(kind, 0.5)
    pruner = Pruner(
        runner,
        MethodSpec(method),
        uniform(runner, sparsity),
        dist=DistContext(device, alone=True),
    )
    pruner.run(windows, batch_size, state_device=device, on_progress=ended)
    return [after - before for before, after in zip(ends, ends[1:-1], strict=False)]


if __name__ == "__main__":
    sys.exit(run(main))
