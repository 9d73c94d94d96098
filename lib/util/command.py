"""Runs a command: a user's mistake becomes one line on stderr instead of a traceback.

    if __name__ == "__main__":
        sys.exit(run(main))

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from lib.util.errors import UserError
from lib.util.launch import defer_to_rank0, environment_number
from lib.util.terminal import one_line, replace_unencodable

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a command ended by Ctrl-C
TERMINATED = 128 + signal.SIGTERM  # as launchers and batch systems end what they started
ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Parser(argparse.ArgumentParser):
    """Of several processes with the same mistake in their flags, only the first reports it."""

    def error(self, message: str) -> NoReturn:
        defer_to_rank0()
        super().error(message)


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments at the first `--`."""
    middle = argv.index("--") if "--" in argv else len(argv)
    return argv[:middle], argv[middle + 1 :]


def add_debug_flag(parser: argparse.ArgumentParser) -> argparse.Action:
    """Declare `--debug`, which `run` reads, so that it is parsed and listed by `--help`."""
    return parser.add_argument(
        "--debug", action="store_true", help="show the whole traceback of an error (default: off)"
    )


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Call `main(argv)` and return the exit status: 0, 1 (an error) or 130 (Ctrl-C).

    SIGTERM and SIGHUP (a closed terminal) end it with status 143 and 129, silently, after the
    `finally` blocks of `main`.
    UserError, OSError (a full disk, a folder that can't be read) and a lack of memory become one
    line on stderr. With `--debug` among the arguments they are raised as they are. Any other
    exception is a defect and keeps its traceback. argparse leaves by itself, with status 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    replace_unencodable()
    if environment_number("WORLD_SIZE", 1) > 1 and "--debug" not in argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the error is reported in one line
    with _terminable():
        try:
            main(argv)
            sys.stdout.flush()  # a reader that has gone shows here, not while the interpreter ends
        except BrokenPipeError:  # `command | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except (KeyboardInterrupt, Exception) as error:
            defer_to_rank0()
            status = None if "--debug" in argv else _report(error)
            if status is None:
                raise
            return status
    return 0


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Inside, nothing that is printed raises an error.

    Letters that a terminal lacks are escaped; what can't be written, to a full disk or to a reader
    that has gone, is dropped.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_UnfailingStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _UnfailingStream:
    """A text stream whose `write` and `flush` never fail; in all else it is `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # ValueError: it was closed
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Send everything that is still to come nowhere: its buffer fails at each further write."""
        with suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextmanager
def _terminable() -> Iterator[None]:
    """Make the signals that end a process raise SystemExit in the main thread meanwhile."""

    def leave(number: int, _) -> NoReturn:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)  # a second one must not break off `finally`
        raise SystemExit(128 + number)

    before = {each: signal.getsignal(each) for each in ENDING}
    for each in ENDING:
        if before[each] != signal.SIG_IGN:  # as nohup asks for
            signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _report(error: BaseException) -> int | None:
    """Print one line for an error that a user can fix and return the exit status.

    Returns None for a defect of the program.
    """
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    line = describe_error(error)
    if line is None:
        return None
    print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
    return FAILED


def describe_error(error: BaseException) -> str | None:
    """Return the message for a user; None where the error is a defect of the program."""
    name = type(error).__name__
    if isinstance(error, UserError | OSError) or name == "PackedError":
        return str(error)
    if name in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error):
        return f"out of memory ({error}); try a smaller --batch_size or --seqlen"
    return None
