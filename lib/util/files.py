"""Small files written whole or not at all, and what can be known of an output before it is made."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lib.util.errors import UserError


def check_output_folder(flag: str, path: str, mark: str | None = None) -> None:
    """UserError where a run could not write its output into folder `path`; makes nothing.

    `mark`: a file that a folder of an earlier run holds; other non-empty folders are refused.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file; name a folder")
    held = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    if mark and held and mark not in held:
        raise UserError(f"{flag} {path}: holds {held[0]}, but no {mark}; name another folder")
    check_writable(flag, path, folder)


def check_writable(flag: str, path: str, folder: Path) -> None:
    """UserError where nothing can be written in `folder`, or where it would have to be made."""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest(folder)):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror}") from error


def check_room(flag: str, path: str, needed: int) -> None:
    """UserError where the disk of `path` has less than `needed` bytes free."""
    free = shutil.disk_usage(nearest(Path(path))).free
    if free < needed:
        raise UserError(
            f"{flag} {path}: needs about {needed / 2**30:.1f} GiB, "
            f"but only {free / 2**30:.1f} GiB are free; name a folder on another disk"
        )


def nearest(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
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
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
