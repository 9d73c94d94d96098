"""The runner of the list for the first GPU, with steps that end in all sorts of ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import PATIENCE, ROOT, wait_until

sys.path.insert(0, str(ROOT / "tests" / "bench" / "gpu"))

import first_run
import steps
from sizes import Size
from steps import Results, Step, in_order, run_steps

from lib.util import command
from lib.util.errors import UserError

LIMIT = 2 * PATIENCE  # seconds
GOOD = Step("good", "tiny_steps:check_good", 1)
BAD = Step("bad", "tiny_steps:check_bad", 1)
ABSENT = Step("absent", "tiny_steps:check_absent", 1)
CRASHING = Step("crashing", "tiny_steps:check_crashing", 1)
HANGING = Step("hanging", "tiny_steps:check_hanging", 1)
OTHER = Step("other", "tiny_steps:check_good", 1, {"value": 2.5})
ALL = [BAD, CRASHING, ABSENT, GOOD, HANGING, OTHER]


RUNNER = """
import sys
from pathlib import Path
from sizes import Size
from steps import Results, Step, run_steps

folder = sys.argv[1]
names = "good", "hanging"
chosen = [Step(name, f"tiny_steps:check_{name}", 1) for name in names]
results = Results(Path(folder, "gpu.json"), {"device": "cpu"}, False)
run_steps(chosen, "cpu", Size(False, folder), results, 5, {}, lambda *_: None)
"""


def run(
    folder: Path,
    chosen: list[Step],
    minutes: float = 5,
    resume: bool = False,
    only: tuple = (),
    **limits: float,
) -> dict:
    """{step: report} as gpu.json has them, after the steps."""
    results = Results(folder / "gpu.json", {"device": "cpu"}, resume)
    size = Size(small=False, work=str(folder))
    todo = in_order(chosen, results, list(only))
    run_steps(todo, "cpu", size, results, minutes, {}, lambda *_: None, **limits)
    return json.loads((folder / "gpu.json").read_text("utf-8"))["steps"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All steps, in turn, with a time-out of a few seconds for the one that hangs."""
    folder = tmp_path_factory.mktemp("steps")
    return SimpleNamespace(folder=folder, reports=run(folder, ALL, least_limit=LIMIT, longer=LIMIT))


def test_every_step_has_a_report_whatever_happens(done: SimpleNamespace) -> None:
    found = {name: report["result"] for name, report in done.reports.items()}
    assert list(found) == [step.name for step in ALL]
    assert found == dict(
        good="ok", bad="failed", absent="skipped", crashing="failed", hanging="failed", other="ok"
    )
    assert all(report["seconds"] >= 0 for report in done.reports.values())


def test_figures_and_options(done: SimpleNamespace) -> None:
    assert done.reports["good"]["figures"] == {"value": 1.0, "cases": {"infinite": "inf"}}
    assert done.reports["other"]["figures"]["value"] == 2.5


