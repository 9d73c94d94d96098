"""A folder that is replaced as a whole, and only if an earlier run wrote everything in it.

    with locked_dir(folder, "--save_model") as target:  # from the start of a run
        with target.staged() as stage:                  # at its end: a new folder beside it
            ...                                         # that takes the target's place

Files are written into a folder beside the target, reach the disk, and are put in the target's place
in one step, with a manifest of their names, sizes and SHA-256 digests. A folder that holds anything
but what its manifest lists belongs to the user and is never replaced. Where the system can't
exchange two folders in one step (Linux can, by renameat2), the old one is called
NAME.being-replaced between two renames; the next run puts it back.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lib.util.errors import UserError
from lib.util.files import check_writable, sync, sync_folder, umask
from lib.util.locks import exclusive_lock

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)
MANIFEST = "manifest.json"
STAGE_MARK = ".partial-"


def check_replaceable(flag: str, path: str) -> None:
    """Raise UserError where `path` can't be written, or holds files that no earlier run wrote."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file; name a folder")
    if os.path.ismount(folder):
        raise UserError(f"{flag} {path}: a mount point can't be replaced; name a folder in it")
    if problem := unexpected_file(folder):
        raise UserError(f"{flag} {path}: {problem} and would be lost; name another folder")
    check_writable(flag, path, folder.parent)


def unexpected_file(folder: Path) -> str | None:
    """Describe the first file of a folder that is not as a run left it; None if there is none."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        listed = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        first = ", ".join(names[:3]) or MANIFEST
        return f"holds {first}, which no earlier run wrote (there is no {MANIFEST} that lists it)"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path == folder / MANIFEST:
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(other.startswith(f"{name}/") for other in listed):
                return f"holds {name}, which no earlier run wrote"
        elif name not in listed:
            return f"holds {name}, which no earlier run wrote"
        elif path.is_symlink() or not _is_unchanged(path, listed[name]):
            return f"holds {name}, which was changed since a run wrote it"
    return None


@contextmanager
def locked_dir(path: str | Path, flag: str = "") -> Iterator[Target]:
    """Keep every other run from writing the folder `path` while the block runs.

    What killed runs left beside it is put back or removed. Raises UserError where another run holds
    the folder, and where the name that the old folder may need for a moment is taken.
    """
    label = f"{flag} {path}".strip()
    folder = Path(path).resolve()  # a link stays: the folder that it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with exclusive_lock(lock, f"{label}: another run is going to write it; name another folder"):
        target = Target(folder, label)
        target.recover_leftovers()
        yield target


@contextmanager
def locked_results(path: str) -> Iterator[None]:
    """Keep every other run from writing its results into the folder `path` meanwhile."""
    folder = Path(path).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    held = f"--save {path}: another run is going to write it; name another folder"
    with exclusive_lock(folder.with_name(f".{folder.name}.lock"), held):
        yield


@contextmanager
def staged_folder(path: str | Path, flag: str = "") -> Iterator[Path]:
    """Lock a folder and replace it at once, see `Target.staged`."""
    with locked_dir(path, flag) as target, target.staged() as stage:
        yield stage


class Target:
    """A locked folder; error messages call it `label`."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder = folder
        self.label = label
        self.prefix = f".{folder.name}{STAGE_MARK}"
        self.before = folder.with_name(f"{folder.name}.being-replaced")

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield a new folder that takes the target's place when the block ends without an error.

        At every moment the target is the old folder or the new one. Raises UserError where a file
        can't be written, and where the target has come to hold a file of the user's: then the new
        files are kept beside it, and the message names the place.
        """
        stage = Path(tempfile.mkdtemp(prefix=self.prefix, dir=self.folder.parent))
        os.chmod(stage, 0o777 & ~umask())
        try:
            yield stage
            _finish(stage)
            if problem := unexpected_file(self.folder):
                raise UserError(f"{self.label}: {problem}; {self._kept_aside(stage)}")
            self._put_in_place(stage)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.label}: can't be saved ({reason}); it is as it was before, name a folder "
                "on a disk with room"
            ) from error
        finally:
            self._remove(stage)

    def recover_leftovers(self) -> None:
        """Put back what a killed run had moved away, and remove its unfinished files."""
        if self.before.exists():
            if unexpected_file(self.before) or not (self.before / MANIFEST).is_file():
                raise UserError(f"{self.label}: {self.before} is in the way; move it")
            if self.folder.exists():
                os.rename(self.before, tempfile.mkdtemp(prefix=self.prefix, dir=self.folder.parent))
            else:
                os.rename(self.before, self.folder)
                print(f"{self.label}: restored; a run was killed replacing it", file=sys.stderr)
        stage = re.compile(re.escape(self.prefix) + r"\w{8}")
        for path in self.folder.parent.iterdir():
            if stage.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _put_in_place(self, stage: Path) -> None:
        """Exchange the stage and the target; afterwards the old files, if any, are in `stage`."""
        folder = self.folder
        try:
            if not folder.exists():
                os.rename(stage, folder)
            elif not _exchanged(stage, folder):
                self._rename_both(stage)
        except OSError as error:
            raise UserError(f"{self.label}: {error}; {self._kept_aside(stage)}") from error
        sync_folder(folder.parent)

    def _rename_both(self, stage: Path) -> None:
        if self.before.exists():  # it came while the run worked
            raise FileExistsError(f"{self.before} is in the way")
        os.rename(self.folder, self.before)
        try:
            os.rename(stage, self.folder)
        except OSError:
            os.rename(self.before, self.folder)
            raise
        os.rename(self.before, stage)  # a run that is killed before this leaves it to the next

    def _kept_aside(self, stage: Path) -> str:
        """Give the new files a name of their own beside the target, and say which."""
        aside = _free_name(self.folder)
        os.rename(stage, aside)
        return f"the new files are in {aside}"

    def _remove(self, stage: Path) -> None:
        """Remove unfinished or replaced files, but none that a user has put there meanwhile."""
        replaced = (stage / MANIFEST).is_file()
        if replaced and (problem := unexpected_file(stage)):
            aside = _free_name(self.folder)
            os.rename(stage, aside)
            print(f"{self.label}: the old folder {problem}; it is kept as {aside}", file=sys.stderr)
        shutil.rmtree(stage, ignore_errors=True)


def _finish(stage: Path) -> None:
    """Give all files the user's permissions, list them in a manifest and wait for the disk."""
    mask = umask()
    files = sorted(path for path in stage.rglob("*") if path != stage / MANIFEST)
    for path in files:  # safetensors writes files that only their owner may read
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    listed = {path.relative_to(stage).as_posix(): _facts(path) for path in files if path.is_file()}
    text = json.dumps({"files": listed}, indent=1, ensure_ascii=False)
    (stage / MANIFEST).write_text(text + "\n", "utf-8")
    for path in (*files, stage / MANIFEST):
        sync(path) if path.is_file() else sync_folder(path)
    sync_folder(stage)


def _facts(path: Path) -> dict[str, int | str]:
    """Return what identifies a file's content, and the time by which it is known fastest."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}


def _is_unchanged(path: Path, facts: dict[str, int | str]) -> bool:
    """Whether a file is as the manifest lists it; it is read where its time has changed."""
    stat = path.stat()
    if stat.st_size != facts.get("size") or "sha256" not in facts:
        return False
    return stat.st_mtime_ns == facts.get("mtime_ns") or _sha256(path) == facts["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path


def _exchanged(a: Path, b: Path) -> bool:
    """Swap two folders in one step where the system can (Linux); return whether it did."""
    try:
        renameat2: Callable = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return 0 == renameat2(
        _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)
    )
