"""Runs a command: a user's mistake becomes one line on stderr instead of a traceback.

    python -m lib.util.command MODULE ARGV...     # main(ARGV) of lib/MODULE, or of main.py

A command starts others in processes of their own, in the folder that the user is in, so that
relative paths mean what they meant to the user. Importing this file imports nothing heavy.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = __name__.partition(".")[0] if __name__ != "__main__" else __spec__.name.partition(".")[0]
FAILED = 1
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a command ended by Ctrl-C
ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
TURN_SECONDS = 3
CALLED = "LANGPRUNE_CALLED"  # in the environment: what the user has typed before a command's name
ENDS_WITH_STDIN = "LANGPRUNE_ENDS_WITH_STDIN"  # in the environment of what `call` starts
# of libgomp, whose waiting threads spin: without a bound they take the cores that a loaded machine
# gives to the threads that work; read when torch is imported
SPINS = {"GOMP_SPINCOUNT": "10000"}
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # a user's own setting stays
LACKING = "can't allocate memory", "_STATUS_ALLOC_FAILED"  # in a RuntimeError: torch's, cuBLAS's
JOINERS = "\u200c\u200d"  # without a shape, but spelling needs them in Persian and Indic scripts


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line; `command` is its name in the console's list."""

    def __init__(self, command: str = "prune", **options) -> None:
        prog = typed(command).removeprefix("python ")
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        defer_to_rank0()
        if message.startswith("unrecognized arguments"):
            message += "; --help lists all flags"
        self.exit(2, f"error: {message}\n")


def typed(name: str) -> str:
    """Return what starts another command, in the way that this one was started."""
    called = os.environ.get(CALLED, "bash launch.sh")
    return "python main.py" if name == "prune" and called != "langprune" else f"{called} {name}"


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments at the first `--`."""
    middle = argv.index("--") if "--" in argv else len(argv)
    return argv[:middle], argv[middle + 1 :]


def add_debug_flag(parser: argparse.ArgumentParser) -> argparse.Action:
    """Declare `--debug`, which `run` reads, so that it is parsed and listed by `--help`."""
    return parser.add_argument(
        "--debug", action="store_true", help="show the whole traceback of an error (default: off)"
    )


def make_parser(name: str, about: str, **options: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with `--debug`; `about` is its module's docstring.

    UserError where torchrun has started several processes, which main.py alone shares work with.
    """
    if (size := environment_number("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"WORLD_SIZE {size}: {name} is one process, and only main.py takes several; start it "
            "without torchrun, or unset WORLD_SIZE"
        )
    parser = Parser(name, description=about.split("\n")[0], **options)
    add_debug_flag(parser)
    return parser


def environment_number(name: str, default: int) -> int:
    """Read RANK, LOCAL_RANK or WORLD_SIZE from the environment, as torchrun sets it."""
    return int(os.environ.get(name) or default)


def defer_to_rank0() -> None:
    """Wait before another rank than the first reports an error.

    Most errors are the same in all ranks, or follow from another's; the launcher ends this one when
    the first has reported its own.
    """
    if environment_number("RANK", 0) > 0:
        time.sleep(TURN_SECONDS)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Call `main(argv)` and return the exit status: 0, 1 (an error) or 130 (Ctrl-C).

    SIGTERM and SIGHUP (a closed terminal) end it with status 143 and 129, silently, after the
    `finally` blocks of `main`. UserError, OSError (a full disk, a folder that can't be read) and a
    lack of memory become one line on stderr, unless `--debug` is among the arguments. Any other
    exception is a defect and keeps its traceback. argparse leaves by itself, with status 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not WAITING & os.environ.keys():
        os.environ.update(SPINS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Ukrainian name on an ASCII terminal
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # `| tee log`
    if environment_number("WORLD_SIZE", 1) > 1 and "--debug" not in argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the error is reported in one line
    with _terminable():
        if os.environ.pop(ENDS_WITH_STDIN, None):  # what this process starts has a stdin of its own
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        try:
            main(argv)
            sys.stdout.flush()  # a reader that has gone shows here, not while the interpreter ends
        except BrokenPipeError:  # `command | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except KeyboardInterrupt as stopped:  # it may tell how to go on
            defer_to_rank0()
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


def started_by(module: str, *argv: object) -> tuple[list[str], dict[str, str]]:
    """Return the command `python -m MODULE ARGV...` and the environment to start it in.

    `-P` keeps modules of the user's folder from hiding this package's.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", module, *map(str, argv)]
    return command, os.environ | {"PYTHONPATH": path}


def part(name: str) -> ModuleType:
    """Import a module of this package, or main.py, which lies in it once it is installed."""
    return import_module(name if name == "main" and PACKAGE == "lib" else f"{PACKAGE}.{name}")


def main_of(module: str) -> Callable[[list[str]], None]:
    """Return the `main` of a module of this package, or of a package's `__main__`."""
    found = part(module)
    return (found if hasattr(found, "main") else part(f"{module}.__main__")).main


def call(module: str, *argv: object) -> int:
    """Run `main(ARGV)` of a module in a process of its own and return its exit status.

    The process ends with this one: at Ctrl-C, which a terminal sends to both, it is waited for, and
    whatever else ends this process terminates it. Where this one is killed, the end of its stdin
    tells it.
    """
    command, environment = started_by(f"{PACKAGE}.util.command", module, *argv)
    environment[ENDS_WITH_STDIN] = "1"
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        except BaseException:
            process.terminate()
            raise


def _end_with_stdin() -> None:
    """Wait until whoever holds the other end of stdin is gone, and end as SIGTERM ends this."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


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


def describe_error(error: BaseException) -> str | None:
    """Return the message for a user; None where the error is a defect of the program."""
    torch, packed = sys.modules.get("torch"), sys.modules.get(f"{PACKAGE}.packed.errors")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(PACKAGE):
        return f"{error.name} is not installed; pip install -r requirements.txt"
    if isinstance(error, UserError | OSError) or (packed and isinstance(error, packed.PackedError)):
        return str(error)
    lacking = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    if isinstance(error, lacking) or any(word in str(error) for word in LACKING):
        return (
            f"out of memory ({error}); try --batch_size 1, a smaller --seqlen or --nsamples, "
            "--offload FOLDER, or with --recover --recover_optimizer adamw8bit or --recover_rank 16"
        )
    return None


def one_line(text: str) -> str:
    """Any text on one line, without control, directional and invisible characters."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable() or c in JOINERS)


if __name__ == "__main__":
    sys.exit(run(main_of(sys.argv[1]), sys.argv[2:]))
