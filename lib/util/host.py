"""The host's memory: available and peak bytes, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
UNUSED_HEAP = 2**28  # bytes that may stay unused at the end of the heap
LARGEST_IN_HEAP = 2**25  # bytes, glibc's limit; the weights of large models are mapped instead


def keep_freed_memory() -> None:
    """Ask glibc to reuse the memory of freed activations; other C libraries are left alone.

    glibc returns a large block to the system as soon as it is freed. The next tensor of that size
    then causes a page fault for every 4 KiB: a fifth of a forward pass of a small model.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        malloc_trim()  # frees memory left by reading and tokenizing texts
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)
        libc.mallopt(M_TRIM_THRESHOLD, UNUSED_HEAP)


def malloc_trim() -> None:
    """Return freed memory to the system, if the C library is glibc."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still get from the machine, its container or its job.

    Containers, systemd and Slurm limit nested groups of processes (cgroups, version 2 or 1). Slurm
    may set only environment variables.
    """
    free, groups = [psutil.virtual_memory().available], root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:  # such as 0::/user.slice or 4:memory:/job
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = groups / controllers
        names = ("max", "current", "")
        if controllers:  # version 1
            names = "limit_in_bytes", "usage_in_bytes", "total_"
        cgroup = top / path.lstrip("/")  # a container sees its own group as the top
        for group in {cgroup, top, *(each for each in cgroup.parents if top in each.parents)}:
            free += _left(group, *names)
    for name, times in (("SLURM_MEM_PER_NODE", 1), ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")):
        granted, count = os.environ.get(name, ""), os.environ.get(str(times), str(times))
        if granted.isdigit() and count.isdigit() and int(granted):
            free.append((int(granted) * int(count) << 20) - psutil.Process().memory_info().rss)
    return max(0, min(free))


def _left(group: Path, limit: str, usage: str, prefix: str) -> list[int]:
    """Return the bytes that a cgroup has left, in a list, which is empty without a limit."""
    try:
        most, used = (int((group / f"memory.{name}").read_text()) for name in (limit, usage))
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return []
    cached = (f"{prefix}active_file ", f"{prefix}inactive_file ")  # the system can reclaim these
    return [most - used + sum(int(line.split()[1]) for line in lines if line.startswith(cached))]


def gib(size: float) -> str:
    """Format a number of bytes."""
    for unit, exponent in (("GiB", 30), ("MiB", 20)):
        if (number := size / 2**exponent) > 0.99:  # 1,014 MiB are 0.99 GiB
            return f"{number:.{max(0, 3 - len(str(int(number))))}f} {unit}"
    return f"{math.ceil(size / 1024)} KiB"


def peak_host_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
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
