"""A folder that is replaced as a whole, and only if an earlier run wrote all that is in it.

    with locked_dir(folder, "--save_model") as target:  # from the start of a run: nobody else's
        with target.staged() as stage:               # at its end: a new folder beside it
            ...                                      # which takes its place

What is written is staged beside the target and put in its place in one step, with a manifest of
its files. A folder that holds anything else than such a manifest says, or says otherwise, is a
user's and is refused. Where two folders can't be exchanged in one step (renameat2 is Linux's), the
old one stands as NAME.being-replaced between two renames; the next run puts it back.
"""

from __future__ import annotations

import ctypes
import fcntl
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
from lib.util.files import check_writable

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)
MANIFEST = "manifest.json"
STAGE_MARK = ".partial-"
HASHED = 2**20  # bytes of a file up to which its contents count, not only its size


def check_replaceable(flag: str, path: str) -> None:
    """UserError where `path` can't be written, or holds what no earlier run wrote."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file; name a folder")
    if os.path.ismount(folder):
        raise UserError(f"{flag} {path}: a mount point can't be replaced; name a folder in it")
    if problem := unexpected_file(folder):
        raise UserError(f"{flag} {path}: {problem} and would be lost; name another folder")
    check_writable(flag, path, folder.parent)


def unexpected_file(folder: Path) -> str | None:
    """What is in a folder that is not as a run left it; None for nothing, or no folder."""
    found = sorted(path for path in folder.rglob("*") if path != folder / MANIFEST)
    if not found:
        return None
    try:
        known = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        first = ", ".join(str(path.relative_to(folder)) for path in found[:3])
        return f"holds {first}, which no earlier run wrote (there is no {MANIFEST})"
    for path in found:
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(other.startswith(f"{name}/") for other in known):
                return f"holds {name}, which no earlier run wrote"
        elif name not in known:
            return f"holds {name}, which no earlier run wrote"
        elif path.is_symlink() or _facts(path) != known[name]:
            return f"holds {name}, which was changed since a run wrote it"
    return None


@contextmanager
def locked_dir(path: str | Path, flag: str = "") -> Iterator[Target]:
    """Inside, no other run writes to the folder `path`; what killed ones left beside it is gone.

    UserError where another run has claimed it.
    """
    named = f"{flag} {path}".strip()
    folder = Path(path).resolve()  # a link stays: what it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    held = _locked(lock)
    if held is None:
        raise UserError(f"{named}: another run is going to write it; name another folder")
    try:
        target = Target(folder, named)
        target.recover_leftovers()
        yield target
    finally:
        lock.unlink(missing_ok=True)
        os.close(held)


@contextmanager
def staged_folder(path: str | Path, flag: str = "") -> Iterator[Path]:
    """Claim a folder and replace it at once, see `Target.staged`."""
    with locked_dir(path, flag) as target, target.staged() as stage:
        yield stage


class Target:
    """A claimed folder; `named` as messages name it."""

    def __init__(self, folder: Path, named: str) -> None:
        self.folder = folder
        self.named = named
        self.prefix = f".{folder.name}{STAGE_MARK}"
        self.before = folder.with_name(f"{folder.name}.being-replaced")

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A new folder that takes the target's place when the block ends without an error.

        Whatever happens, the target is the old folder or the new one. UserError where a file can't
        be written; and where the target has come to hold something of a user's: then what was
        written stands beside it.
        """
        folder = self.folder
        stage = Path(tempfile.mkdtemp(prefix=self.prefix, dir=folder.parent))
        os.chmod(stage, 0o755)
        try:
            yield stage
            _write_manifest(stage)
            for file in stage.rglob("*"):  # safetensors writes files that only their owner reads
                file.chmod(0o755 if file.is_dir() else 0o644)
            if problem := unexpected_file(folder):
                aside = _free_name(folder)
                os.rename(stage, aside)
                raise UserError(f"{self.named}: {problem}; what was to be saved is in {aside}")
            self._put_in_place(stage)
        except (OSError, SafetensorError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"{self.named}: can't be saved ({why}); it is as it was before, name a folder on a "
                "disk with room"
            ) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)  # after an exchange: the old folder

    def recover_leftovers(self) -> None:
        """Put back what a killed run had moved away, and remove what it had not finished."""
        if (
            self.before.is_dir()
            and (self.before / MANIFEST).is_file()
            and not unexpected_file(self.before)
        ):
            if self.folder.exists():
                os.rename(self.before, tempfile.mkdtemp(prefix=self.prefix, dir=self.folder.parent))
            else:
                os.rename(self.before, self.folder)
                print(f"{self.named}: put back, a run was killed replacing it", file=sys.stderr)
        stage = re.compile(re.escape(self.prefix) + r"\w{8}")
        for path in self.folder.parent.iterdir():
            if stage.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _put_in_place(self, stage: Path) -> None:
        folder = self.folder
        if not folder.exists():
            os.rename(stage, folder)
        elif not _exchanged(stage, folder):
            if self.before.exists():
                raise UserError(f"{self.named}: {self.before} is in the way; move it")
            os.rename(folder, self.before)
            os.rename(stage, folder)
            os.rename(self.before, stage)  # which is removed; killed there, it is a leftover


def _write_manifest(stage: Path) -> None:
    files = {
        path.relative_to(stage).as_posix(): _facts(path)
        for path in sorted(stage.rglob("*"))
        if path.is_file() and path != stage / MANIFEST
    }
    text = json.dumps({"files": files}, indent=1, ensure_ascii=False)
    (stage / MANIFEST).write_text(text + "\n", "utf-8")


def _facts(path: Path) -> dict[str, int | str]:
    """By which a file is known again."""
    size = path.stat().st_size
    if size > HASHED:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _locked(path: Path) -> int | None:
    """A descriptor of the locked file, or None where another process holds it."""
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(held), os.stat(path)):
                return held
        except BlockingIOError:
            os.close(held)
            return None
        os.close(held)  # its holder was just removing it


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path


def _exchanged(a: Path, b: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux)."""
    try:
        renameat2: Callable = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return 0 == renameat2(
        _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)
    )
