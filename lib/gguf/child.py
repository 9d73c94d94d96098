"""Runs llama.cpp's code in a child process, so that its logs, patches and crashes stay there.

The child reads a request, JSON, from its standard input and writes its answer, JSON, to the file
that the request names as `answer`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ERROR = "error: "


class ChildError(RuntimeError):
    """The child failed; the message is the last error line that it printed."""


def run_child(module: str, request: dict[str, Any]) -> Any:
    """Run `module` of this project with `request`; return its answer. Raises ChildError."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=json.dumps(request | {"answer": str(answer)}),
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if process.returncode == 0 and answer.is_file():
            return json.loads(answer.read_text("utf-8"))
    raise ChildError(_last_error(process))


def threads() -> int:
    """Return how many threads llama.cpp may use: OMP_NUM_THREADS, else one for each core."""
    count = os.environ.get("OMP_NUM_THREADS", "")
    return int(count) if count.isdecimal() else os.cpu_count() or 1


def import_from(llama: str | None) -> None:
    """Let a child import llama.cpp's Python code from a checkout, if there is one."""
    if llama:
        sys.path[:0] = [llama, str(Path(llama) / "gguf-py")]


def serve(work: Callable[[dict[str, Any]], Any]) -> None:
    """Answer one request by `work`, in the child; print an error as one line and exit."""
    request = json.load(sys.stdin)
    try:
        answer = work(request)
    except Exception as error:  # noqa: BLE001  converters raise anything; users read one line
        reason = " ".join(str(error).split())
        print(f"{ERROR}{reason or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    Path(request["answer"]).write_text(json.dumps(answer), "utf-8")


def _last_error(process: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    if process.returncode < 0:
        return (
            f"it was ended by signal {-process.returncode}; its last line: {(lines or ['-'])[-1]}"
        )
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return (errors or lines or [f"it ended with status {process.returncode}"])[-1]
