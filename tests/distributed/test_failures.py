"""One process fails, is killed or hangs: all end, one line says why, and nothing half is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import processes
import pytest
import torch
from jobs import BASE, flags
from processes import ended, kept_port, launched, together
from support import PATIENCE, ROOT, Done, call, results

from lib.distributed.context import DistContext
from lib.util import command, launch
from lib.util.command import FAILED, TERMINATED
from lib.util.errors import UserError
from lib.util.folders import staged_folder

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TIMEOUT = f"{0.05 * PATIENCE:g}"  # minutes
LONG = 4 * PATIENCE  # seconds, longer than that
SECOND_IS_GONE = r"error: process 0 of \d: process 1 is gone \(.*\); all end, and the first to .*"
pytestmark = pytest.mark.usefixtures("at_place")


def complaints(done: list[Done]) -> list[str]:
    return [line for one in done for line in one.complaints]


def nothing_saved(folder: Path, case: str = "wanda") -> None:
    """No model and no stage; the locks of a run that was killed may stay."""
    names = {path.name for path in (folder / case).glob("*")}  # folders that begin with a dot, too
    assert names <= {".model.lock", ".run.lock"}


def test_a_killed_process_ends_the_others(place: Path, tmp_path: Path) -> None:
    argv = [*flags("offloaded", tmp_path), "--offload", tmp_path / "away"]
    done = ended(together(3, [argv], place, {1: "1:SIGKILL"}))
    assert [one.status for one in done] == [FAILED, -signal.SIGKILL, TERMINATED]
    (line,) = complaints(done)
    assert re.fullmatch(SECOND_IS_GONE, line)
    nothing_saved(tmp_path, "offloaded")
    assert not (tmp_path / "away").exists()  # in which the machine's first process alone writes


def test_the_first_process_killed_ends_the_others(place: Path, tmp_path: Path) -> None:
    done = ended(together(2, [flags("wanda", tmp_path)], place, {0: "2:SIGKILL"}))
    assert [one.status for one in done] == [-signal.SIGKILL, TERMINATED]
    assert complaints(done) == []  # the launcher's own report names the signal
    nothing_saved(tmp_path)


def test_without_a_launcher_the_others_end_by_themselves(place: Path, tmp_path: Path) -> None:
    faults = {0: "2:SIGKILL"}
    workers = together(2, [flags("wanda", tmp_path)], place, faults, agent=False)
    done = [one.end() for one in workers]
    assert [one.status for one in done] == [-signal.SIGKILL, FAILED]
    (line,) = complaints(done)
    assert line.startswith("error: process 1 of 2: process 0 is gone (")


def test_a_stopped_process_ends_the_others(place: Path, tmp_path: Path) -> None:
    argv = [*flags("wanda", tmp_path), "--timeout", TIMEOUT]
    first, second = together(2, [argv], place, {1: "1:SIGSTOP"})
    done = first.end()
    assert done.status == FAILED
    assert done.complaints == [
        f"error: process 0 of 2: process 1 did not answer; it hangs, or --timeout {TIMEOUT} is too "
        "short"
    ]
    second.process.terminate()
    os.kill(second.process.pid, signal.SIGCONT)
    done = second.end()
    assert (done.status, done.complaints) == (TERMINATED, [])
    nothing_saved(tmp_path)


def test_a_long_solve_is_waited_for(place: Path, tmp_path: Path) -> None:
    argv = [*flags("wanda", tmp_path), "--timeout", TIMEOUT]
    done = ended(together(2, [argv], place, {0: f"1:long {LONG}", 1: "1:patient"}))
    assert [one.status for one in done] == [0, 0], complaints(done)
    assert results(tmp_path / "wanda" / "run")["seconds"]["prune"] > LONG


@pytest.mark.parametrize("rank", [0, 1])
def test_who_fails_tells_it(rank: int, place: Path, tmp_path: Path) -> None:
    done = ended(together(2, [flags("wanda", tmp_path)], place, {rank: "1:no such luck"}))
    assert done[rank].status == FAILED
    assert done[rank].complaints == ["error: no such luck"]
    if rank == 0:
        assert (done[1].status, done[1].complaints) == (TERMINATED, [])
    else:
        (line,) = done[0].complaints
        assert done[0].status == FAILED and re.fullmatch(SECOND_IS_GONE, line)
    nothing_saved(tmp_path)


def test_a_defect_shows_one_traceback(place: Path, tmp_path: Path) -> None:
    faults = {0: "1:defect", 1: "1:defect"}
    done = ended(together(2, [flags("wanda", tmp_path)], place, faults))
    assert [one.status for one in done] == [FAILED, TERMINATED]
    assert [one.err.count("RuntimeError: defect") for one in done] == [1, 0]


def test_different_flags_are_found_at_the_start(place: Path, tmp_path: Path) -> None:
    done = ended(together(2, [flags("wanda", tmp_path)], place, own={1: ["--seed", "5"]}))
    assert [one.status for one in done] == [FAILED, TERMINATED]
    (line,) = complaints(done)
    assert line.startswith("error: --seed: process ") and "has 5" in line and "has 0" in line
    nothing_saved(tmp_path)


def test_torchrun_and_a_killed_process(place: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport worker\n"
        "fault = '1:SIGKILL' if os.environ['RANK'] == '1' else ''\n"
        "worker.work([sys.argv[1:]], [{}], fault, '.', '/dev/stdout', '/dev/stderr')\n"
    )
    done = launched([*TORCHRUN, program, *flags("wanda", tmp_path)], place)
    assert done.status == 1
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID", done.err)
    said = [line for line in done.complaints if line.startswith("error:")]
    assert all(re.fullmatch(SECOND_IS_GONE, line) for line in said) and len(said) <= 1, said
    nothing_saved(tmp_path)
    assert str(program) not in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout


def test_torchrun_and_a_mistake(place: Path, tmp_path: Path) -> None:
    argv = [*flags("wanda", tmp_path), "--save", "uk/test.jsonl"]
    done = launched([*TORCHRUN, ROOT / "main.py", *argv], place)
    assert done.status == 1
    assert [line for line in done.complaints if line.startswith("error:")] == [
        "error: --save uk/test.jsonl: is a file; name a folder"
    ]


def test_mistakes_in_flags_are_told_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert call("--model", "llama", *BASE).status == 2
        assert call("--model", "none/such/model", *BASE, "--eval_only").status == FAILED
    assert waited == [launch.TURN_SECONDS] * 2


def test_accelerate_that_starts_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="--num_processes: .* --multi_gpu"):
        DistContext(torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_are_out_of_reach(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits in vain for the second to come; the second finds nobody at the port."""
    with kept_port() as port:
        place = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
        for name, value in (place | dict(MASTER_PORT=port.getsockname()[1])).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"process {rank} can't reach the others at MASTER"):
            DistContext(torch.device("cpu"), join_seconds=1)


def test_no_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR None.*start all with torchrun"):
        DistContext(torch.device("cpu"))


def test_sigterm_ends_a_run_without_a_word(place: Path, tmp_path: Path) -> None:
    argv = [*flags("offloaded", tmp_path), "--offload", tmp_path / "away"]
    done = processes.run(argv, place, "1:SIGTERM")
    assert (done.status, done.complaints) == (TERMINATED, [])
    assert not (tmp_path / "away").exists()
    nothing_saved(tmp_path, "offloaded")


def test_sigterm_clears_away_what_is_half_done(tmp_path: Path) -> None:
    def save(_: list[str]) -> None:
        with staged_folder(tmp_path / "model") as stage:
            (stage / "half").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        command.run(save, [])
    assert left.value.code == TERMINATED
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
