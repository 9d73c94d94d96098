"""Several processes on one job: torch.distributed, started by accelerate launch or torchrun.

Each process takes its share of the windows. Statistics are sums, so one all-reduce of each makes
them those of a single process; then the linears are shared out by cost, each is solved by one
process, and the pruned weights are broadcast. One process prints, logs and saves.
"""

from __future__ import annotations

import datetime
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lib.util.command import FAILED, tell
from lib.util.errors import UserError
from lib.util.launch import environment_number, see_launched
from lib.dist.watch import Watch

JOIN_SECONDS = 60  # for the store to be there; launchers start all processes at the same time
COLLECTIVE_LIMIT = datetime.timedelta(hours=6)  # the slowest block; the watch is faster


@dataclass(frozen=True)
class Handle:
    """A collective that was started."""

    work: Any
    team: Team

    def wait(self) -> None:
        """Until it is done."""
        with self.team.collective():
            self.work.wait()


class Team:
    """The processes of a job; with one process, or `alone`, every call does nothing."""

    def __init__(self, device: torch.device, alone: bool = False) -> None:
        self.rank = 0 if alone else environment_number("RANK", 0)
        self.size = 1 if alone else environment_number("WORLD_SIZE", 1)
        self.device = device
        self.watch: Watch | None = None
        if self.size > 1:
            self._join()
        elif not alone:
            see_launched()

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, logs and saves."""
        return self.rank == 0

    def at(self, place: str) -> None:
        """Note what this process is doing, to be told should it be missed."""
        if self.watch:
            self.watch.place = place
            with self.collective():
                self.store.set(f"place {self.rank}", place)

    def share(self, count: int) -> slice:
        """This process's part of `count` windows; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> list[Handle]:
        """Start adding each tensor up over all processes, in place; wait() on what is returned."""
        if self.size == 1:
            return []
        with self.collective():
            return [Handle(dist.all_reduce(one, async_op=True), self) for one in tensors]

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of ranks; small picklable things only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.collective():
            dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Process `source`'s tensor on every process, in `tensor` where it stands on the device."""
        tensor = tensor.to(self.device).contiguous()
        if self.size > 1:
            with self.collective():
                dist.broadcast(tensor, source)
        return tensor

    def agree(self, facts: dict[str, Any]) -> None:
        """UserError naming the first fact in which the processes differ."""
        for rank, other in enumerate(self.gathered(facts)):
            for name in {**facts, **other}:
                if other.get(name) != facts.get(name):
                    raise UserError(
                        f"{name}: process {self.rank} has {facts.get(name)!r}, process {rank} has "
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

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around every collective: where one fails, another process has died, and all end."""
        try:
            yield
        except RuntimeError:
            if self.watch:
                self.watch.broken()
            raise

    def fail(self, error: BaseException, debug: bool = False) -> None:
        """End all processes because of this one's error, told here; returns where it is alone."""
        if self.watch is None:
            return

        def told() -> int:
            status = None if debug else tell(error)
            if status is None:
                traceback.print_exception(error)
            return status or FAILED

        self.watch.fail(told)

    def close(self) -> None:
        """Leave each other, after the last collective of all."""
        if self.watch:
            self.gathered(None)
            self.store.add("done", 1)
            deadline = time.monotonic() + JOIN_SECONDS
            while self.store.add("done", 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.02)  # a connection that ends too early breaks another's collective
            self.watch.close()
            self.watch = None
            dist.destroy_process_group()

    def _join(self) -> None:
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosting = self.rank == 0 and not agents
        self.store = self._store(hosting)
        self.watch = Watch(self._store(False), self.rank, self.size, hosting)
        cuda = self.device if self.device.type == "cuda" else None
        if cuda:
            torch.cuda.set_device(cuda)  # where NCCL puts what is not yet on a device
        with self.collective():
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=COLLECTIVE_LIMIT,
                device_id=cuda,
            )

    def _store(self, hosting: bool) -> dist.Store:
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        limit = datetime.timedelta(seconds=JOIN_SECONDS)
        try:
            store = dist.TCPStore(
                host, int(port), is_master=hosting, timeout=limit, wait_for_workers=False
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"WORLD_SIZE {self.size}: process {self.rank} can't reach the others at "
                f"MASTER_ADDR {host}, MASTER_PORT {port}; start all with torchrun"
            ) from error
        return dist.PrefixStore(f"try-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, counted from `device`, where several run on one machine."""
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
