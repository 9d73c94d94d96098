"""Writing that leaves the old or the new, never half: staged beside the target, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)
STAGE_MARK = ".partial-"


def check_output_folder(flag: str, path: str, may_hold: str | None = None) -> None:
    """UserError where a run could not write its output there.

    `may_hold`: a file that marks a folder which may be replaced as a whole; other non-empty
    folders are refused.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file; name a folder")
    occupied = folder.is_dir() and any(folder.iterdir())
    if may_hold and occupied and not (folder / may_hold).is_file():
        raise UserError(f"{flag} {path}: holds something that is not a model; name another folder")
    above = folder if folder.exists() and not may_hold else folder.parent
    try:
        above.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror}") from error


def check_room(flag: str, path: str, needed: int) -> None:
    """UserError where the disk of `path` has less than `needed` bytes free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{flag} {path}: needs about {needed / 2**30:.1f} GiB, "
            f"but only {free / 2**30:.1f} GiB are free; name a folder on another disk"
        )


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


@contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends without an error.

    Stages that a killed run left behind are removed first. Whatever happens, `target` is the old
    folder or the new one.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}{STAGE_MARK}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}{STAGE_MARK}", dir=target.parent))
    os.chmod(stage, 0o755)
    try:
        yield stage
        for file in stage.rglob("*"):  # safetensors writes files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)
        _put_in_place(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # after an exchange: the old folder


def _put_in_place(stage: Path, target: Path) -> None:
    if not target.exists():
        os.rename(stage, target)
        return
    if _exchanged(stage, target):
        return
    old = stage.with_name(f"{stage.name}-old")  # no atomic exchange here: two renames
    os.rename(target, old)
    os.rename(stage, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux)."""
    try:
        renameat2: Callable = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return 0 == renameat2(
        _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)
    )
