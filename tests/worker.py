"""A process of a test's own that runs main.py, with a fault where the test wants one."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import bitsandbytes  # noqa: F401  what is heavy is imported once, before processes fork off
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from support import at, call_here
from tqdm import tqdm

import lib.run.steps  # noqa: F401
import main  # noqa: F401
from lib.offload.store import FileBlockStore
from lib.util import processes
from lib.util.cli import run
from lib.util.errors import UserError

tqdm.get_lock()  # of this process: one made in a process that is killed would be left behind
os.fsync = lambda _: None  # as in conftest.py


def work(
    commands: list[list[str]],
    settings: list[dict[str, str]],
    fault: str,
    folder: str,
    out: str,
    err: str,
    program: str,
) -> None:
    """Run main.py, or a command, with each command line in turn, under its settings of the
    environment.

    `fault`, as `prune 1:SIGKILL`, sends this process the signal when the step `prune` comes to its
    unit 1; after `late` it reads blocks slowly, after `at once 0:blind` it sees no folder of a run,
    and another word than a signal's is raised as an error. With a fault, what a command starts runs
    in this process. What is said goes to the files `out` and `err`.
    """
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    status, (what, _, how) = 0, fault.partition(":")
    label, _, number = what.rpartition(" ")
    module, fails = import_module(program), partial(_fail, how)
    if fault:
        processes.call = call_here
        if hasattr(module, "call"):
            module.call = call_here
    if label == "at once":
        fails()
    with at(label, int(number), fails) if fault else nullcontext():
        for argv, variables in zip(commands, settings, strict=True):
            os.environ.update(variables)
            status = status or run(module.main, argv)
    sys.exit(status)


def _fail(how: str) -> None:
    if how in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "blind":  # to the folder of the run, as on another machine
        own = Path.is_file
        Path.is_file = lambda path: path.name != "job.json" and own(path)
    elif how == "late":
        own = FileBlockStore.fetch
        FileBlockStore.fetch = lambda self, index: time.sleep(0.15) or own(self, index)
    else:
        raise RuntimeError(how) if how == "defect" else UserError(how, "as the test asks", "")
