"""One run of a sweep, in a separate process: main.py, unless its results exist already.

    python -m lib.util.cli commands.sweep.run FOLDER -- FLAGS

FLAGS are those of main.py. In FOLDER the runs of a sweep share the dense model's states.
"""

from __future__ import annotations

import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path

from ...run.flags import build_parser, named
from ...run.plan import Flags
from ...run.results import RESULTS, read_results
from ...util.cli import split_argv
from ...util.files import partial_of
from ...util.processes import import_own

OUTPUT = "output.txt"  # output of main.py; marks a folder that a sweep has made


def main(argv: list[str]) -> None:
    """Run main.py with FLAGS, unless it has finished; new results replace earlier ones."""
    from ...run.check import check, check_outputs, open_folder

    (shared,), words = split_argv(argv)
    flags = build_parser().parse_args(words)
    folder, printed = Path(flags.save), io.StringIO()
    # the check must not touch finished files
    outputs = dict.fromkeys(named(output=True))
    with redirect_stdout(printed):
        run = check(Flags(**vars(flags) | outputs), Path(shared))
    if (folder / RESULTS).is_file():
        reason = _reason_to_run_again(flags, run.fingerprint)
        if not reason:
            print(f"{folder}: finished before")
            return
        print(f"{folder}: {reason}; it is run again", flush=True)
    if flags.save_model and (folder / OUTPUT).is_file():
        for earlier in (flags.save_model, partial_of(flags.save_model)):
            shutil.rmtree(earlier, ignore_errors=True)
    flags.date = run.flags.date
    check_outputs(flags)
    run.flags = flags
    run.folder = open_folder(run)
    with (folder / OUTPUT).open("w", encoding="utf-8") as file, redirect_stdout(file):
        file.write(printed.getvalue())
        results = import_own("main").run(run)
    figures = (f"{name} {value:.2f}" for name, value in results["perplexity"].items())
    print(f"{folder}: {', '.join(figures)}")


def _reason_to_run_again(flags: Flags, now: dict[str, dict]) -> str | None:
    """Return how the run differs from the finished one in its folder; None if it does not."""
    from ...run.fingerprint import first_difference

    before = read_results(flags.save).get("fingerprint", {})
    for section, facts in now.items():
        if changed := first_difference(before.get(section, {}), facts):
            return "{} was {!r}, is {!r}".format(*changed)
    if flags.save_model and not Path(flags.save_model, "config.json").is_file():
        return "its model is missing"
    if flags.save_masks and not Path(flags.save_masks).is_file():
        return "its masks are missing"
    return None
