"""The host's memory: how much is available, how much was used at most, how it is freed."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
UNUSED_HEAP = 2**28  # bytes that may stay unused at the end of the heap
LARGEST_IN_HEAP = 2**25  # bytes, glibc's limit; the weights of large models are mapped instead


def keep_freed_memory() -> None:
    """Ask glibc to reuse the memory of freed activations; other C libraries are left alone.

    It hands a large block back to the system as soon as it is freed, and the next tensor of that
    size starts with a page fault for every 4 KiB: a fifth of a forward pass of a small model.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        malloc_trim()  # reading and tokenising texts has left much
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
        libc.mallopt(M_TRIM_THRESHOLD, UNUSED_HEAP)


def malloc_trim() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available() -> int:
    """Return the bytes that this process can still get from the machine or its container."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or "max"
        return free
    cached = ("active_file ", "inactive_file ")  # which the system gives up on demand
    limit += sum(int(line.split()[1]) for line in lines if line.startswith(cached))
    return max(0, min(free, limit - used))


def gib(size: float) -> str:
    """Format a number of bytes."""
    for unit, exponent in (("GiB", 30), ("MiB", 20)):
        if (number := size / 2**exponent) > 0.99:  # 1,014 MiB are 0.99 GiB
            return f"{number:.{max(0, 3 - len(str(int(number))))}f} {unit}"
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
    import torch

    on_device = None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
    return {"host": peak_host_memory(), "device": on_device}
