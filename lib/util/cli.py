"""Command lines: flags, and a user's mistake as one line on stderr instead of a traceback.

    python -m lib.util.cli MODULE ARGV...     # main(ARGV) of lib/MODULE, or of main.py

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

from .errors import UserError, describe_error, one_line
from .processes import (
    ENDS_WITH_STDIN,
    defer_to_rank0,
    end_with_stdin,
    environment_number,
    main_of,
)
from .terminal import Terminal

FAILED = 1
NOTHING = 3  # status of `trim` and `dialogues` if there is nothing to use, as their line says
INTERRUPTED = 128 + signal.SIGINT  # a shell's status for a command ended by Ctrl-C
ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
CALLED = "LANGPRUNE_CALLED"  # environment: the words that the user typed before a command's name
# libgomp's waiting threads spin; without this bound they take cores of a loaded machine from
# working threads; read when torch is imported
SPINS = {"GOMP_SPINCOUNT": "10000"}
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # a user's own setting has precedence


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line; `command` is its name in the console's list."""

    def __init__(self, command: str = "prune", **options) -> None:
        prog = typed(command).removeprefix("python ")
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, but accept hyphens like underscores in flag names."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(underscored(words), namespace)

    def error(self, message: str) -> NoReturn:
        defer_to_rank0()
        if message.startswith("unrecognized arguments"):
            message += ". --help lists all flags."
        self.exit(2, f"error: {message}\n")


def typed(name: str) -> str:
    """Return how to start another command, in the form in which this one was started."""
    called = os.environ.get(CALLED, "bash launch.sh")
    return "python main.py" if name == "prune" and called != "langprune" else f"{called} {name}"


def underscored(words: Iterable[str]) -> list[str]:
    """Return the arguments with underscores for hyphens in names of flags."""
    names = re.compile(r"^--[\w-]+")
    return [names.sub(lambda it: "--" + it[0][2:].replace("-", "_"), word) for word in words]


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments at the first `--`; names of flags get underscores for hyphens."""
    argv = underscored(argv)
    middle = argv.index("--") if "--" in argv else len(argv)
    return argv[:middle], argv[middle + 1 :]


def add_debug_flag(parser: argparse.ArgumentParser) -> argparse.Action:
    """Declare `--debug`, which `run` reads, so that it is parsed and listed by `--help`."""
    return parser.add_argument(
        "--debug", action="store_true", help="show the whole traceback of an error (default: off)"
    )


def make_parser(name: str, about: str, **options: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with `--debug`; `about` is its module's docstring.

    Raises UserError if torchrun has started several processes, which only main.py supports.
    """
    if (size := environment_number("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"WORLD_SIZE {size}",
            f"{name} runs as one process",
            "Start it without torchrun, or unset WORLD_SIZE",
        )
    paragraphs = [part for part in about.split("\n\n") if not part.startswith("    ")]
    parser = Parser(name, description=paragraphs[0], **options)
    add_debug_flag(parser)
    return parser


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Call `main(argv)` and return the exit status: 0, 1 (an error) or 130 (Ctrl-C).

    SIGTERM and SIGHUP (a closed terminal) end it with status 143 and 129, silently, after the
    `finally` blocks of `main`. UserError, OSError (a full disk, an unreadable folder) and a lack of
    memory become one line on stderr, unless `--debug` is among the arguments. Any other exception
    is a defect and keeps its traceback. argparse exits by itself, with status 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not WAITING & os.environ.keys():
        os.environ.update(SPINS)
    os.environ["USE_HUB_KERNELS"] = "NO"  # transformers would run compiled code of the Hub on a GPU
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Ukrainian name on an ASCII terminal
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # `| tee log`
    if environment_number("WORLD_SIZE", 1) > 1 and "--debug" not in argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the error is reported in one line
    stdout = Terminal(sys.stdout) if sys.stdout.isatty() else sys.stdout
    with _terminable(), redirect_stdout(stdout):
        if started := os.environ.pop(ENDS_WITH_STDIN, None):  # child processes have their own stdin
            threading.Thread(target=end_with_stdin, daemon=True).start()
        try:
            main(argv)
            sys.stdout.flush()  # reports a closed pipe here, not at the interpreter's end
        except BrokenPipeError:  # `command | head`: the reader has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except KeyboardInterrupt as stopped:  # its arguments may name the way to continue
            defer_to_rank0()
            if not started:  # the command that has started this one says it
                print("; ".join(["interrupted", *stopped.args]), file=sys.stderr, flush=True)
            return INTERRUPTED
        except Exception as error:
            defer_to_rank0()
            line = None if "--debug" in argv else describe_error(error)
            if line is None:
                raise
            print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
            return FAILED
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Make the ending signals raise SystemExit in the main thread within this context."""

    def leave(number: int, _) -> NoReturn:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt `finally`
        raise SystemExit(128 + number)

    before = {each: signal.getsignal(each) for each in ENDING}
    for each in ENDING:
        if before[each] != signal.SIG_IGN:  # nohup asks to ignore it
            signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


if __name__ == "__main__":
    sys.exit(run(main_of(sys.argv[1]), sys.argv[2:]))
