"""Several processes on one job: torch.distributed, started by accelerate launch or torchrun.

Each process takes its share of the windows. Statistics are sums, so one all-reduce of each makes
them those of a single process; then the linears are shared out by cost, each is solved by one
process, and the pruned weights are broadcast. One process prints, logs and saves.

A process that dies or hangs must not leave the others waiting: every process tells the store a few
times a minute that it lives and at which block it is, and one that falls silent ends them all.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lib.errors import UserError

BEAT_SECONDS = 5
SILENCE_SECONDS = 40  # after which a process counts as dead
COLLECTIVE_LIMIT = datetime.timedelta(hours=6)  # the slowest block; the heartbeat is faster


class Team:
    """The processes of a job; with one process, or `alone`, every call does nothing."""

    def __init__(self, device: torch.device, alone: bool = False) -> None:
        self.rank = 0 if alone else int(os.environ.get("RANK", 0))
        self.size = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        self.place = "start"
        if self.size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=COLLECTIVE_LIMIT)
            self.closing = threading.Event()
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, logs and saves."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` windows; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Start adding each tensor up over all processes, in place; wait() on what is returned."""
        if self.size == 1:
            return []
        return [dist.all_reduce(tensor, async_op=True) for tensor in tensors]

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of ranks; small picklable things only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Process `source`'s tensor on every process, in `tensor` where it stands on the device."""
        tensor = tensor.to(self.device).contiguous()
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def wait(self) -> None:
        """Until every process is here."""
        self.gathered(None)

    def agree(self, facts: dict[str, Any]) -> None:
        """UserError naming the first fact in which the processes differ."""
        for rank, other in enumerate(self.gathered(facts)):
            for name, value in facts.items():
                if other.get(name) != value:
                    raise UserError(
                        f"{name}: process {self.rank} has {value!r}, process {rank} has "
                        f"{other.get(name)!r}; start all with the same flags, data and packages"
                    )

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which process solves each of the tasks: the dearest first, to whoever has least."""
        load = [0.0] * self.size
        owners = [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = min(range(self.size), key=load.__getitem__)
            load[owners[task]] += costs[task]
        return owners

    def close(self) -> None:
        """End the process group, after the last collective."""
        if self.size > 1 and dist.is_initialized():
            self.closing.set()
            dist.destroy_process_group()

    def _watch(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore("alive", dist.TCPStore(host, port, is_master=False))
        seen = {rank: ("", time.monotonic()) for rank in range(self.size)}
        while not self.closing.wait(BEAT_SECONDS):
            try:
                store.set(str(self.rank), f"{time.monotonic()} {self.place}")
                beats = {rank: _beat(store, rank) for rank in seen}
            except (RuntimeError, OSError) as error:
                self._end(f"the first process is gone ({str(error).splitlines()[0]})")
            for rank, beat in beats.items():
                if beat != seen[rank][0]:
                    seen[rank] = beat, time.monotonic()
                elif time.monotonic() - seen[rank][1] > SILENCE_SECONDS:
                    place = beat.partition(" ")[2] or "start"
                    self._end(f"process {rank} of {self.size} fell silent at {place}")

    def _end(self, why: str) -> None:
        if not self.closing.is_set():
            print(f"error: {why}; process {self.rank} ends", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may be inside a collective that never returns


def _beat(store: dist.Store, rank: int) -> str:
    return store.get(str(rank)).decode() if store.check([str(rank)]) else ""


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, counted from `device`, where several run on one machine."""
    if device.type == "cpu":
        return device
    return torch.device("cuda", (device.index or 0) + int(os.environ.get("LOCAL_RANK", 0)))
