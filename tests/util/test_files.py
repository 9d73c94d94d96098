"""What a run writes is the old or the new as a whole, wherever it is interrupted."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lib.util import files
from lib.util.errors import UserError
from lib.util.files import check_output_folder, staged_folder, write_text
from lib.util.host import gib


def fill(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed when it turns to the system for the `step`-th time.

    False where it has come to its end before. The steps are those that Python announces: a file is
    opened, a folder made, a name changed or removed, a C library called.
    """
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def kill(event: str, _: tuple) -> None:
            if event.startswith(("open", "os.", "ctypes.")) and next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL)
    return ended != 0


# two folders swapped in one step, and what is done on a system that can't
EXCHANGE = pytest.mark.parametrize("exchange", [True, False])


def set_exchange(exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)


# --- a folder, old or new


@EXCHANGE
@pytest.mark.parametrize("name", ["model", "model[1]*?"])
def test_a_folder_is_replaced_as_a_whole(
    name: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_exchange(exchange, monkeypatch)
    target = tmp_path / "deep" / name
    with staged_folder(target) as stage:
        fill(stage, a="1", b="1")
        assert not target.exists()
    with staged_folder(target) as stage:
        fill(stage, a="2")
        assert texts(target) == {"a": "1", "b": "1"}
    assert texts(target) == {"a": "2"}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ZeroDivisionError(), OSError(28, "full"), SafetensorError("x")]
)
def test_an_error_leaves_the_old_folder(error: BaseException, tmp_path: Path) -> None:
    target = fill(tmp_path / "model", a="old")
    raised = UserError if isinstance(error, OSError | SafetensorError) else type(error)
    with pytest.raises(raised) as caught, staged_folder(target, "--save_model") as stage:
        fill(stage, a="new")
        raise error
    assert texts(target) == {"a": "old"}
    assert list(tmp_path.iterdir()) == [target]
    if raised is UserError:
        assert str(caught.value).startswith(f"--save_model {target}: can't be saved")


OLD, NEW = ({"a": word, "b": word} for word in ("old", "new"))


@EXCHANGE
def test_killed_at_any_step_leaves_the_old_or_the_new(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_exchange(exchange, monkeypatch)
    target = tmp_path / "model"

    def save(**texts: str) -> None:
        with staged_folder(target) as stage:
            fill(stage, **texts)

    for step in itertools.count():
        save(**OLD)
        killed = killed_at(step, lambda: save(**NEW))
        if exchange:  # else the next run may have to put the old one back
            assert texts(target) in (OLD, NEW)
        with pytest.raises(KeyboardInterrupt), staged_folder(target):
            raise KeyboardInterrupt
        assert texts(target) in (OLD, NEW) and list(tmp_path.iterdir()) == [target]
        if not killed:
            break
    assert texts(target) == NEW and step > 10


def test_stages_of_killed_runs_go_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    left = fill(tmp_path / f".model{files.STAGE_MARK}x1", a="half")
    other = fill(tmp_path / f".model2{files.STAGE_MARK}x1", a="not ours")
    with staged_folder(target) as stage:
        fill(stage, a="new")
    assert not left.exists() and other.exists() and texts(target) == {"a": "new"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = fill(tmp_path / "disk" / "real", a="old")
    link = tmp_path / "model"
    link.symlink_to(real)
    with staged_folder(link) as stage:
        fill(stage, a="new")
    assert link.is_symlink() and texts(real) == {"a": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "model"}


def test_others_may_read_what_was_saved(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "model") as stage:
        fill(stage / "sub", a="1")
        (stage / "sub" / "a").chmod(0o600)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*")]
    assert sorted(modes) == [0o644, 0o755]


# --- small files


def test_a_text_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old")
    assert file.stat().st_mode & 0o777 == 0o644

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError):
        write_text(file, "new")
    assert texts(tmp_path) == {"results.json": "old"}


def test_a_text_is_whole_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for step in itertools.count():
        write_text(file, "old")
        killed = killed_at(step, lambda: write_text(file, "new"))
        assert file.read_text() in ("old", "new")
        if not killed:
            break
    assert file.read_text() == "new" and step >= 3


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 KiB"), (2**20, "1.00 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert gib(size) == text


# --- what can be checked before


def test_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output_folder("--save", str(tmp_path / "new" / "deep"))
    check_output_folder("--save", str(fill(tmp_path / "logs", log="kept")))
    fill(tmp_path / "model" / "additional_chat_templates", **{"a.jinja": ""})
    model = str(fill(tmp_path / "model", **{"config.json": "{}", "model.safetensors": ""}))
    check_output_folder("--save_model", model, may_hold="config.json")
    fill(tmp_path / "model", **{".git": "history"})
    with pytest.raises(UserError, match=r"holds \.git, which is no part of a model"):
        check_output_folder("--save_model", model, may_hold="config.json")
    with pytest.raises(UserError, match=r"--resume .*: holds log, but no job\.json"):
        check_output_folder("--resume", str(tmp_path / "logs"), may_hold="job.json")
    empty = str(fill(tmp_path / "empty"))
    check_output_folder("--save_model", empty, may_hold="config.json")
    assert texts(tmp_path / "logs") == {"log": "kept"}
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == empty)
    with pytest.raises(UserError, match=f"--save_model {empty}: a mount point"):
        check_output_folder("--save_model", empty, may_hold="config.json")
