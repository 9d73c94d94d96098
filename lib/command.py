"""What every command of this package does around its work: one line instead of a traceback.

    if __name__ == "__main__":
        sys.exit(run(main))

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

from lib.errors import UserError

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a command ended by Ctrl-C


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Declare `--debug`, which `run` reads, so that it is parsed and shown by `--help`."""
    parser.add_argument(
        "--debug", action="store_true", help="show the whole traceback of an error (default: off)"
    )


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Call `main(argv)` and return the exit status: 0, 1 (an error) or 130 (Ctrl-C).

    UserError, OSError (a full disk, a folder that can't be read) and a lack of memory become one
    line on stderr. With `--debug` among the arguments they are raised as they are. Any other
    exception is a defect and keeps its traceback. argparse leaves by itself, with status 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        main(argv)
        sys.stdout.flush()  # a reader that has gone shows here, not while the interpreter ends
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `command | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        told = _told(error)
        if debug or told is None:
            raise
        print(f"error: {' '.join(told.split())}", file=sys.stderr)
        return FAILED
    return 0


def _told(error: Exception) -> str | None:
    """What a user needs to know of an error; None where it is a defect of the program."""
    if isinstance(error, UserError | OSError):
        return str(error)
    name = type(error).__name__
    if name in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error):
        return f"out of memory ({error}); try a smaller --batch_size or --seqlen"
    return None
