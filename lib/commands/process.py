"""Starts other commands of this package, each in a process of its own.

They run in the folder that the user is in, so that relative paths mean what they meant to the user;
`-P` keeps modules of that folder from hiding this package's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def call(module: str, *argv: object, capture: bool = False) -> tuple[int, str]:
    """Run `python -m MODULE ARGV...` to its end; return its exit status, and stdout if captured.

    The process ends with this one: at Ctrl-C, which a terminal sends to both, it is waited for, and
    whatever else ends this process terminates it.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module, *map(str, argv)],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,  # its end tells that this process is gone
        stdout=subprocess.PIPE if capture else None,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            out = process.stdout.read() if capture else ""
            return process.wait(), out
        except KeyboardInterrupt:
            process.wait()
            raise
        except BaseException:
            process.terminate()
            raise
