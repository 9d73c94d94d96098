"""What no pruning of this kind can be faster than: two bare forward passes, and the X^T X products.

Measured in a process of its own: `python tests/bench/bench_limit.py REPORT.json FLAGS-OF-main.py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor, nn

from lib.run.check import check
from lib.run.flags import build_parser
from lib.run.load import load


def best_of(times: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(width: int, tokens: int = 2048) -> float:
    """Floating-point operations per second of a product (width, tokens) x (tokens, width)."""
    x = torch.randn(tokens, width)
    return 2 * tokens * width**2 / best_of(5, lambda: x.T @ x)


def distinct_inputs(model: nn.Module, blocks: nn.ModuleList, windows: Tensor) -> list[int]:
    """Widths of the inputs of the blocks' linears, each input once however many share it."""
    widths: list[int] = []
    alive: list[Tensor] = []  # kept, so that no address is used twice

    def note(_, args):
        if not any(args[0] is other for other in alive):
            alive.append(args[0])
            widths.append(args[0].shape[-1])

    linears = [part for part in blocks.modules() if isinstance(part, nn.Linear)]
    handles = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        model.base_model(windows[:1, :8])
    finally:
        for handle in handles:
            handle.remove()
    return widths


@torch.no_grad()
def measure(argv: list[str]) -> dict[str, float]:
    """Seconds: of two passes over the calibration windows, and of X^T X of all inputs."""
    job = check(build_parser().parse_args(argv))
    with ExitStack() as at_end:
        loaded = load(job, at_end)
    windows, model = job.texts.windows, loaded.model
    batches = windows.split(job.batch_size)
    forward = best_of(2, lambda: [model.base_model(ids, use_cache=False) for ids in batches])
    widths = distinct_inputs(model, loaded.blocks, windows)
    rates = {width: product_rate(width) for width in set(widths)}
    gram = sum(2 * windows.numel() * width**2 / rates[width] for width in widths)
    rate = rates[max(rates)] / 1e9
    return {"forward": 2 * forward, "gram": gram, "gflops": rate}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(sys.argv[2:])), "utf-8")
