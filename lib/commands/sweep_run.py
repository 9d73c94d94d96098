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

from lib.run.flags import build_parser, check_flags
from lib.run.results import ERROR, RESULTS, write_results
from lib.util import command
from lib.util.files import partial_of

OUTPUT = "output.txt"  # what main.py prints; every folder of a sweep has it
FINISHED = "finished before"


def run(args: argparse.Namespace, shared: Path) -> None:
    """Run main.py with `args` and keep what it prints, unless its results are those of before.

    The results of an earlier run stay until there are new ones.
    """
    import main
    from lib.run.check import check

    folder = Path(args.save)
    if before := read_json(folder / RESULTS):
        outputs = dict(save_model=None, resume=None, offload=None)
        with redirect_stdout(io.StringIO()):
            job = check(argparse.Namespace(**vars(args) | outputs), shared)
        reason = _difference(before.get("fingerprint", {}), job.fingerprint)
        if not reason and args.save_model and not Path(args.save_model, "config.json").is_file():
            reason = "its model was not kept"
        if not reason:
            print(FINISHED)
            return
        print(f"{reason}; it is run again", flush=True)
    if args.save_model == str(folder / "model") and (folder / OUTPUT).is_file():
        for earlier in (args.save_model, partial_of(args.save_model)):
            shutil.rmtree(earlier, ignore_errors=True)
    with (folder / OUTPUT).open("w", encoding="utf-8") as file, redirect_stdout(file):
        main.run(check(args, shared))


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return in what the fingerprints of two runs differ first; None if they are the same."""
    from lib.run.fingerprint import differences

    for section, facts in now.items():
        for name, (old, new) in differences(before.get(section, {}), facts).items():
            return f"{name} was {old!r}, is {new!r}"
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none that can be read."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
        write_results(args.save, {"error": command.one_line(reason)}, ERROR)
        raise


if __name__ == "__main__":
    sys.exit(command.run(main))
