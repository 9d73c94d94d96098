"""Processes: other commands, in the user's current folder, and the ranks that torchrun starts.

A command starts others in separate processes, so that relative paths keep their meaning.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .errors import PACKAGE

ROOT = Path(__file__).resolve().parents[2]
TURN_SECONDS = 3
GRACE_SECONDS = 15  # for a process to end by itself
ENDS_WITH_STDIN = "LANGPRUNE_ENDS_WITH_STDIN"  # environment of the processes that `call` starts


def environment_number(name: str, default: int) -> int:
    """Read RANK, LOCAL_RANK or WORLD_SIZE from the environment, as torchrun sets it."""
    return int(os.environ.get(name) or default)


def defer_to_rank0() -> None:
    """Wait before a rank other than the first reports an error.

    Most errors are the same in all ranks, or follow from another rank's. The launcher ends this
    rank when the first has reported its own.
    """
    if environment_number("RANK", 0) > 0:
        time.sleep(TURN_SECONDS)


def started_by(module: str, *argv: object) -> tuple[list[str], dict[str, str]]:
    """Return the command `python -m MODULE ARGV...` and the environment to start it in.

    `-P` keeps modules of the user's folder from hiding this package's.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", module, *map(str, argv)]
    return command, os.environ | {"PYTHONPATH": path}


def import_own(name: str) -> ModuleType:
    """Import a module of this package, or main.py, which is part of the installed package."""
    return import_module(name if name == "main" and PACKAGE == "lib" else f"{PACKAGE}.{name}")


def main_of(module: str) -> Callable[[list[str]], None]:
    """Return the `main` of a module of this package, or of a package's `__main__`."""
    imported = import_own(module)
    return (imported if hasattr(imported, "main") else import_own(f"{module}.__main__")).main


def call(module: str, *argv: object) -> int:
    """Run `main(ARGV)` of a module in a separate process and return its exit status.

    The process ends with this one. At Ctrl-C, which a terminal sends to both, this one waits for
    it; if it does not end in GRACE_SECONDS, or at any other end of this one, it is terminated. If
    this one is killed, the process notices the end of its stdin.
    """
    command, environment = started_by(f"{PACKAGE}.util.cli", module, *argv)
    environment[ENDS_WITH_STDIN] = "1"
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # `kill -INT` is sent to this process alone
                process.terminate()
            raise
        except BaseException:
            process.terminate()
            raise


def end_with_stdin() -> None:
    """Wait until the other end of stdin is closed, and then end as by SIGTERM."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
