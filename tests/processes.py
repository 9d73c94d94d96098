"""Processes that run main.py, forked off one that has everything imported: quick to start."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver as server
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import torch.distributed as torch_dist
import worker
from support import LIMIT, Done


class Worker:
    """A process that runs main.py with each of the command lines in turn."""

    def __init__(
        self,
        commands: list[list],
        folder: Path,
        fault: str = "",
        settings: list[dict[str, str]] | None = None,
        held: object = None,
        program: str = "main",
    ) -> None:
        self.held = held  # as long as the worker
        self.said = tempfile.TemporaryDirectory()
        lines = [[str(flag) for flag in argv] for argv in commands]
        out, err = (str(Path(self.said.name, name)) for name in ("out", "err"))
        settings = settings or [{} for _ in commands]
        arguments = (lines, settings, fault, str(folder), out, err, program)
        self.process = forkserver().Process(target=worker.work, args=arguments, daemon=True)
        self.process.start()

    def end(self) -> Done:
        """Wait for its end; killed if it does not come."""
        self.process.join(LIMIT)
        self.process.kill()
        self.process.join()
        out, err = (Path(self.said.name, name) for name in ("out", "err"))
        told = [path.read_text("utf-8") if path.exists() else "" for path in (out, err)]
        told[0] = re.sub(r"\[Gloo\] Rank .*\n", "", told[0])  # torch 2.9 greets so
        return Done(self.process.exitcode, *told)


def run(argv: list, folder: Path, fault: str = "") -> Done:
    """One process, to its end."""
    return Worker([argv], folder, fault).end()


def together(
    size: int,
    commands: list[list],
    folder: Path,
    faults: dict[int, str] | None = None,
    own: dict[int, list] | None = None,
    agent: bool = True,
    each: int | None = None,
    program: str = "main",
) -> list[Worker]:
    """`size` processes on the same jobs, started as torchrun does, which holds their store.

    `faults`: {rank: fault}. `own`: {rank: more flags}. Without an `agent` the first process holds
    the store, as where they are started by hand. `each`: so many on a machine (all).
    """
    if agent:
        held = [torch_dist.TCPStore("127.0.0.1", 0, is_master=True) for _ in commands]
        ports = [store.port for store in held]
    else:
        held = [kept_port() for _ in commands]
        ports = [one.getsockname()[1] for one in held]
    workers = []
    for rank in range(size):
        here = each or size
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank % here))
        place |= dict(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(here))
        place |= dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE=str(agent))
        settings = [place | dict(MASTER_PORT=str(port)) for port in ports]
        lines = [[*argv, *(own or {}).get(rank, [])] for argv in commands]
        fault = (faults or {}).get(rank, "")
        workers.append(Worker(lines, folder, fault, settings, held, program))
    return workers


def ended(workers: list[Worker]) -> list[Done]:
    """How each ended, in the order of ranks; the first to fail ends the others, as by torchrun."""
    left, deadline = [one.process for one in workers], time.monotonic() + LIMIT
    while left and time.monotonic() < deadline:
        wait([process.sentinel for process in left], LIMIT)
        failed = any(process.exitcode for process in left)
        left = [process for process in left if process.exitcode is None]
        if failed:
            # the first tells that another is gone, for which torchrun gives it 0.1 seconds
            wait([workers[0].process.sentinel], LIMIT)
            for process in left:
                process.terminate()
            break
    return [one.end() for one in workers]


def kept_port() -> socket.socket:
    """Bound to a port that nobody listens to, and that only who is told of it will listen to."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", 0))
    return one


def forkserver() -> multiprocessing.context.BaseContext:
    """What starts processes in which everything is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "worker"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        server.ensure_running()
    return context
