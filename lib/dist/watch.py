"""Whether all processes of a job live: when one dies, hangs or fails, all end, and one tells why.

Every process beats: a thread of it counts in the launcher's key-value store, and reads the count of
the next process in a ring. One that falls silent is told of by the process before it. A process
that fails by itself tells so itself. Whichever it is, a flag in the store ends the others without a
word, even where they wait in a collective that never returns.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from lib.util.command import FAILED

BEAT_SECONDS = 2
SILENCE_SECONDS = 40  # after which a process counts as dead
DOUBT_BEATS = 3  # of silence that are enough once something else speaks for it, too
PATIENCE_BEATS = 5  # after a signal to end or a broken collective: the dead one is found by then


class Watch:
    """`store`: this thread's own connection, in which every process also notes its place."""

    def __init__(self, store: dist.Store, rank: int, size: int, hosting: bool) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.hosting = hosting  # whether the store ends with this process
        self.place = ""  # this process's own
        self.leftovers: list[Path] = []  # folders to remove if the process is ended
        self.doubted: float | None = None  # since when another process may be gone
        self.terminated = False
        self.closing = threading.Event()
        self.reader, self.writer = os.pipe()  # wakes the thread while the main one is stuck
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.handler = signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """Nobody is waited for any more."""
        self.closing.set()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, self.handler)

    def broken(self) -> None:
        """A collective failed. Ends the process as soon as it is known who is gone, or returns."""
        self.doubted = self.doubted or time.monotonic()
        time.sleep((PATIENCE_BEATS + 1) * BEAT_SECONDS)

    def fail(self, tell: Callable[[], int]) -> None:
        """`tell` of this process's failure, unless another was first, and end all with its status.

        The store's host stays until the others have seen why.
        """
        self.closing.set()
        first = True
        with contextlib.suppress(RuntimeError):  # the store may be gone
            first = self.store.add("failures", 1) == 1
        if first and self.rank > 0:
            print(file=sys.stderr)  # the first process's progress bar may stand there
        status = tell() if first else FAILED
        with contextlib.suppress(RuntimeError):
            self.store.set("failed", "")
        self._end(status, linger=self.hosting)

    def _run(self) -> None:
        beats, heard, since = 0, b"", time.monotonic()
        following = str((self.rank + 1) % self.size)
        while not self._pause():
            beats += 1
            try:
                self.store.set(str(self.rank), str(beats))
                if self.store.check(["failed"]):
                    self._end()
                beat = self.store.get(following) if self.store.check([following]) else b""
                if beat != heard:
                    heard, since = beat, time.monotonic()
                self._judge(since)
            except RuntimeError:
                self._lost()

    def _pause(self) -> bool:
        """Until the next beat, or until the process is told to end; whether nothing is to do."""
        if select.select([self.reader], [], [], BEAT_SECONDS)[0]:
            if signal.SIGTERM in os.read(self.reader, 64):
                self.terminated = True
                self.doubted = self.doubted or time.monotonic()
        return self.closing.is_set()

    def _judge(self, since: float) -> None:
        now = time.monotonic()
        silent = now - max(since, self.doubted or since)
        limit = SILENCE_SECONDS if self.doubted is None else DOUBT_BEATS * BEAT_SECONDS
        if silent > limit:
            self._tell((self.rank + 1) % self.size, "is gone or hangs")
        if self.terminated and now - self.doubted > PATIENCE_BEATS * BEAT_SECONDS:
            self._tell(self.rank, "was told to end (SIGTERM)")

    def _tell(self, who: int, what: str) -> None:
        key = f"place {who}"
        place = f" at {self.store.get(key).decode()}" if self.store.check([key]) else ""

        def tell() -> int:
            _print(f"error: process {who} of {self.size} {what}{place}; all end")
            return FAILED

        if not self.closing.is_set():
            self.fail(tell)

    def _lost(self) -> None:
        """The store is gone, and with it the process or the launcher that held it."""
        if not self.closing.is_set():
            place = f" at {self.place}" if self.place else ""
            _print(f"error: process 0 of {self.size} is gone; process {self.rank} ends{place}")
            self._end()

    def _end(self, status: int = FAILED, linger: bool = False) -> None:
        """Leave at once: the main thread may be inside a collective that never returns."""
        for folder in self.leftovers:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        if linger:
            time.sleep(2 * BEAT_SECONDS)
        os._exit(status)


def _print(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # not into a progress bar
    sys.stderr.flush()
