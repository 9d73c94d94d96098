"""Several ranks for one job: torch.distributed, started by torchrun or accelerate launch.

    torchrun --nproc_per_node 2 main.py ...

Each rank takes its shard of the windows. Statistics are sums, so one all-reduce of each gives those
of a single process. Then the layers are distributed by cost, each is solved by one rank, and the
pruned weights are broadcast. One rank prints, logs and saves.

If a rank ends, the launcher ends the others. Ranks wait for each other in `barrier`, on the CPU,
and not for long elsewhere: collectives between GPUs directly follow a barrier.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from .errors import UserError
from .processes import environment_number

JOINING = timedelta(minutes=10)  # started by hand or by srun, some import torch from a slow disk
WAITING = timedelta(hours=1)  # for a rank that solves, reads or writes for the others


class DistContext:
    """The ranks of a job; with one process, or `alone`, every method does nothing.

    Methods that need the other ranks raise UserError if one has ended or does not answer.
    """

    def __init__(self, device: torch.device, alone: bool = False) -> None:
        self.rank = 0 if alone else environment_number("RANK", 0)
        self.size = 1 if alone else environment_number("WORLD_SIZE", 1)
        several = self.size > 1
        # launchers number the ranks of a machine consecutively
        self.local_rank = environment_number("LOCAL_RANK", 0) if several else 0
        self.local_size = environment_number("LOCAL_WORLD_SIZE", 1) if several else 1
        self.device = device
        if several:
            self._join()

    @property
    def is_main(self) -> bool:
        """Whether this is the main rank, which prints, logs and saves."""
        return self.rank == 0

    def print(self, *lines: str) -> None:
        """Print lines in the main rank."""
        if self.is_main and lines:
            print(*lines, sep="\n", flush=True)

    def shard(self, count: int) -> slice:
        """Return this rank's part of `count` windows; sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def count(self, total: int) -> int:
        """Return the number of windows in `shard`."""
        return len(range(total)[self.shard(total)])

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            with self.collective():
                torch_dist.monitored_barrier(self.group, WAITING, wait_all_ranks=True)

    def sum_(self, tensors: Sequence[Tensor], idle: bool = False) -> None:
        """Sum each tensor over all ranks in place, once all have called this.

        Tensors of a rank that is `idle` do not count.
        """
        for one in tensors if idle else ():
            one.zero_()
        self.barrier()
        with self.collective():
            for one in tensors if self.size > 1 else ():
                torch_dist.all_reduce(one)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return `value` of every rank; only for small picklable values."""
        if self.size == 1:
            return [value]
        self.barrier()
        values: list[Any] = [None] * self.size
        with self.collective():
            torch_dist.all_gather_object(values, value, self.group)
        return values

    def of_machine(self, value: Any) -> Any:
        """Return `value` of this machine's first rank."""
        return self.all_gather_object(value)[self.rank - self.local_rank]

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Return rank `source`'s tensor on every rank, directly after a barrier.

        A `tensor` on the device is overwritten.
        """
        tensor = tensor.to(self.device).contiguous()
        if self.size > 1:
            with self.collective():
                torch_dist.broadcast(tensor, source)
        return tensor

    def check_equal(self, values: dict[str, Any]) -> None:
        """Raise UserError naming the first fact in which the ranks differ."""
        for rank, other in enumerate(self.all_gather_object(values)):
            for name in {**values, **other}:
                if other.get(name) != values.get(name):
                    here, there = values.get(name), other.get(name)
                    problem = f"rank {self.rank} has {here!r}, rank {rank} has {there!r}"
                    fix = "Start all with the same flags, data and packages"
                    raise UserError(name, problem, fix)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise an error of any rank inside in all of them: the main rank reports it."""
        error = None
        try:
            yield
        except Exception as failure:
            if self.size > 1:  # other ranks lack its traceback, which a defect should show
                failure.add_note(traceback.format_exc())
            error = failure
        if errors := [one for one in self.all_gather_object(error) if one]:
            raise errors[0]

    def assign_owners(self, costs: Sequence[float]) -> list[int]:
        """Return which rank solves each task: the costliest first, to the least loaded."""
        load = [0.0] * self.size
        owners = [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = min(range(self.size), key=load.__getitem__)
            load[owners[task]] += costs[task]
        return owners

    def close(self) -> None:
        """End the process group, after the last collective of all."""
        if self.size > 1:
            self.barrier()  # closing a connection too early breaks another rank's collective
            torch_dist.destroy_process_group()
            self.size = self.local_size = 1  # the main rank may continue alone

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Raise UserError if a call inside that needs the other ranks fails."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            who = f"rank {1 - self.rank}" if self.size == 2 else "another rank"
            raise UserError(
                f"rank {self.rank} of {self.size}",
                f"{who} has ended or does not answer ({_reason(error)})",
                "All ranks stop; the first error printed is the cause",
            ) from error

    def _join(self) -> None:
        gpu = self.device if self.device.type != "cpu" else None
        if gpu:
            torch.accelerator.set_device_index(gpu.index)  # NCCL puts its own tensors there
        backend = torch_dist.get_default_backend_for_device(self.device)
        try:
            store, _, _ = next(torch_dist.rendezvous("env://", timeout=JOINING))
            store.set_timeout(WAITING)
            torch_dist.init_process_group(
                backend,
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=WAITING,
                device_id=gpu,
            )
            self.group = torch_dist.new_group(timeout=WAITING, backend="gloo") if gpu else None
        except (RuntimeError, ValueError) as error:
            host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
            at = f"MASTER_ADDR {host}, MASTER_PORT {port} ({_reason(error)})"
            problem = f"rank {self.rank} cannot reach the others at {at}"
            raise UserError(
                f"WORLD_SIZE {self.size}", problem, "Start all with torchrun"
            ) from error


def _reason(error: Exception) -> str:
    """Return the library's message, without the place in its code and its advice."""
    return str(error).splitlines()[-1].split("] ", 1)[-1].split(". ")[0]


def local_device(device: torch.device) -> torch.device:
    """Return this rank's own GPU, counted from `device`, if a machine runs several ranks.

    If a rank sees a single GPU, it is its own (`srun --gpus-per-task=1`). The exception is
    torchrun, under which all ranks see the same GPUs.
    """
    local, count = environment_number("LOCAL_RANK", 0), torch.accelerator.device_count()
    alone = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if device.type == "cpu" or local == 0 or alone:
        return device
    index = device.index + local
    if index >= count:
        problem = f"this machine lacks {device.type}:{index}, which its rank {local} needs"
        raise UserError(f"--device {device}", problem, "Start as many ranks as it has GPUs")
    return torch.device(device.type, index)
