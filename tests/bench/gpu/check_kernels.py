"""The Triton kernel against the plain loop, under compute-sanitizer, and the tests for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from check_machine import sanitizer
from measure import medians
from sizes import NotHere, Size
from steps import SAID, Step, in_own_process
from torch import Tensor

from lib.methods.column_loop import (
    TOLERANCE,
    TRIALS,
    column_loop,
    deviation,
    random_block,
    settle_plainly_,
)
from lib.methods.sparsity import Sparsity

ROOT = Path(__file__).resolve().parents[3]
MASKS_OFF = 1e-3  # share of rows whose masks may differ, where two scores nearly tie
NEEDS_GPU = "torch.cuda.is_available()"  # stands in files with tests for a GPU


def kernel_of(device: torch.device) -> Callable:
    """SparseGPT's kernel; on a CPU in Triton's interpreter. AssertionError: what a run warns of."""
    if not find_spec("triton"):
        raise NotHere("triton is not installed")
    if device.type != "cuda":
        from lib.methods.column_kernel import settle_

        return settle_
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        settle_ = column_loop(device)
    assert settle_, "; ".join(str(one.message) for one in warned)
    return settle_


def check_column_kernel(device: str, size: Size) -> dict[str, Any]:
    """Deviations from the plain loop, of values around 1; seconds beside the steps'."""
    there = torch.device(device)
    start = time.perf_counter()
    settle_ = kernel_of(there)
    found: dict[str, Any] = {}
    for sparsity in TRIALS:
        off = deviation(settle_, there, sparsity)
        found[f"off, {named(sparsity)}"] = off
        assert off < TOLERANCE, f"{named(sparsity)}: off by {off:.2g}"
    found["s, first call"] = time.perf_counter() - start
    for rows in size.of((4096, 11008 * 2, 50_257), (11,)):  # of 7B's linears; and an odd number
        for sparsity in TRIALS:
            found[f"{rows} rows, {named(sparsity)}"] = compared(settle_, there, rows, sparsity)
    return found


def compared(
    settle_: Callable, device: torch.device, rows: int, sparsity: Sparsity
) -> dict[str, Any]:
    """One block of columns of a linear of `rows` outputs."""
    block = random_block(128, rows, sparsity)
    plain = [block[0].clone(), block[1].clone()]
    settle_plainly_(*plain, *block[2:], sparsity)
    there = [tensor.to(device) for tensor in block]
    settle_(*there, sparsity)
    values, errors = (tensor.cpu() for tensor in there[:2])
    same = ((errors != 0) == (plain[1] != 0)).all(0)  # of each row, its mask
    off = (values - plain[0])[:, same].abs().max().item()
    share = 1 - same.float().mean().item()
    assert off < 10 * TOLERANCE and share < MASKS_OFF, f"off by {off:.2g}, {share:.2%} of masks"
    found = {"off": off, "other masks": share}
    if device.type == "cuda":
        found |= times(settle_, there, sparsity)
    return found


def times(settle_: Callable, block: list[Tensor], sparsity: Sparsity) -> dict[str, float]:
    """Milliseconds of the kernel and of the steps, for a block of columns."""
    from lib.methods import sparsegpt

    device = block[0].device
    buffers = []
    for loop in (lambda _: settle_, lambda _: None):
        sparsegpt.column_loop = loop
        one = sparsegpt.ColumnBlock(len(block[0]), [block[0].shape[1]], sparsity, device)
        for own, tensor in zip((one.values, one.errors, one.mask), block, strict=False):
            own.copy_(tensor)
        one.inverse.copy_(block[3])
        one.scale.copy_(block[4])
        buffers.append(one)
    spent = medians({"kernel": buffers[0].settle_, "steps": buffers[1].settle_}, device, 5)
    return {f"ms, {name}": 1000 * value for name, value in spent.items()}


def named(sparsity: Sparsity) -> str:
    return sparsity.pattern or f"{sparsity.ratio:.0%}"


def check_sanitizer(device: str, size: Size) -> dict[str, Any]:
    """Memory errors and races of the kernel, as NVIDIA's tool sees them."""
    if not device.startswith("cuda"):
        raise NotHere("needs a GPU")
    tool = sanitizer()
    if tool is None:
        raise NotHere("compute-sanitizer is not installed; it comes with CUDA's toolkit")
    step = Step("kernel", "check_kernels:deviations", 0)
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or neighbours hide what is out of bounds
    found = {}
    for kind in ("memcheck", "racecheck"):
        before = [tool, "--tool", kind, "--error-exitcode", "97"]
        report = in_own_process(step, device, size, 110, settings, before)
        assert report["result"] == "ok", f"{kind}: {report['reason']}\n{report['said']}"
        found[f"s, {kind} without errors"] = report["seconds"]
    return found


def deviations(device: str, size: Size) -> dict[str, Any]:
    """The kernel on small blocks, nothing else: a tool that watches it takes long."""
    from lib.methods.column_kernel import settle_

    return {named(one): deviation(settle_, torch.device(device), one) for one in TRIALS}


def check_tests(device: str, size: Size) -> dict[str, Any]:
    """The files that hold tests for a GPU, whole."""
    if not find_spec("pytest"):
        raise NotHere("pytest is not installed")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [file for file in files if NEEDS_GPU in file.read_text("utf-8")]
    if device == "cpu":  # where the suite runs them all: one shows that this finds them
        files = [min(files, key=lambda file: file.stat().st_size)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *map(str, files),
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    settings = os.environ | {"CUDA_VISIBLE_DEVICES": visible(device)}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", last.partition(" in ")[0])}
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", done.stdout)
    if done.returncode:
        print(done.stdout[-SAID:] + done.stderr[-SAID:], flush=True)
        raise AssertionError(f"{last}: {', '.join(failed)}")
    return {"files": len(files)} | found


def visible(device: str) -> str:
    """The tests ask for the first GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = torch.device(device).index or 0
    if device == "cpu":
        return given or ""
    return given.split(",")[index] if given else str(index)
