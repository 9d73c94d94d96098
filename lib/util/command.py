"""Run a command: a user's mistake becomes one line on stderr instead of a traceback.

    python -m lib.util.command MODULE ARGV...     # main(ARGV) of lib/MODULE, or of main.py

A command starts others in separate processes, in the user's current folder, so that relative paths
keep their meaning. Importing this file imports nothing heavy.
"""

from __future__ import annotations

import argparse
import io
import os
import re
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

from .errors import UserError, first_line

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = __name__.partition(".")[0] if __name__ != "__main__" else __spec__.name.partition(".")[0]
FAILED = 1
INTERRUPTED = 128 + signal.SIGINT  # a shell's status for a command ended by Ctrl-C
ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
TURN_SECONDS = 3
CALLED = "LANGPRUNE_CALLED"  # environment: the words that the user typed before a command's name
ENDS_WITH_STDIN = "LANGPRUNE_ENDS_WITH_STDIN"  # environment of the processes that `call` starts
# libgomp's waiting threads spin; without this bound they take cores of a loaded machine from
# working threads; read when torch is imported
SPINS = {"GOMP_SPINCOUNT": "10000"}
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # a user's own setting has precedence
OUT_OF_MEMORY = "can't allocate memory", "_STATUS_ALLOC_FAILED"  # in errors of torch and cuBLAS
JOINERS = "\u200c\u200d"  # invisible, but needed for spelling in Persian and Indic scripts


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line; `command` is its name in the console's list."""

    def __init__(self, command: str = "prune", **options) -> None:
        prog = typed(command).removeprefix("python ")
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, but accept hyphens like underscores in flag names."""
        words = sys.argv[1:] if args is None else args
        names = [
            re.sub(r"^--[\w-]+", lambda it: "--" + it[0][2:].replace("-", "_"), w) for w in words
        ]
        return super().parse_known_args(names, namespace)

    def error(self, message: str) -> NoReturn:
        defer_to_rank0()
        if message.startswith("unrecognized arguments"):
            message += ". --help lists all flags."
        self.exit(2, f"error: {message}\n")


def typed(name: str) -> str:
    """Return how to start another command, in the form in which this one was started."""
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


def environment_number(name: str, default: int) -> int:
    """Read RANK, LOCAL_RANK or WORLD_SIZE from the environment, as torchrun sets it."""
    return int(os.environ.get(name) or default)


def defer_to_rank0() -> None:
    """Wait before a rank other than the first reports an error.

    Most errors are the same in all ranks, or follow from another rank's. The launcher ends this
    rank when the first has reported its own.
    """
    if environment_number("RANK", 0) > 0:
        time.sleep(TURN_SECONDS)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Ukrainian name on an ASCII terminal
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # `| tee log`
    if environment_number("WORLD_SIZE", 1) > 1 and "--debug" not in argv:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the error is reported in one line
    with _terminable():
        if os.environ.pop(ENDS_WITH_STDIN, None):  # child processes have their own stdin
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        try:
            main(argv)
            sys.stdout.flush()  # reports a closed pipe here, not at the interpreter's end
        except BrokenPipeError:  # `command | head`: the reader has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except KeyboardInterrupt as stopped:  # its arguments may name the way to continue
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
    """Import a module of this package, or main.py, which is part of the installed package."""
    return import_module(name if name == "main" and PACKAGE == "lib" else f"{PACKAGE}.{name}")


def main_of(module: str) -> Callable[[list[str]], None]:
    """Return the `main` of a module of this package, or of a package's `__main__`."""
    imported = part(module)
    return (imported if hasattr(imported, "main") else part(f"{module}.__main__")).main


def call(module: str, *argv: object) -> int:
    """Run `main(ARGV)` of a module in a separate process and return its exit status.

    The process ends with this one. At Ctrl-C, which a terminal sends to both, this one waits for
    it; any other end of this process terminates it. If this one is killed, the process notices the
    end of its stdin.
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
    """Wait until the other end of stdin is closed, and then end as by SIGTERM."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


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


def describe_error(error: BaseException) -> str | None:
    """Return the message for a user; None if the error is a defect of the program."""
    torch, packed = sys.modules.get("torch"), sys.modules.get(f"{PACKAGE}.packed.errors")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(PACKAGE):
        return f"{error.name} is not installed. Run pip install -r requirements.txt."
    if isinstance(error, UserError | OSError) or (packed and isinstance(error, packed.PackedError)):
        return str(error)
    lacking = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    if isinstance(error, lacking) or any(word in str(error) for word in OUT_OF_MEMORY):
        return (
            f"out of memory ({first_line(error)}). Use --batch_size 1, a smaller --seqlen or "
            "--nsamples, or --offload_folder FOLDER; with --recover, --recover_optimizer adamw8bit "
            "or --recover_rank 16."
        )
    return None


def one_line(text: str) -> str:
    """Return a text on one line, without control, directional and invisible characters."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable() or c in JOINERS)


if __name__ == "__main__":
    sys.exit(run(main_of(sys.argv[1]), sys.argv[2:]))
