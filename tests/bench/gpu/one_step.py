"""One check in this process, as the runner or another check orders it (steps.py).

    python tests/bench/gpu/one_step.py ORDER.json

The order names the check as `module:function`, the device, the size, options and the file for the
report. Whatever happens short of a crash, the report is there at the end.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from sizes import NotHere, Size

PR_SET_PDEATHSIG = 1  # of prctl(2), Linux


def main(order: dict[str, Any]) -> None:
    die_with_parent()
    start = time.perf_counter()
    try:
        module, _, name = order["check"].partition(":")
        check = getattr(import_module(module), name)
        found = check(order["device"], Size(**order["size"]), **order["options"])
        report = {"result": "ok", "figures": readable(found)}
    except NotHere as why:
        report = {"result": "skipped", "reason": str(why)}
    except Exception as error:
        report = {
            "result": "failed",
            "reason": in_a_line(error),
            "traceback": traceback.format_exc(),
        }
    report["seconds at work"] = round(time.perf_counter() - start, 3)
    path = Path(order["report"])
    path.with_suffix(".part").write_text(json.dumps(report, allow_nan=False), "utf-8")
    os.replace(path.with_suffix(".part"), path)


def die_with_parent() -> None:
    """A GPU must not stay taken where the runner is killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def in_a_line(error: Exception) -> str:
    """Class and message; of a message of several lines (CUDA gives advice) the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:500]


def readable(value: Any) -> Any:
    """Figures as JSON knows them; floats to four digits."""
    if isinstance(value, dict):
        return {str(name): readable(one) for name, one in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, int | str | None) else str(value)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
