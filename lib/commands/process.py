"""Starts other commands of this package, each in a process of its own.

They run in the folder that the user is in, so that relative paths mean what they meant to the user;
`-P` keeps modules of that folder from hiding this package's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lib.util.command import ENDS_WITH_STDIN

ROOT = Path(__file__).resolve().parents[2]


def started_by(module: str, *argv: object) -> tuple[list[str], dict[str, str]]:
    """Return the command `python -m MODULE ARGV...` and the environment to start it in."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", module, *map(str, argv)]
    return command, os.environ | {"PYTHONPATH": path}


def call(module: str, *argv: object) -> int:
    """Run `python -m MODULE ARGV...` to its end and return its exit status.

    The process ends with this one: at Ctrl-C, which a terminal sends to both, it is waited for, and
    whatever else ends this process terminates it. Where this one is killed, the end of its stdin
    tells it.
    """
    command, environment = started_by(module, *argv)
    environment[ENDS_WITH_STDIN] = "1"
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        except BaseException:
            process.terminate()
            raise
