"""A file that one process holds locked: who comes second is told so at once."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from lib.util.errors import UserError

# what flock answers on file systems that have no locks: Lustre without -o flock, some NFS and FUSE
NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def exclusive_lock(path: Path, held: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, and remove it afterwards.

    A killed process holds no lock. Where the file system has no locks, a file `path`.pid stands
    for one: it names its process, so that others on the machine see whether that still runs.
    Raises UserError with the message `held` where another process holds the lock.
    """
    lock: FileLock | SoftFileLock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        try:
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in NO_FLOCK:
                raise
            path.unlink(missing_ok=True)  # it locks nothing here
            lock = SoftFileLock(f"{path}.pid", timeout=0)
            lock.acquire()
    except Timeout as error:
        raise UserError(held) from error
    try:
        yield
    finally:
        if isinstance(lock, FileLock):
            path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees it go
        lock.release()
