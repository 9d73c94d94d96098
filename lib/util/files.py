"""Small files written whole or not at all, and checks of an output before anything is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lib.util.errors import UserError
from lib.util.host import gib


def check_output_folder(flag: str, path: str, mark: str | None = None) -> None:
    """Raise UserError where a run could not write its output into folder `path`; create nothing.

    `mark` names a file that every folder of an earlier run holds; a non-empty folder without it is
    refused.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file; name a folder")
    names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    if mark and names and mark not in names:
        raise UserError(f"{flag} {path}: holds {names[0]}, but no {mark}; name another folder")
    check_writable(flag, path, folder)


def check_writable(flag: str, path: str, folder: Path) -> None:
    """Raise UserError where `folder`, or the folder to create it in, is not writable."""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest(folder)):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror}") from error


def check_room(flag: str, path: str, needed: int) -> None:
    """Raise UserError where the disk of `path` has less than `needed` bytes free."""
    free = room(Path(path))
    if free < needed:
        raise UserError(
            f"{flag} {path}: needs about {gib(needed)}, but only {gib(free)} are free; "
            "name a folder on another disk"
        )


def nearest(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


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
    os.chmod(file.name, 0o666 & ~umask())
    os.replace(file.name, path)
    sync_folder(path.parent)


def umask() -> int:
    """Return the permission bits that this process's files do without."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until a file is on the disk, not only in the system's memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; Windows offers no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def room(path: Path) -> int:
    """Return the free bytes of the disk that `path` is on, or would be."""
    return shutil.disk_usage(nearest(path)).free
