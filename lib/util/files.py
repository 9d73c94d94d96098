"""Files and folders that are written atomically, and checks of an output folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError

PARTIAL = ".partial"  # suffix of incomplete files and folders
FICLONE = 0x40049409  # Linux: share the blocks of a file until one of both is changed


def check_writable(flag: str, path: str, beside: bool = False) -> None:
    """Raise UserError if a run could not write into folder `path`, or `beside` it."""
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}", "it is a file", "Name a folder")
    folder = folder.parent if beside else folder
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise UserError(f"{flag} {path}", problem, "Name another folder") from error


def check_new_folder(flag: str, path: str, staged: bool = False) -> None:
    """Raise UserError if no complete folder can become `path`, which may be an empty one.

    `staged`: or if the folder beside it exists.
    """
    if not Path(path).name:
        raise UserError(f"{flag} {path}", "the folder has no name", "Name a new folder")
    check_writable(flag, path, beside=True)  # other ranks may look into the folder
    folder, partial = Path(path), partial_of(path)
    if folder.is_symlink():  # the folder beside it would be on another disk
        raise UserError(f"{flag} {path}", "it is a link", f"Name {folder.resolve()}")
    if staged and (partial.exists() or partial.is_symlink()):
        fix = "Remove it, or name a new folder"
        raise UserError(f"{flag} {path}", f"{partial.name} exists", fix)
    if folder.is_dir() and (first := next(folder.iterdir(), None)):
        raise UserError(f"{flag} {path}", f"it holds {first.name}", "Name a new folder")
    if folder.is_mount():
        raise UserError(f"{flag} {path}", "a disk is mounted there", "Name a new folder on it")


def partial_of(path: str | Path) -> Path:
    """Return the folder beside `path` in which it is written."""
    path = Path(path)
    return path.with_name(f"{path.name}{PARTIAL}")


@contextmanager
def staged_folder(path: str | Path, flag: str) -> Iterator[Path]:
    """Yield a folder beside the new `path`, which becomes it at the end or is deleted on error."""
    check_new_folder(flag, str(path), staged=True)
    partial = partial_of(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, Path(path))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder, in `parent` or the system's place, that is deleted with this process.

    A shell waits for the end, so that a killed process leaves nothing, especially in memory.
    """
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        if os.name == "nt":
            yield Path(folder)
            return
        command = ["sh", "-c", 'cat; rm -rf -- "$0"', folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
            yield Path(folder)  # `with` closes the pipe and waits


def sync_all(folder: Path) -> None:
    """Wait until all files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def clone(source: Path, target: Path, cached: bool = False) -> bool:
    """Make the new file `target` share the blocks of `source`, and return whether the disk can.

    `cached`: the source is in the Hub's cache, so `target` may also be a link to it; the file is
    then read-only.
    """
    try:
        import fcntl  # Windows has none

        with source.open("rb") as one, target.open("wb") as other:
            fcntl.ioctl(other, FICLONE, one.fileno())
        return True
    except (ImportError, OSError):
        target.unlink(missing_ok=True)
    with suppress(OSError):  # another disk, or one without hard links
        if cached:
            os.link(source.resolve(), target)
            target.chmod(0o444)
    return target.exists()


def share(path: Path) -> None:
    """Give a file the mode of new files: safetensors' are readable to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a complete folder, once all of it has reached the disk."""
    for path in partial.rglob("*.safetensors"):
        if path.stat().st_nlink == 1:  # others are the Hub's, and read-only
            share(path)
    sync_all(partial)
    if target.is_dir():
        target.rmdir()  # only an empty target is removed
    partial.rename(target)
    sync(target.parent)


def write_text(path: Path, text: str | bytes) -> None:
    """Write a small file atomically. Raises UserError if it cannot be written."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        # names of files may hold bytes that are no UTF-8
        encoded = text.encode(errors="backslashreplace") if isinstance(text, str) else text
        partial.write_bytes(encoded)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            str(path), f"it cannot be written ({error.strerror})", "Make room on its disk"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows offers no such call
    written = path.is_file() and os.access(path, os.W_OK)
    descriptor = os.open(path, os.O_RDWR if written else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, held: UserError) -> Iterator[None]:
    """Hold the lock file `path`; raises `held` if another process holds it."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise held from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # unlink before release, so that a waiter notices
        lock.release()
