"""Run the runs of a sweep one after another; finished ones are kept, failures recorded."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from tqdm import tqdm

import main
from lib.report.results import ERROR, RESULTS, FailedRun, Results, write_error, write_results
from lib.run.check import check
from lib.run.fingerprint import CODE, differences
from lib.sweep.cache import SweepCache, start_peak
from lib.sweep.plan import Planned
from lib.util.errors import UserError
from lib.util.events import emit
from lib.util.terminal import one_line

OUTPUT = "output.txt"  # of a run: what main.py would have written to the terminal


def run_all(planned: Sequence[Planned], debug: bool = False) -> list[str]:
    """Run what is not finished; return the names of the runs that failed.

    A run that fails leaves its reason in its error.json and does not stop the others. `debug` shows
    the traceback of every failure; without it only defects show one.
    """
    cache = SweepCache()
    todo = [run for run in planned if not _is_finished(run, cache)]
    done = len(planned) - len(todo)
    print(f"{len(planned)} runs, {done} of them finished before", flush=True)
    failed, start = [], time.perf_counter()
    for index, run in enumerate(todo, 1):
        began = time.perf_counter()
        emit(f"run {run.name}")
        outcome = do(run, cache, debug)
        now = time.perf_counter()
        remaining = (now - start) / index * (len(todo) - index)
        line = f"{run.name}: {_outcome(outcome)}; {now - began:.0f} s"
        line += f", about {tqdm.format_interval(remaining)} left" if index < len(todo) else ""
        print(f"[{done + index}/{len(planned)}] {line}", flush=True)
        failed += [run.name] if "error" in outcome else []
    return failed


def do(run: Planned, cache: SweepCache, debug: bool = False) -> Results | FailedRun:
    """Run one run; return its results.json record, or its error.json record if it failed.

    The results of an earlier run stay until there are new ones.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    own_peak = start_peak(run.args.device)
    try:
        with (run.folder / OUTPUT).open("w", encoding="utf-8") as file, redirect_stdout(file):
            results = main.run(check(run.args, cache))
        results["peak_memory"]["of"] = cache.beside(own_peak)
        write_results(run.folder, results)
    except Exception as error:  # the other runs do not depend on this one
        expected = isinstance(error, UserError | OSError | MemoryError)
        if debug or not expected:
            traceback.print_exc()
        reason = one_line(str(error))
        failure: FailedRun = {
            "model": run.args.model,
            "method": run.args.prune_method or "dense",
            "flags": vars(run.args),
            "error": reason if expected and reason else f"{type(error).__name__}: {reason}",
        }
        write_error(run.folder, failure)
        return failure
    (run.folder / ERROR).unlink(missing_ok=True)
    return results


def _is_finished(run: Planned, cache: SweepCache) -> bool:
    """Return whether the run has its results; print why a run is repeated or not checked."""
    error, results = read_json(run.folder / ERROR), read_json(run.folder / RESULTS)
    if "error" in error:
        print(f"{run.name}: failed before ({error['error']}); it is run again")
        return False
    if not results:
        return False
    try:
        job = check(run.args, cache)
    except (UserError, OSError) as problem:
        reason = one_line(str(problem))
        print(f"{run.name}: can't be checked ({reason}); its results are kept")
        return True
    if job.finished:
        job.finished.close()
    reasons = why_again(run, results, job.fingerprint)
    if [CODE] == list(reasons):
        print(f"{run.name}: {reasons[CODE]}; its results are kept, remove them to run it again")
        return True
    for reason in list(reasons.values())[:1]:
        print(f"{run.name}: {reason}; it is run again")
    return not reasons


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def why_again(
    run: Planned, results: dict[str, Any], now: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Return {name: message} of everything in which results differ from a run `now`."""
    if "fingerprint" not in results:
        return {"fingerprint": "its results do not say what they were made of"}
    reasons = {
        name: f"{name} was {before}, is {after}"
        for section in ("pruning", "measuring")
        for name, (before, after) in differences(
            results["fingerprint"][section], now[section]
        ).items()
    }
    saved = "save" in results["seconds"] and (run.folder / "model").is_dir()
    if run.args.save_model and not saved:
        reasons["model"] = "its model was not kept"
    return reasons


def _outcome(results: Results | FailedRun) -> str:
    if "error" in results:
        return f"failed: {results['error']}"
    return ", ".join(f"{name} {value:.2f}" for name, value in results["perplexity"].items())
