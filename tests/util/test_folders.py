"""A folder is the old or the new as a whole, wherever a run is killed; nothing of a user's goes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lib.util import folders
from lib.util.errors import UserError
from lib.util.files import check_output_folder, write_text
from lib.util.folders import MANIFEST, check_replaceable, locked_dir, staged_folder
from lib.util.host import gib
from lib.util.locks import exclusive_lock


def fill(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def written(folder: Path, **texts: str) -> Path:
    """A folder as an earlier run left it."""
    with staged_folder(folder) as stage:
        fill(stage, **texts)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MANIFEST}


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
        monkeypatch.setattr(folders, "_exchanged", lambda a, b: False)


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
    target = written(tmp_path / "model", a="old")
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
    left = fill(tmp_path / f".model{folders.STAGE_MARK}x1yz_789", a="half")
    others = [
        fill(tmp_path / name, a="not of this target")
        for name in (
            f".model2{folders.STAGE_MARK}x1yz_789",
            f".model{folders.STAGE_MARK}too{folders.STAGE_MARK}x1yz_789",
            f".model{folders.STAGE_MARK}mine",
        )
    ]
    written(target, a="new")
    assert not left.exists() and all(map(Path.exists, others)) and texts(target) == {"a": "new"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = written(tmp_path / "disk" / "real", a="old")
    link = tmp_path / "model"
    link.symlink_to(real)
    with staged_folder(link) as stage:
        fill(stage, a="new")
    assert link.is_symlink() and texts(real) == {"a": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "model"}


@pytest.mark.parametrize(("mask", "modes"), [(0o022, (0o755, 0o644)), (0o077, (0o700, 0o600))])
def test_saved_files_have_the_permissions_that_the_user_set(
    mask: int, modes: tuple[int, int], tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        with staged_folder(tmp_path / "model") as stage:
            fill(stage / "sub", a="1")
            (stage / "sub" / "a").chmod(0o640)
        write_text(tmp_path / "results.json", "{}")
    finally:
        os.umask(before)
    for path in (tmp_path / "model", *(tmp_path / "model").rglob("*"), tmp_path / "results.json"):
        assert path.stat().st_mode & 0o777 == (modes[0] if path.is_dir() else modes[1]), path


def test_every_file_is_on_the_disk_before_the_old_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written(tmp_path / "model", a="old")
    synced: set[int] = set()
    fsync, exchanged = os.fsync, folders._exchanged

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def exchange(stage: Path, target: Path) -> bool:
        assert {path.stat().st_ino for path in (stage, *stage.rglob("*"))} <= synced
        synced.clear()
        return exchanged(stage, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(folders, "_exchanged", exchange)
    with staged_folder(model) as stage:
        fill(stage / "sub", a="new", b="new")
    assert synced == {tmp_path.stat().st_ino}  # and then the name


def test_a_folder_that_cant_be_put_in_place_keeps_the_new_files_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_exchange(False, monkeypatch)
    model = written(tmp_path / "model", a="old")
    rename = os.rename

    def no_second_rename(source: Path, target: Path) -> None:
        if target == model and ".partial-" in str(source):
            raise PermissionError(1, "Operation not permitted")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", no_second_rename)
        with pytest.raises(UserError, match="not permitted; the new files are in .*model-1"):
            written(model, a="new")
    assert texts(model) == {"a": "old"} and texts(tmp_path / "model-1") == {"a": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model-1"}


def test_a_file_that_comes_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    model = written(tmp_path / "model", a="old")
    exchanged = folders._exchanged

    def late(stage: Path, target: Path) -> bool:
        fill(target, **{"notes.txt": "mine"})
        return exchanged(stage, target)

    monkeypatch.setattr(folders, "_exchanged", late)
    written(model, a="new")
    assert texts(model) == {"a": "new"}
    assert texts(tmp_path / "model-1") == {"a": "old", "notes.txt": "mine"}
    assert "notes.txt" in capfd.readouterr().err


# --- small files


def test_a_text_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old")

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


# --- what is a user's


def edited(folder: Path) -> None:
    (folder / "README.md").write_text("I wrote thiS")  # as long as before


FOREIGN = {
    "notes.txt, which no earlier run wrote": lambda folder: fill(folder, **{"notes.txt": "mine"}),
    "sub/deep.py, which no earlier run wrote": lambda folder: fill(
        folder / "sub", **{"deep.py": ""}
    ),
    "empty, which no earlier run wrote": lambda folder: fill(folder / "empty"),
    "README.md, which was changed": edited,
    "config.json, which was changed": lambda folder: fill(folder, **{"config.json": "{ }"}),
    r"\(there is no manifest.json that lists it\)": lambda folder: (folder / MANIFEST).unlink(),
}


@pytest.mark.parametrize("problem", FOREIGN)
def test_a_folder_that_holds_something_of_a_users_is_refused(problem: str, tmp_path: Path) -> None:
    files = {"config.json": "{}", "README.md": "I wrote this", "model.safetensors": "0"}
    model = written(tmp_path / "model", **files)
    fill(model / "sub", a="b") if "sub/" in problem else None
    check_replaceable("--save_model", str(tmp_path / "new" / "deep"))
    if "sub/" not in problem:
        check_replaceable("--save_model", str(model))
    FOREIGN[problem](model)
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    told = "sub|a, which" if "sub/" in problem else problem
    with pytest.raises(UserError, match=rf"--save_model {model}: holds .*{told}"):
        check_replaceable("--save_model", str(model))
    with pytest.raises(UserError, match="the new files are in .*model-1"):
        written(model, a="new")
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    assert texts(tmp_path / "model-1") == {"a": "new"}
    written(tmp_path / "model-1", a="newer")  # whole, with a manifest of its own


def test_what_comes_while_a_run_works_is_not_lost(tmp_path: Path) -> None:
    model = written(tmp_path / "model", a="old")
    with pytest.raises(UserError, match="notes.txt"), staged_folder(model, "--save_model") as stage:
        fill(stage, a="new")
        fill(model, **{"notes.txt": "mine"})
    assert texts(model) == {"a": "old", "notes.txt": "mine"}
    assert texts(tmp_path / "model-1") == {"a": "new"}


def test_of_two_runs_with_one_target_the_second_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    with locked_dir(model, "--save_model") as first, first.staged() as stage:
        fill(stage, a="of the first")
        with pytest.raises(UserError, match=f"--save_model {model}: another run"):
            with staged_folder(model, "--save_model"):
                pytest.fail("was begun")
        assert texts(stage) == {"a": "of the first"}  # its stage is no leftover
    assert texts(model) == {"a": "of the first"}
    assert list(tmp_path.iterdir()) == [model]
    written(model, a="of the second")


def test_what_is_in_the_way_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_exchange(False, monkeypatch)
    model = written(tmp_path / "model", a="old")
    mine = fill(tmp_path / "model.being-replaced", a="mine")
    with pytest.raises(UserError, match="model.being-replaced is in the way; move it"):
        with locked_dir(model):  # before anything slow starts
            pytest.fail("was begun")
    assert texts(mine) == {"a": "mine"} and texts(model) == {"a": "old"}


def large(folder: Path, byte: int, at: int = 0) -> Path:
    """A file of 3 MiB with one byte set."""
    folder.mkdir(exist_ok=True)
    data = bytearray(3 * 2**20)
    data[at] = byte
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize("at", [0, 2**20 + 12345, 3 * 2**20 - 1])
def test_large_weights_that_were_trained_are_not_replaced(at: int, tmp_path: Path) -> None:
    with staged_folder(tmp_path / "model") as stage:
        large(stage, 1)
    large(tmp_path / "model", 2, at)  # as long as before
    with pytest.raises(UserError, match="model.safetensors, which was changed"):
        check_replaceable("--save_model", str(tmp_path / "model"))


def test_a_copy_of_a_saved_folder_is_known_again(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "model") as stage:
        large(stage, 1)
    shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    check_replaceable("--save_model", str(tmp_path / "copy"))


def test_a_folder_without_a_manifest_is_refused_without_reading_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "home" / "deep", a="mine")
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("reads the whole tree"))
    with pytest.raises(UserError, match="holds deep, which no earlier run wrote"):
        check_replaceable("--save_model", str(tmp_path / "home"))


# --- locks


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_of_two_processes_one_holds_the_lock(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`code`: what a file system without flock answers."""
    if code:
        monkeypatch.setattr(fcntl, "flock", lambda *_: raise_(OSError(code, os.strerror(code))))

    def second() -> int:
        if (child := os.fork()) == 0:
            try:
                with exclusive_lock(tmp_path / "lock", "another run holds it"):
                    os._exit(0)
            except UserError as error:
                os._exit(1 if str(error) == "another run holds it" else 2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with exclusive_lock(tmp_path / "lock", "another run holds it"):
        assert second() == 1
    assert not list(tmp_path.iterdir())
    if (child := os.fork()) == 0:
        exclusive_lock(tmp_path / "lock", "").__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert second() == 0  # a killed process holds nothing


def raise_(error: Exception) -> None:
    raise error


# --- what can be checked before


def test_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output_folder("--save", str(tmp_path / "new" / "deep"))
    check_output_folder("--save", str(fill(tmp_path / "logs", log="kept")))
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]  # nothing is made
    with pytest.raises(UserError, match=r"--resume .*: holds log, but no job\.json"):
        check_output_folder("--resume", str(tmp_path / "logs"), mark="job.json")
    empty = str(fill(tmp_path / "empty"))
    check_replaceable("--save_model", empty)
    assert texts(tmp_path / "logs") == {"log": "kept"}
    for check in (check_output_folder, check_replaceable):
        with pytest.raises(UserError, match="is a file"):
            check("--save", str(tmp_path / "logs" / "log"))
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == empty)
    with pytest.raises(UserError, match=f"--save_model {empty}: a mount point"):
        check_replaceable("--save_model", empty)
