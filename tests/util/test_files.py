"""Folders that are written whole or not at all, and what comes or goes with a process."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import content, ended, python, wait_until

from lib.model.masks import write_masks
from lib.util import processes, ranks
from lib.util.errors import UserError, describe_error
from lib.util.files import check_new_folder, staged_folder, temporary_folder
from lib.util.progress import progress


def test_what_lies_beside_a_new_folder_is_not_taken_over(tmp_path: Path) -> None:
    """It may be an unfinished run's, with hours of work."""
    kept = tmp_path / "new.partial"
    kept.mkdir()
    (kept / "block-00000.safetensors").write_bytes(b"hours")
    before = content(tmp_path)
    with pytest.raises(UserError, match="new.partial exists"):
        with staged_folder(tmp_path / "new", "OUT") as stage:
            (stage / "config.json").write_text("{}")
    assert content(tmp_path) == before
    check_new_folder("--save_model", str(tmp_path / "new"))  # which may be continued


def test_a_folder_has_its_name_once_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda of: done.append(os.readlink(f"/proc/self/fd/{of}")))
    monkeypatch.setattr(Path, "rename", lambda path, target: done.append("renamed"))
    with staged_folder(tmp_path / "new", "OUT") as stage:
        (stage / "config.json").write_text("{}")
    assert done == [str(stage / "config.json"), "renamed", str(tmp_path)]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """safetensors keeps what it writes from them."""
    before = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "new", "OUT") as stage:
            save_file({"a": torch.zeros(2)}, stage / "model.safetensors")
        write_masks(tmp_path / "masks", {"a": ((2, 4), torch.zeros(1, dtype=torch.uint8))})
    finally:
        os.umask(before)
    for file in (tmp_path / "new/model.safetensors", tmp_path / "masks"):
        assert file.stat().st_mode & 0o777 == 0o640, file


@pytest.mark.parametrize("target", ["disk", "gone"])
def test_a_link_is_no_new_folder(target: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=f"--save_model .*new: it is a link. Name .*{target}"):
        check_new_folder("--save_model", str(tmp_path / "new"))


HOLD = """
import sys, time
from lib.util.files import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    (folder / "block").write_text("held")
    time.sleep(600)
"""


def test_a_temporary_folder_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    """In /dev/shm it would be in memory until the machine starts again."""
    with temporary_folder(tmp_path) as folder:
        (folder / "block").write_text("held")
        assert folder.parent == tmp_path
    assert not folder.exists()
    process = python(HOLD, tmp_path, folder=tmp_path)
    wait_until(lambda: list(tmp_path.glob("*/block")))
    process.send_signal(signal.SIGKILL)
    ended(process)
    wait_until(lambda: not list(tmp_path.iterdir()))


def test_lines_come_through_a_pipe_as_they_are_printed(tmp_path: Path) -> None:
    code = "import time; from lib.util import cli as command\n"
    code += "command.run(lambda _: (print('memory: enough'), time.sleep(600)), [])"
    process = python(code, folder=tmp_path, PYTHONUNBUFFERED="")
    try:
        assert process.stdout.readline() == "memory: enough\n"
    finally:
        process.kill()
        ended(process)


def test_a_gpu_that_has_no_memory_for_products_is_out_of_memory() -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`")
    assert describe_error(error).startswith("out of memory (")
    assert describe_error(RuntimeError("a defect")) is None


def test_a_rank_that_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `srun --gpus-per-task=1` it is its own; torchrun shows all ranks the same."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    first = torch.device("cuda", 0)
    assert ranks.local_device(first) == first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="this machine lacks cuda:3, which its rank 3"):
        ranks.local_device(first)


def test_what_a_command_starts_ends_though_it_alone_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By `kill -INT`; a terminal interrupts both."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(processes, "started_by", lambda *_: (sleeping, dict(os.environ)))
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    soon = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    soon.start()
    with pytest.raises(KeyboardInterrupt):
        processes.call("main")
    signal.signal(signal.SIGINT, before)


def test_a_terminal_without_a_width_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    size = os.terminal_size((0, 0))
    monkeypatch.setattr("lib.util.progress.os.get_terminal_size", lambda _: size)
    monkeypatch.setattr("lib.util.progress.sys.stderr", terminal := io.StringIO())
    terminal.isatty, terminal.fileno = lambda: True, lambda: 2
    with progress(None, "waiting", "answer", delay=9) as bar:
        time.sleep(0.2)
        bar(0)
    assert not terminal.getvalue()  # a bar that is not due leaves no rest
    with progress(None, "waiting", "answer") as bar:
        time.sleep(0.2)
        bar(0)
    assert "waiting: 00:00" in terminal.getvalue() and "answer" not in terminal.getvalue()
    with progress(4, "pruning", "block") as bar:
        bar(2)
    assert "pruning:  50%|" in terminal.getvalue()
