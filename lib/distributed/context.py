"""Several processes on one job: torch.distributed, started by torchrun or accelerate launch.

    torchrun --nproc_per_node 2 main.py ...

Each process takes its share of the windows. Statistics are sums, so one all-reduce of each makes
them those of a single process; then the linears are shared out by cost, each is solved by one
process, and the pruned weights are broadcast. One process prints, logs and saves.

Where a process ends, the launcher ends the others; where one hangs, those that wait for it end
after `--timeout`. Processes wait for each other in `barrier`, on the CPU, and not for long anywhere
else: collectives between GPUs follow a barrier at once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from lib.util.errors import UserError
from lib.util.launch import check_launcher, environment_number

JOIN_SECONDS = 60  # launchers start all processes at the same time


@dataclass(frozen=True)
class Handle:
    """An all-reduce that was started."""

    work: torch_dist.Work
    dist: DistContext

    def wait(self) -> None:
        """Wait until the sum is complete."""
        with self.dist.collective():
            self.work.wait()


class DistContext:
    """The processes of a job; with one process, or `alone`, every method does nothing.

    `minutes` is how long a process waits for another, besides the time that work takes; see
    `barrier`. `join_seconds` is how long all have to come at the beginning. Every method that needs
    the others raises UserError where one is gone or does not answer.
    """

    def __init__(
        self,
        device: torch.device,
        minutes: float = 10,
        alone: bool = False,
        join_seconds: float = JOIN_SECONDS,
    ) -> None:
        self.rank = 0 if alone else environment_number("RANK", 0)
        self.size = 1 if alone else environment_number("WORLD_SIZE", 1)
        several = self.size > 1
        # launchers number the processes of a machine one after another
        self.local_rank = environment_number("LOCAL_RANK", 0) if several else 0
        self.local_size = environment_number("LOCAL_WORLD_SIZE", 1) if several else 1
        self.device = device
        self.minutes = minutes
        self.limit = timedelta(minutes=minutes)  # of collectives, which follow a barrier
        self.last_barrier = time.monotonic()
        if self.size > 1:
            self._join(join_seconds)
        elif not alone:
            check_launcher()

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which prints, logs and saves."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_rank == 0

    def share(self, count: int) -> slice:
        """Return this process's part of `count` windows; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def barrier(self, seconds: float = 0) -> None:
        """Wait until all processes have called this.

        A missing process is given the time-out, and as long as this one took since the last
        barrier, since their work is equal. Where it is not, `seconds` is what the longest may take.
        """
        if self.size == 1:
            return
        spent = time.monotonic() - self.last_barrier
        limit = timedelta(seconds=math.ceil(60 * self.minutes + spent + seconds))
        others = [rank for rank in range(self.size) if rank != self.rank]
        works = []  # monitored_barrier heeds a limit in the first process only
        for post in torch_dist.irecv, torch_dist.isend:
            for rank in others:
                with self.collective(f"process {rank}"):
                    works.append((rank, post(torch.zeros(1), rank, self.group)))
        for rank, work in works:
            with self.collective(f"process {rank}"):
                work.wait(limit)
        self.last_barrier = time.monotonic()

    def all_reduce_(self, tensors: Sequence[Tensor]) -> list[Handle]:
        """Start summing each tensor over all processes in place, directly after a barrier.

        Call wait() on each handle that is returned.
        """
        if self.size == 1:
            return []
        with self.collective():
            return [Handle(torch_dist.all_reduce(one, async_op=True), self) for one in tensors]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return `value` of every process, by rank; for small picklable values only."""
        if self.size == 1:
            return [value]
        self.barrier()
        values: list[Any] = [None] * self.size
        with self.collective():
            torch_dist.all_gather_object(values, value, self.group)
        return values

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Return process `source`'s tensor on every process, directly after a barrier.

        A `tensor` on the device is written in place.
        """
        tensor = tensor.to(self.device).contiguous()
        if self.size > 1:
            with self.collective():
                torch_dist.broadcast(tensor, source)
        return tensor

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise UserError naming the first fact in which the processes differ."""
        for rank, other in enumerate(self.all_gather_object(facts)):
            for name in {**facts, **other}:
                if other.get(name) != facts.get(name):
                    raise UserError(
                        f"{name}: process {self.rank} has {facts.get(name)!r}, process {rank} has "
                        f"{other.get(name)!r}; start all with the same flags, data and packages"
                    )

    def assign_owners(self, costs: Sequence[float]) -> list[int]:
        """Return which process solves each task: the costliest first, to the least loaded."""
        load = [0.0] * self.size
        owners = [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = min(range(self.size), key=load.__getitem__)
            load[owners[task]] += costs[task]
        return owners

    def close(self) -> None:
        """End the process group, after the last collective of all."""
        if self.size > 1:
            self.barrier()  # a connection that is closed too early breaks another's collective
            torch_dist.destroy_process_group()

    @contextmanager
    def collective(self, who: str = "") -> Iterator[None]:
        """Raise UserError where a call that needs `who`, or all the others, fails inside."""
        who = who or (f"process {1 - self.rank}" if self.size == 2 else "another process")
        try:
            yield
        except RuntimeError as error:
            reason = _reason(error)
            if "timed out" in reason.lower():
                what = f"did not answer; it hangs, or --timeout {self.minutes:g} is too short"
            else:
                what = f"is gone ({reason}); all end, and the first to fail says why"
            raise UserError(f"process {self.rank} of {self.size}: {who} {what}") from error

    def _join(self, seconds: float) -> None:
        cuda = self.device if self.device.type == "cuda" else None
        if cuda:
            torch.cuda.set_device(cuda)  # where NCCL puts what is not yet on a device
        try:
            joining = timedelta(seconds=seconds)
            store, _, _ = next(torch_dist.rendezvous("env://", timeout=joining))
            store.set_timeout(self.limit)
            torch_dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=self.limit,
                device_id=cuda,
            )
            self.group = torch_dist.new_group(timeout=self.limit, backend="gloo") if cuda else None
        except (RuntimeError, ValueError) as error:
            host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
            raise UserError(
                f"WORLD_SIZE {self.size}: process {self.rank} can't reach the others at "
                f"MASTER_ADDR {host}, MASTER_PORT {port} ({_reason(error)}); start all with "
                "torchrun"
            ) from error


def _reason(error: Exception) -> str:
    """Return the library's message, without the place in its code and its advice."""
    return str(error).splitlines()[-1].split("] ", 1)[-1].split(". ")[0]


def local_device(device: torch.device) -> torch.device:
    """Return this process's own GPU, counted from `device`, where a machine runs several."""
    local = environment_number("LOCAL_RANK", 0)
    if device.type == "cpu" or local == 0:
        return device
    index = device.index + local
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: process {local} of this machine needs cuda:{index}, which it "
            "lacks; start as many processes as it has GPUs"
        )
    return torch.device("cuda", index)