def test_a_failure_tells_its_reason_in_a_line_and_all_of_it_in_the_file(
    done: SimpleNamespace,
) -> None:
    bad = done.reports["bad"]
    assert bad["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "check_bad" in bad["traceback"] and "advice" in bad["traceback"]
    assert done.reports["absent"]["reason"] == "needs two GPUs"
    crash = done.reports["crashing"]
    assert crash["reason"] == "its process ended with SIGSEGV: last words"


def test_what_hangs_is_ended_with_all_that_it_started(done: SimpleNamespace) -> None:
    assert done.reports["hanging"]["reason"] == f"ended after {LIMIT} s without an answer"
    pid = int((done.folder / "pid").read_text("utf-8"))
    wait_until(lambda: not alive(pid))  # its new parent buries it


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_resume_does_what_was_not_tried_and_then_what_failed(tmp_path: Path) -> None:
    run(tmp_path, [BAD, GOOD])
    results = Results(tmp_path / "gpu.json", {"device": "cpu"}, resume=True)
    assert in_order([BAD, GOOD, OTHER], results, []) == [OTHER, BAD]
    assert in_order([BAD, GOOD, OTHER], results, ["good"]) == [GOOD]
    run(tmp_path, [BAD, GOOD, OTHER], resume=True)
    assert len((tmp_path / "calls").read_text("utf-8").split()) == 2  # of good, once, and other
    again = run(tmp_path, [BAD, GOOD, OTHER], resume=True, only=("good",))
    assert len((tmp_path / "calls").read_text("utf-8").split()) == 3
    assert list(again) == ["bad", "good", "other"]


def test_results_of_an_earlier_run_are_not_written_over(tmp_path: Path) -> None:
    run(tmp_path, [GOOD])
    with pytest.raises(UserError, match="--save .* --resume"):
        Results(tmp_path / "gpu.json", {"device": "cpu"}, resume=False)
    with pytest.raises(UserError, match="--resume: .* device 'cpu', now it is 'cuda:0'"):
        Results(tmp_path / "gpu.json", {"device": "cuda:0"}, resume=True)
    (tmp_path / "gpu.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="--resume: .* is not what an earlier run wrote"):
        Results(tmp_path / "gpu.json", {"device": "cpu"}, resume=True)


def test_what_no_longer_fits_is_left_out_and_done_by_the_next_run(tmp_path: Path) -> None:
    long = replace(OTHER, seconds=1000)
    found = run(tmp_path, [long, GOOD], minutes=0.5)
    assert found["other"]["result"] == "no time" and "about 1000 s" in found["other"]["reason"]
    assert found["good"]["result"] == "ok"
    assert run(tmp_path, [OTHER, GOOD], resume=True)["other"]["result"] == "ok"
    run(tmp_path, [BAD], resume=True)
    later = run(tmp_path, [replace(BAD, seconds=1000)], minutes=0.5, resume=True)
    assert later["bad"]["result"] == "failed"  # what is known stays


def test_the_budget_ends_a_step(tmp_path: Path) -> None:
    found = run(tmp_path, [HANGING, GOOD], minutes=2 / 60)
    assert found["hanging"]["reason"].startswith("ended after 2 s")
    assert found["good"]["result"] == "no time"


def test_a_killed_runner_loses_nothing_and_takes_the_step_with_it(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, steps.FOLDERS))
    code = [sys.executable, "-c", RUNNER, str(tmp_path)]
    process = subprocess.Popen(code, env=os.environ | {"PYTHONPATH": path})
    wait_until((tmp_path / "pid").exists)
    (step,) = (pid for pid in steps.descendants(process.pid) if is_step(pid))
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(int((tmp_path / "pid").read_text("utf-8")), signal.SIGKILL)
    known = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["steps"]
    assert known["good"]["result"] == "ok" and known["hanging"]["result"] == "begun"
    wait_until(lambda: not alive(step))
    assert in_order([GOOD, HANGING], Results(tmp_path / "gpu.json", {"device": "cpu"}, True), [])


def is_step(pid: int) -> bool:
    return b"one_step.py" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_command_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--device", "cpu", "--small", "--save", str(tmp_path / "there")]
    assert command.run(partial(first_run.main, known=[GOOD, BAD, ABSENT]), argv) == 1
    out, err = capsys.readouterr()
    assert err == f"error: failed: bad; tracebacks are in {tmp_path}/there/gpu.json\n"
    assert "3 of 3 checks, 25 minutes" in out and "1/3  good" in out
    cells = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    rows = [(name.removeprefix("| "), result.strip()) for name, result, *_ in cells[1:]]
    expected = [("good", "ok"), ("good: cases", "|"), ("bad", "failed"), ("absent", "skipped")]
    assert rows == expected
    main = partial(first_run.main, known=[GOOD])
    assert command.run(main, [*argv[:-1], str(tmp_path / "other")]) == 0


def test_without_a_gpu_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert command.run(first_run.main, []) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no CUDA device was found" in said and "--device cpu --small" in said
    assert command.run(first_run.main, ["--device", "cpu"]) == 1
    assert "--device cpu: would take days in full size; add --small" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_check_can_be_called() -> None:
    """By the name, and with the options, that the list has for it."""
    import inspect
    from importlib import import_module

    assert len({step.name for step in first_run.STEPS}) == len(first_run.STEPS)
    for step in first_run.STEPS:
        module, _, name = step.check.partition(":")
        check = getattr(import_module(module), name)
        inspect.signature(check).bind("cuda:0", Size(True, ""), **step.options)
