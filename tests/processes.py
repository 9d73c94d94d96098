"""Processes that run main.py, forked off one that has everything imported: quick to start."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import worker
from support import ROOT, Done

LIMIT = 100  # seconds for a process to end


class Worker:
    """A process that runs main.py with each of the command lines in turn."""

    def __init__(
        self,
        commands: list[list],
        folder: Path,
        fault: str = "",
        settings: list[dict[str, str]] | None = None,
    ) -> None:
        self.said = tempfile.TemporaryDirectory()
        lines = [[str(flag) for flag in argv] for argv in commands]
        out, err = (str(Path(self.said.name, name)) for name in ("out", "err"))
        settings = settings or [{} for _ in commands]
        arguments = (lines, settings, fault, str(folder), out, err)
        self.process = _server().Process(target=worker.work, args=arguments, daemon=True)
        self.process.start()

    def end(self) -> Done:
        """Wait for its end; killed if it does not come."""
        self.process.join(LIMIT)
        self.process.kill()
        self.process.join()
        out, err = (Path(self.said.name, name) for name in ("out", "err"))
        told = [path.read_text("utf-8") if path.exists() else "" for path in (out, err)]
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
) -> list[Worker]:
    """`size` processes on the same jobs, as a launcher would start them.

    `faults`: {rank: fault}. `own`: {rank: more flags}.
    """
    ports = [free_port() for _ in commands]
    workers = []
    for rank in range(size):
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        settings = [place | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(p)) for p in ports]
        lines = [[*argv, *(own or {}).get(rank, [])] for argv in commands]
        workers.append(Worker(lines, folder, (faults or {}).get(rank, ""), settings))
    return workers


def ended(workers: list[Worker]) -> list[Done]:
    """How each ended, in the order of ranks."""
    return [one.end() for one in workers]


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["PYTHONPATH"] = path  # the server is started with it, at the first process
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as main.py sets it before it imports torch
    return context
