"""The runs of a grid, one after another: finished ones are kept, failed ones recorded."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from lib.report.results import RESULTS, write_results
from lib.run.flags import build_parser
from lib.sweep.kept import Kept, KeptJob
from lib.sweep.plan import Planned
from lib.util.errors import UserError

OUTPUT = "output.txt"  # of a run: what main.py would have written to the terminal
SAME_RESULT = frozenset({"debug", "save", "save_model", "cache_dir", "resume"})
SAME_UNCALIBRATED = SAME_RESULT | {"seed", "nsamples"}


def run_all(planned: Sequence[Planned], debug: bool = False) -> list[str]:
    """Do what is not yet done; the names of the runs that failed.

    A run that fails leaves its reason in its results.json and does not stop the rest. `debug`
    shows the traceback of every failure, otherwise only of those that look like a defect.
    """
    clock = Clock()
    todo = [run for run in planned if not _kept_from_before(run, clock)]
    done = len(planned) - len(todo)
    print(f"{len(planned)} runs, {done} of them finished before", flush=True)
    kept, failed = Kept(), []
    for index, run in enumerate(todo, 1):
        if index > 1 and run.args.model != todo[index - 2].args.model:
            kept = Kept()
        start = time.perf_counter()
        results = do(run, kept, debug)
        spent = time.perf_counter() - start
        if "error" in results:
            failed.append(run.name)
        else:
            clock.add(run, spent)
        line = f"{run.name}: {_outcome(results)}; {spent:.0f} s{clock.left(todo[index:])}"
        print(f"[{done + index}/{len(planned)}] {line}", flush=True)
    return failed


def _kept_from_before(run: Planned, clock: Clock) -> bool:
    results = read_results(run)
    why = why_again(run, results)
    if why is None:
        clock.add(run, sum(results["seconds"].values()))
    elif why:
        print(f"{run.name}: {why}; it is done again")
    return why is None


def do(run: Planned, kept: Kept, debug: bool = False) -> dict[str, Any]:
    """One run; its record, which for a failed one holds `error` and the flags."""
    run.folder.mkdir(parents=True, exist_ok=True)
    job = KeptJob(run.args, kept)
    try:
        with (run.folder / OUTPUT).open("w", encoding="utf-8") as file, redirect_stdout(file):
            job.run()
    except Exception as error:  # whatever it is, the other runs are independent of it
        expected = isinstance(error, UserError | OSError | MemoryError)
        if debug or not expected:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        failure = {
            "model": run.args.model,
            "method": job.method,
            "flags": vars(run.args),
            "error": reason if expected and reason else f"{type(error).__name__}: {reason}",
        }
        write_results(run.folder, failure)
        return failure
    return job.results


def read_results(run: Planned) -> dict[str, Any]:
    """What stands in the run's results.json; {} where there is none that can be read."""
    try:
        return json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def why_again(run: Planned, results: dict[str, Any]) -> str | None:
    """None for a run that is finished, "" for one never done, else why it is done again."""
    if not results:
        return ""
    if "error" in results:
        return f"failed before ({results['error']})"
    default = build_parser().get_default
    now = json.loads(json.dumps(vars(run.args), default=str))
    ignored = SAME_RESULT if run.args.calibration_data else SAME_UNCALIBRATED
    for flag in sorted(now.keys() - ignored):
        before = results.get("flags", {}).get(flag, default(flag))
        if before != now[flag]:
            return f"--{flag} was {before}, is {now[flag]}"
    saved = "save" in results["seconds"] and (run.folder / "model").is_dir()
    return "its model was not kept" if run.args.save_model and not saved else None


class Clock:
    """How long runs took, and how long the rest will take."""

    def __init__(self) -> None:
        self.seconds: dict[tuple, list[float]] = {}

    def add(self, run: Planned, seconds: float) -> None:
        for sort in _sorts(run):
            self.seconds.setdefault(sort, []).append(seconds)

    def left(self, todo: Sequence[Planned]) -> str:
        """Such as `, about 12 min left`; by runs of the same sort, as far as there are any."""
        if not todo or not self.seconds:
            return ""
        known = [next(s for s in _sorts(run) if s in self.seconds) for run in todo]
        minutes = sum(statistics.fmean(self.seconds[sort]) for sort in known) / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"


def _sorts(run: Planned) -> list[tuple]:
    """What runs that take about as long have in common, the closest first."""
    args = run.args
    method, kind = args.prune_method, args.sparsity_type
    return [(args.model, method, kind), (args.model, method), (args.model,), ()]


def _outcome(results: dict[str, Any]) -> str:
    if "error" in results:
        return f"failed: {results['error']}"
    return ", ".join(f"{name} {value:.2f}" for name, value in results["perplexity"].items())
