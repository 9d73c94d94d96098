"""A process of a test's own that runs main.py, with a fault where the test wants one."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from functools import partial

import datasets  # noqa: F401  everything that is heavy is imported once, before processes fork off
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import main
from lib import prune
from lib.util import command
from lib.util.errors import UserError
from lib.util.events import listeners

gc.freeze()  # in processes that fork off, what is imported is not looked through for garbage
PASSES = {"": "pruning", "step": "recovering", "round": "rounding"}


def work(
    commands: list[list[str]],
    settings: list[dict[str, str]],
    fault: str,
    folder: str,
    out: str,
    err: str,
) -> None:
    """Run main.py with each command line in turn, under its settings of the environment.

    `fault`, as `1:SIGKILL`, sends this process the signal when it comes to block 1, as
    `step 1:SIGKILL` when it comes to step 1 of the recovery, as `round 1:SIGKILL` to block 1 of
    the rounding. `1:long 4` makes it solve for four
    seconds there, `1:patient` expects others to; another word is raised as an error. What is said
    goes to the files `out` and `err`.
    """
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    if fault:
        at, _, kind = fault.partition(":")
        what, _, number = at.rpartition(" ")
        reports = int(number) + (what == "step")  # the first report is where it begins
        listeners.append(partial(_break_at, PASSES[what], reports, kind))
    status = 0
    for argv, variables in zip(commands, settings, strict=True):
        os.environ.update(variables)
        status = status or command.run(main.main, argv)
    sys.exit(status)


def _break_at(what: str, number: int, how: str, event: str, reports: int) -> None:
    if (event, reports) != (what, number):
        return
    if how in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[how])
    elif how.startswith("long "):
        listeners.append(_SlowSolve(float(how.removeprefix("long "))))
    elif how == "patient":
        prune.SLOWEST = {"cpu": 1e3}  # costs of ten seconds or more, in so small a model
    else:
        raise RuntimeError(how) if how == "defect" else UserError(how)


class _SlowSolve:
    """Makes the next solution, and no other, take some seconds more."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, event: str, _: int) -> None:
        if event.startswith("solve "):
            listeners.remove(self)
            time.sleep(self.seconds)
