"""Checks for the tests of the runner: each ends in a way of its own, and imports nothing heavy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sizes import NotHere, Size


def check_good(device: str, size: Size, value: float = 1.0) -> dict[str, Any]:
    with Path(size.work, "calls").open("a", encoding="utf-8") as file:
        file.write(f"{device}\n")
    return {"value": value, "cases": {"infinite": float("inf")}}


def check_bad(device: str, size: Size) -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access\nFor debugging consider advice")


def check_absent(device: str, size: Size) -> dict[str, Any]:
    raise NotHere("needs two GPUs")


def check_crashing(device: str, size: Size) -> dict[str, Any]:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def check_hanging(device: str, size: Size) -> dict[str, Any]:
    """With a process that it has started, in a session of its own."""
    wait = [sys.executable, "-c", "import time; time.sleep(100)"]
    child = subprocess.Popen(wait, start_new_session=True)
    Path(size.work, "pid").write_text(str(child.pid), "utf-8")
    time.sleep(100)
    return {}
