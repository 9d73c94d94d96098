"""Writing that leaves the old or the new, never half: staged beside the target, then renamed."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lib.util.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)
STAGE_MARK = ".partial-"
MODEL_MARK = "config.json"
MODEL_FILES = (".json", ".safetensors", ".model", ".tiktoken", ".txt", ".jinja", ".md", ".py")
TEMPLATES = "additional_chat_templates"  # a folder of the tokenizer's


def check_output_folder(flag: str, path: str, may_hold: str | None = None) -> None:
    """UserError where a run could not write its output there.

    `may_hold`: a file that marks a folder of an earlier run; other non-empty folders are refused.
    A folder marked as a model's is going to be replaced, so it may hold nothing but a model.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file; name a folder")
    held = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    if may_hold and held and may_hold not in held:
        raise UserError(f"{flag} {path}: holds {held[0]}, but no {may_hold}; name another folder")
    if may_hold == MODEL_MARK:
        _check_replaceable(flag, path)
    above = folder if folder.exists() and not may_hold else folder.parent
    try:
        above.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror}") from error


def _check_replaceable(flag: str, path: str) -> None:
    folder = Path(path)
    if os.path.ismount(folder):
        raise UserError(f"{flag} {path}: a mount point can't be replaced; name a folder in it")
    for item in folder.iterdir() if folder.is_dir() else ():
        if item.suffix not in MODEL_FILES and item.name != TEMPLATES:
            raise UserError(
                f"{flag} {path}: holds {item.name}, which is no part of a model and would be lost; "
                "name another folder"
            )


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
def staged_folder(target: str | Path, flag: str = "") -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends without an error.

    Stages that a killed run left behind are removed first. Whatever happens, `target` is the old
    folder or the new one. Raises UserError, which names `flag`, where a file can't be written.
    """
    named = f"{flag} {target}".strip()
    target = Path(target).resolve()  # a link stays: what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}{STAGE_MARK}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}{STAGE_MARK}", dir=target.parent))
    os.chmod(stage, 0o755)
    try:
        yield stage
        for file in stage.rglob("*"):  # safetensors writes files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)
        _put_in_place(stage, target)
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{named}: can't be saved ({why}); it is as it was before, name a folder on a disk "
            "with room"
        ) from error
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
