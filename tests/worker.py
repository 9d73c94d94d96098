"""A process of a test's own that runs main.py, with a fault where the test wants one."""

from __future__ import annotations

import os
import signal
import sys

import datasets  # noqa: F401  everything that is heavy is imported once, before processes fork off
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import main
from lib.dist import watch
from lib.prune import Pruner
from lib.util import command
from lib.util.errors import UserError

FAST = {"BEAT_SECONDS": 0.2, "SILENCE_SECONDS": 3}


def work(
    commands: list[list[str]],
    settings: list[dict[str, str]],
    fault: str,
    folder: str,
    out: str,
    err: str,
) -> None:
    """Run main.py with each command line in turn, under its settings of the environment.

    `fault`, as `1:SIGKILL`, sends this process the signal when it comes to block 1; a word that is
    no signal is raised as an error. What is said goes to the files `out` and `err`.
    """
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    for name, seconds in FAST.items():
        setattr(watch, name, seconds)
    if fault:
        at, _, kind = fault.partition(":")
        _break_at(int(at), kind)
    status = 0
    for argv, variables in zip(commands, settings, strict=True):
        os.environ.update(variables)
        status = status or command.run(main.main, argv)
    sys.exit(status)


def _break_at(block: int, how: str) -> None:
    own = Pruner._block_

    def prune(self: Pruner, index: int, *streams) -> None:
        if index == block and how in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[how])
        elif index == block:
            raise UserError(how) if how != "defect" else RuntimeError(how)
        own(self, index, *streams)

    Pruner._block_ = prune
