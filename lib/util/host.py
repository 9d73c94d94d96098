"""The host's memory: how much is available, how much was used at most, how it is freed.

glibc hands a large block back to the system as soon as it is freed, and the next tensor of that
size starts with a page fault for every 4 KiB: a fifth of a forward pass of a small model.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")  # a container's limits, Linux
M_TRIM_THRESHOLD = -1  # of mallopt(3)
M_MMAP_THRESHOLD = -3
UNUSED_HEAP = 2**28  # bytes that may stay unused at the end of the heap
LARGEST_IN_HEAP = 2**25  # bytes, glibc's limit; the weights of large models are mapped instead


def keep_freed_memory() -> None:
    """Ask glibc to reuse the memory of freed activations; other C libraries are left alone."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        malloc_trim()  # reading and tokenising texts has left much
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
        libc.mallopt(M_TRIM_THRESHOLD, UNUSED_HEAP)


def malloc_trim() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available(cgroup: Path = CGROUP) -> int:
    """Return the bytes that this process can still get from the machine or its container."""
    free = psutil.virtual_memory().available
    for limit, used, kinds in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            left = int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
        except (OSError, ValueError):  # none such, or "max"
            continue
        free = min(free, left + _page_cache(cgroup / kinds))
    return max(0, free)


def _page_cache(kinds: Path) -> int:
    """Return the bytes of cached files in a container, which the system gives up on demand."""
    try:
        lines = dict(line.split() for line in kinds.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    below = "total_" if "total_active_file" in lines else ""  # version 1: with the groups inside
    return sum(int(lines.get(f"{below}{name}_file", 0)) for name in ("active", "inactive"))


def gib(size: float) -> str:
    """Format a number of bytes."""
    for unit, exponent in (("GiB", 30), ("MiB", 20)):
        if size >= 2**exponent:
            return f"{size / 2**exponent:.2f} {unit}"
    return f"{math.ceil(size / 1024)} KiB"


def peak_host_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: Any) -> dict[str, int | None]:
    """Return the peak bytes of the process on the host and of tensors on the device."""
    on_device = None
    if device.type == "cuda":
        import torch

        on_device = torch.cuda.max_memory_allocated(device)
    return {"host": peak_host_memory(), "device": on_device}
