"""One run of a sweep, in a process of its own: main.py, unless its results are there already.

    python -m lib.commands.sweep_run FOLDER -- FLAGS

FLAGS are those of main.py; FOLDER is where the runs of a sweep share what the dense model computes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lib.run.flag_checks import check_flags
from lib.run.flags import build_parser
from lib.util import command
from lib.util.terminal import one_line

RESULTS, ERROR = "results.json", "error.json"
OUTPUT = "output.txt"  # what main.py prints; every folder of a sweep has it
FINISHED = "finished before"


def run(args: argparse.Namespace, shared: Path) -> None:
    """Run main.py with `args` and keep what it prints, unless its results are those of before.

    The results of an earlier run stay until there are new ones.
    """
    import main
    from lib.run.check import check

    folder, printed = Path(args.save), io.StringIO()
    if before := read_json(folder / RESULTS):
        outputs = dict(save_model=None, resume=None)
        with redirect_stdout(printed):
            job = check(argparse.Namespace(**vars(args) | outputs))
        reason = _difference(before.get("fingerprint", {}), job.fingerprint)
        if not reason and args.save_model and not Path(args.save_model, "config.json").is_file():
            reason = "its model was not kept"
        if not reason:
            print(FINISHED)
            return
        print(f"{reason}; it is run again", flush=True)
    if args.save_model == str(folder / "model") and (folder / OUTPUT).is_file():
        shutil.rmtree(args.save_model, ignore_errors=True)  # of an earlier run of the sweep
    with (folder / OUTPUT).open("w", encoding="utf-8") as file, redirect_stdout(file):
        job = check(args)
        job.shared = shared
        main.run(job)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return in what the fingerprints of two runs differ first; None if they are the same."""
    before, now = _flat(before), _flat(json.loads(json.dumps(now, default=str)))
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
    return None


def _flat(fingerprint: dict[str, Any]) -> dict[str, Any]:
    entries = {}
    for name, value in fingerprint.items():
        entries |= value if isinstance(value, dict) else {name: value}
    return entries


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none that can be read."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_error(args: argparse.Namespace, reason: str) -> None:
    """Write error.json into the run's folder: what was run, and why it failed."""
    failure = {"model": args.model, "method": args.prune_method or "dense"}
    failure |= {"flags": vars(args), "error": reason}
    text = json.dumps(failure, indent=2, ensure_ascii=False, default=str)
    (Path(args.save) / ERROR).write_text(text + "\n", "utf-8")


def _end_with_the_sweep() -> None:
    """Wait until the process of the sweep is gone, and end this one, whose end nobody awaits."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str]) -> None:
    (shared,), flags = command.split_argv(argv)
    parser = build_parser()
    args = parser.parse_args(flags)
    check_flags(parser, args)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        run(args, Path(shared))
    except Exception as error:  # the other runs do not depend on this one
        reason = command.describe_error(error) or f"{type(error).__name__}: {error}"
        write_error(args, one_line(reason))
        raise


if __name__ == "__main__":
    sys.exit(command.run(main))
