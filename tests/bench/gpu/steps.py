"""Steps, each in a process of its own with a time-out, their results in one file.

A step that fails, crashes or hangs ends alone: a CUDA context that an error has spoilt is gone with
its process. The file is written whole whenever something is known, so that nothing is lost when the
runner is killed; the next one goes on from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sizes import Size

from lib.util.errors import UserError
from lib.util.files import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FOLDERS = [HERE, HERE.parent, HERE.parents[1], ROOT]
LONGER = 4  # times what a step is said to take, until it is ended
LEAST_LIMIT = 120  # seconds; machines are busy
SMALL = 15  # seconds that any small step may take
SAID = 4000  # characters of a process's last words
DONE, BEGUN, NO_TIME = "ok", "begun", "no time"


@dataclass(frozen=True)
class Step:
    """`check`: `module:function`, called as function(device, size, **options) -> figures.

    `seconds`: about as long it takes on a large GPU, with the start of its process.
    """

    name: str
    check: str
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)


def in_own_process(
    step: Step,
    device: str,
    size: Size,
    limit: float,
    settings: dict[str, str] | None = None,
    before: Iterable[str] = (),
) -> dict[str, Any]:
    """The step's report: `result`, `seconds`, and `figures` or a `reason`.

    `settings`: of its environment. `before`: words of a command that runs the process.
    """
    Path(size.work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=size.work, prefix="step-") as folder:
        order, said = Path(folder, "order.json"), Path(folder, "said")
        report = Path(folder, "report.json")
        known = dict(check=step.check, options=step.options, device=device, size=asdict(size))
        order.write_text(json.dumps(known | {"report": str(report)}), "utf-8")
        command = [*before, sys.executable, str(HERE / "one_step.py"), str(order)]
        start = time.perf_counter()
        status = ended(command, said, limit, settings or {})
        spent = round(time.perf_counter() - start, 1)
        words = said.read_text("utf-8", errors="replace")[-SAID:]
        if report.is_file() and status == 0:
            found = json.loads(report.read_text("utf-8"))
        else:
            found = {"result": "failed", "reason": how_it_ended(status, limit, words)}
        if found["result"] == "failed":
            found["said"] = words
    return found | {"seconds": spent}


def ended(command: list[str], said: Path, limit: float, settings: dict[str, str]) -> int | None:
    """Run a command to its end; its status, or None where it was ended after `limit` seconds.

    Whatever it says goes to the file `said`; whatever it started ends with it.
    """
    path = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | settings
    with said.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """The process, whatever it started, and what that started."""
    below = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in below:  # some launchers put what they start into sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started and that are still there, and theirs (Linux)."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text("utf-8", errors="replace").rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = parents.get(pid, [])[:]
    for one in found:  # grows
        found += parents.get(one, [])
    return found


def how_it_ended(status: int | None, limit: float, words: str) -> str:
    """Of a process that has left no report."""
    if status is None:
        return f"ended after {limit:.0f} s without an answer"
    how = f"status {status}" if status > 0 else signal_name(-status)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return ": ".join([f"its process ended with {how}", *lines[-1:]])[:500]


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Results:
    """What is known of the steps so far, in a file."""

    def __init__(self, file: Path, setting: dict[str, Any], resume: bool) -> None:
        """`setting`: what must be the same in a run that goes on. UserError where it is not."""
        self.file = file
        self.known: dict[str, Any] = {"setting": setting, "machine": {}, "steps": {}}
        if not file.exists():
            return
        if not resume:
            raise UserError(
                f"--save {file.parent}: holds the {file.name} of an earlier run; go on with it by "
                "--resume, or name another folder"
            )
        try:
            self.known = json.loads(file.read_text("utf-8"))
            before = self.known["setting"]
        except (ValueError, KeyError) as error:
            raise UserError(f"--resume: {file} is not what an earlier run wrote") from error
        for name, value in setting.items():
            if before.get(name) != value:
                raise UserError(
                    f"--resume: {file} was begun with {name} {before.get(name)!r}, now it is "
                    f"{value!r}; give the same, or another --save"
                )

    def of(self, step: Step) -> dict[str, Any]:
        return self.known["steps"].get(step.name, {})

    def note(self, step: Step, report: dict[str, Any]) -> None:
        self.known["steps"][step.name] = report
        write_text(self.file, json.dumps(self.known, indent=1, ensure_ascii=False) + "\n")


def in_order(steps: list[Step], results: Results, only: list[str]) -> list[Step]:
    """What is to be done: what was not tried comes first, then what failed before.

    `only`: names of steps; these are done again too.
    """
    if only:
        return [step for step in steps if step.name in only]
    left = [step for step in steps if results.of(step).get("result") != DONE]
    return sorted(left, key=lambda step: results.of(step).get("result") not in (None, NO_TIME))


def run_steps(
    steps: list[Step],
    device: str,
    size: Size,
    results: Results,
    minutes: float,
    settings: dict[str, str],
    told: Callable[[int, Step, dict[str, Any], float], None],
    least_limit: float = LEAST_LIMIT,
    longer: float = LONGER,
) -> None:
    """Run the steps in `minutes`; what no longer fits is noted as such.

    `told(number, step, report, seconds left)` is called after each.
    """
    deadline = time.monotonic() + 60 * minutes
    for number, step in enumerate(steps, start=1):
        left = deadline - time.monotonic()
        expected = min(step.seconds, SMALL) if size.small else step.seconds
        if left < expected:
            reason = f"takes about {expected:.0f} s, {max(0, left):.0f} s are left of --minutes"
            report = {"result": NO_TIME, "reason": reason, "seconds": 0.0}
            if not results.of(step):  # else what was found before stays
                results.note(step, report)
        else:
            results.note(step, {"result": BEGUN, "reason": "the run was ended in it"})
            limit = min(left, max(least_limit, longer * expected))
            report = in_own_process(step, device, size, limit, settings)
            results.note(step, report)
        told(number, step, report, max(0.0, deadline - time.monotonic()))
