"""What a run leaves in `--save`: log_METHOD.txt in wanda's form, results.json, and a summary."""

from __future__ import annotations

import json
import math
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.save import write_text

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy", "bitsandbytes")


def versions() -> dict[str, str | None]:
    """Of Python and the packages that decide the result; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def peak_host_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: Any) -> dict[str, int | None]:
    """Largest size so far, in bytes: of the process on the host, of tensors on the device."""
    on_device = None
    if device.type == "cuda":
        import torch

        on_device = torch.cuda.max_memory_allocated(device)
    return {"host": peak_host_memory(), "device": on_device}


def device_name(device: Any) -> str:
    """Such as `cuda:0 (NVIDIA H100)` or `cpu (2 threads)`."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def write_log(folder: Path, method: str, sparsity: float, perplexities: dict[str, float]) -> Path:
    """log_METHOD.txt: names, then one line of values, tab-separated.

    `ppl_test` is the first test set; where there are several, each follows as `ppl_NAME`.
    """
    names = ["method", "actual_sparsity", "ppl_test"]
    values = [method, f"{sparsity:.4f}", f"{next(iter(perplexities.values())):.4f}"]
    if len(perplexities) > 1:
        names += [f"ppl_{name}" for name in perplexities]
        values += [f"{value:.4f}" for value in perplexities.values()]
    path = folder / f"log_{method}.txt"
    write_text(path, "\t".join(names) + "\n" + "\t".join(values) + "\n")
    return path


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """results.json, whole or not at all; nan and inf, which JSON does not know, as null."""
    path = folder / "results.json"
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_summary(results: dict[str, Any]) -> None:
    """What a user wants to know at the end; the last line ends with a perplexity."""
    seconds, memory = results["seconds"], results["peak_memory"]
    spent = ", ".join(f"{step} {value:.1f} s" for step, value in seconds.items())
    settings = ", ".join(f"{name} {value}" for name, value in results.get("options", {}).items())
    method = results["method"] + (f" ({settings})" if settings else "")
    print(f"{method}: {results['sparsity']['overall']:.4f} of the blocks' weights are zero")
    print(f"time: {spent}; peak memory: host {gib(memory['host'])}", end="")
    print(f", device {gib(memory['device'])}" if memory["device"] else "")
    for test in results["evaluation"]:
        size = f"{test['windows']} windows, {test['tokens']} tokens"
        print(f"{test['name']}: {size}, {test['bits_per_byte']:.4f} bits per byte", end="")
        error = test["standard_error"]  # nan for a single window
        print(f", standard error of the perplexity {error:.2f}" if math.isfinite(error) else "")
    for name, value in results["perplexity"].items():
        print(f"perplexity {name}: {value:.4f}")


def gib(size: float) -> str:
    """Bytes as people read them."""
    for unit, exponent in (("GiB", 30), ("MiB", 20)):
        if size >= 2**exponent:
            return f"{size / 2**exponent:.2f} {unit}"
    return f"{math.ceil(size / 1024)} KiB"
