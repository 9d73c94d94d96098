"""A process of a test's own that runs main.py, with a fault where the test wants one."""

from __future__ import annotations

import os
import signal
import sys
import time

import datasets  # noqa: F401  everything that is heavy is imported once, before processes fork off
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import main
from lib import prune
from lib.prune import Pruner
from lib.pruning.inputs import Group
from lib.pruning.neurons import NeuronPruner
from lib.recover import Recoverer
from lib.util import command
from lib.util.errors import UserError

LONG_SECONDS = 4


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
    `step 1:SIGKILL` when it comes to step 1 of the recovery, as `neurons 1:SIGKILL` to block 1
    where whole neurons go. `1:long` makes it solve for
    LONG_SECONDS there, `1:patient` expects others to; another word is raised as an error. What is
    said goes to the files `out` and `err`.
    """
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    if fault:
        at, _, kind = fault.partition(":")
        if at.startswith("step "):
            _break_in_training(int(at.removeprefix("step ")), kind)
        elif at.startswith("neurons "):
            _break_in_neurons(int(at.removeprefix("neurons ")), kind)
        else:
            _break_at(int(at), kind)
    status = 0
    for argv, variables in zip(commands, settings, strict=True):
        os.environ.update(variables)
        status = status or command.run(main.main, argv)
    sys.exit(status)


def _break_at(block: int, how: str) -> None:
    own = Pruner._block_

    def prune(self: Pruner, index: int, *streams) -> None:
        if index == block:
            _break(self, how)
        own(self, index, *streams)

    Pruner._block_ = prune


def _break_in_training(step: int, how: str) -> None:
    own = Recoverer._step

    def train(self: Recoverer, number: int) -> float:
        if number == step:
            os.kill(os.getpid(), signal.Signals[how])
        return own(self, number)

    Recoverer._step = train


def _break_in_neurons(block: int, how: str) -> None:
    own = NeuronPruner._block_

    def prune(self: NeuronPruner, index: int, *streams) -> None:
        if index == block:
            os.kill(os.getpid(), signal.Signals[how])
        own(self, index, *streams)

    NeuronPruner._block_ = prune


def _break(pruner: Pruner, how: str) -> None:
    if how in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "long":
        solved = pruner._solved

        def slowly(group: Group) -> list:
            time.sleep(LONG_SECONDS)
            pruner._solved = solved
            return solved(group)

        pruner._solved = slowly
    elif how == "patient":
        prune.SLOWEST = {"cpu": 1e4}  # costs of a second or more, in so small a model
    else:
        raise RuntimeError(how) if how == "defect" else UserError(how)
