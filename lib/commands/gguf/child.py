"""Runs llama.cpp's code in a child process, so that its logs, patches and crashes stay there.

The child reads a request, JSON, from its standard input and writes its answer, JSON, to the file
that the request names as `answer`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 6 * 3600  # seconds for one child, the conversion of a large model included


class ChildError(RuntimeError):
    """The child failed; the message is its own one-line reason."""


def run_child(module: str, request: dict[str, Any], seconds: float = LIMIT) -> Any:
    """Run `module` of this project with `request`; return its answer.

    The child gets no network: nothing is fetched for a model folder. Raises ChildError if it fails
    or does not end within `seconds`.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        try:
            process = subprocess.run(
                [sys.executable, "-P", "-m", module],
                input=json.dumps(request | {"answer": str(file)}),
                env=os.environ | offline,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise ChildError(f"it did not end within {seconds:.0f} s") from None
        answer = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if "error" in answer:
        raise ChildError(answer["error"])
    if "result" in answer:
        return answer["result"]
    code, last = process.returncode, process.stderr.strip().rpartition("\n")[2]
    end = signal.Signals(-code).name if code < 0 else f"status {code}"
    raise ChildError(f"it ended with {end}; its last line: {last or '-'}")


def serve(work: Callable[[dict[str, Any]], Any]) -> None:
    """Answer one request by `work`, in the child; an error becomes one line for the user."""
    request = json.load(sys.stdin)
    try:
        answer = {"result": work(request)}
    except Exception as error:  # noqa: BLE001  converters raise anything; users read one line
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        answer = {"error": name + " ".join(str(error).split())}
    Path(request["answer"]).write_text(json.dumps(answer), "utf-8")
