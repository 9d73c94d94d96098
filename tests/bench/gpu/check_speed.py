"""Seconds: of a 7B model's blocks by each method, of evaluation; where a block's time goes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from functools import partial
from typing import Any

import bench_block
import torch
from check_kernels import kernel_of
from measure import random_llama, reset_peak, wait_for
from sizes import Size
from torch.nn import functional as F
from torch.profiler import ProfilerActivity

from lib.eval import perplexities
from lib.methods import sparsegpt
from lib.methods.column_loop import column_loop
from lib.model.blocks import BlockRunner
from lib.model.pretrained import BATCH_TOKENS
from lib.util.host import gib

SEVEN = ["--hidden", "4096", "--inner", "11008", "--nsamples", "128", "--seqlen", "4096"]
LITTLE = ["--hidden", "128", "--inner", "352", "--nsamples", "4", "--seqlen", "64"]
BLOCKS = 32  # of a 7B model
SHOWN = 8  # operations of a trace
LOSS_OFF = 0.01  # nats, of bfloat16 logits from those of the model's own forward


def shape_of(device: str, size: Size) -> list[str]:
    """Flags of bench_block.py."""
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return [*size.of(SEVEN, LITTLE), "--dtype", dtype, "--device", device]


def check_block(
    device: str, size: Size, method: str, kind: str = "unstructured", fused: bool = True
) -> dict[str, Any]:
    """Of a 7B model with random weights, 128 windows of 4,096 tokens; `fused`: by the kernel."""
    there = torch.device(device)
    if method == "sparsegpt" and fused and there.type == "cuda":
        kernel_of(there)  # or this would be another way of measuring the steps
    args = bench_block.build_parser().parse_args(shape_of(device, size))
    sparsegpt.column_loop = column_loop if fused else lambda _: None
    reset_peak(there)
    spent = bench_block.block_seconds(args, there, method, kind)
    value = statistics.median(spent)
    found: dict[str, Any] = {"s a block": value, f"s for {BLOCKS}": value * BLOCKS}
    if there.type == "cuda":
        found["allocated"] = gib(torch.cuda.max_memory_allocated(there))
        found["reserved"] = gib(torch.cuda.max_memory_reserved(there))
    return found


def check_profile(device: str, size: Size) -> dict[str, Any]:
    """One trace of SparseGPT on blocks of 7B: what the GPU does, and how long it has nothing to do.

    With few windows, so that what does not depend on them shows.
    """
    there = torch.device(device)
    few = [*shape_of(device, size), "--nsamples", size.of("8", "2")]
    args = bench_block.build_parser().parse_args(few)
    bench_block.block_seconds(args, there, "sparsegpt", "unstructured")  # kernels are built
    gpu = there.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as trace:
        bench_block.block_seconds(args, there, "sparsegpt", "unstructured")
        wait_for(there)
    spent = time.perf_counter() - start
    times: Counter = Counter()
    for event in trace.key_averages():
        on_gpu = str(event.device_type).endswith("CUDA")
        if on_gpu == gpu and not event.is_user_annotation:
            name = event.key.removeprefix("void ").partition("<")[0].partition("(")[0][:60]
            times[name] += event.self_device_time_total if gpu else event.self_cpu_time_total
    found: dict[str, Any] = {"s": spent, "s at work": sum(times.values()) / 1e6}
    for call in ("LaunchKernel", "StreamSynchronize", "MemcpyAsync", "cudaMalloc"):
        found[call] = sum(event.count for event in trace.key_averages() if call in event.key)
    for name, value in times.most_common(SHOWN):
        found[name] = {"s": value / 1e6, "share": value / max(1, sum(times.values()))}
    return found


@torch.no_grad()
def check_evaluation(device: str, size: Size, vocabulary: int) -> dict[str, Any]:
    """Two blocks of 7B and its head, two windows at a time; the head's share, and its losses."""
    there = torch.device(device)
    vocabulary = vocabulary if not size.small else vocabulary // 100
    hidden, inner, seqlen = size.of((4096, 11008, 4096), (128, 352, 64))
    torch.manual_seed(0)
    with there:
        model = random_llama(hidden, inner, 2, vocabulary, seqlen, head=128)
        model = model.to(torch.bfloat16 if there.type == "cuda" else torch.float32).eval()
    runner = BlockRunner(model, there)
    windows = torch.randint(vocabulary, (4, seqlen))
    batch_size = max(1, min(2, BATCH_TOKENS[there.type] // seqlen))
    measure = partial(perplexities, runner, [windows], batch_size)
    measure()
    reset_peak(there)
    calls: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: calls.append(out.nbytes))
    start = time.perf_counter()
    nats = measure()[0].nats / 4 / (seqlen - 1)
    spent = time.perf_counter() - start
    found: dict[str, Any] = {"tokens/s": windows.numel() / spent, "s": spent}
    handle.remove()
    found |= {"calls of the head": len(calls), "MiB of logits in each": max(calls) / 2**20}
    if there.type == "cuda":
        found["peak"] = gib(torch.cuda.max_memory_allocated(there))
    start = time.perf_counter()
    for batch in windows.split(batch_size):
        model.model(batch.to(there), use_cache=False)
    wait_for(there)
    found["s, blocks alone"] = time.perf_counter() - start
    exact = sum(own_loss(model, window.to(there)) for window in windows) / 4
    found["nats off"] = abs(nats - exact)
    assert found["nats off"] < LOSS_OFF, f"{nats} nats, but {exact} by the model's own forward"
    return found


def own_loss(model: torch.nn.Module, window: torch.Tensor) -> float:
    """Mean loss of one window by the model's own forward, in float64, some positions at a time."""
    hidden = model.model(window[None], use_cache=False).last_hidden_state[0, :-1]
    parts = zip(hidden.split(256), window[1:].split(256), strict=True)
    losses = [
        F.cross_entropy(model.lm_head(part).double(), targets, reduction="sum").item()
        for part, targets in parts
    ]
    return sum(losses) / len(hidden)
