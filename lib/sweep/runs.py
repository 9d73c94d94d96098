"""The runs of a sweep, one after another: finished ones are kept, failed ones recorded."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from tqdm import tqdm

import main
from lib.report.results import RESULTS, write_results
from lib.run.check import check
from lib.run.fingerprint import difference
from lib.sweep.kept import SweepCache, start_peak
from lib.sweep.plan import Planned
from lib.util.errors import UserError
from lib.util.terminal import one_line

OUTPUT = "output.txt"  # of a run: what main.py would have written to the terminal


def run_all(planned: Sequence[Planned], debug: bool = False) -> list[str]:
    """Do what is not yet done; the names of the runs that failed.

    A run that fails leaves its reason in its results.json and does not stop the rest. `debug`
    shows the traceback of every failure, otherwise only of those that look like a defect.
    """
    kept = SweepCache()
    todo = [run for run in planned if not _finished(run, kept)]
    done = len(planned) - len(todo)
    print(f"{len(planned)} runs, {done} of them finished before", flush=True)
    failed, start = [], time.perf_counter()
    for index, run in enumerate(todo, 1):
        began = time.perf_counter()
        results = do(run, kept, debug)
        now = time.perf_counter()
        left = (now - start) / index * (len(todo) - index)
        line = f"{run.name}: {_outcome(results)}; {now - began:.0f} s"
        line += f", about {tqdm.format_interval(left)} left" if index < len(todo) else ""
        print(f"[{done + index}/{len(planned)}] {line}", flush=True)
        failed += [run.name] if "error" in results else []
    return failed


def _finished(run: Planned, kept: SweepCache) -> bool:
    """Whether the run need not be done; says why one is done again."""
    results = read_results(run)
    why = why_again(run, results, kept) if results else ""
    if why:
        print(f"{run.name}: {why}; it is done again")
    return why is None


def do(run: Planned, kept: SweepCache, debug: bool = False) -> dict[str, Any]:
    """One run; its results, which for a failed one are `error` and the flags."""
    run.folder.mkdir(parents=True, exist_ok=True)
    own_peak = start_peak(run.args.device)
    try:
        with (run.folder / OUTPUT).open("w", encoding="utf-8") as file, redirect_stdout(file):
            results = main.run(check(run.args, kept))
    except Exception as error:  # whatever it is, the other runs are independent of it
        expected = isinstance(error, UserError | OSError | MemoryError)
        if debug or not expected:
            traceback.print_exc()
        reason = one_line(str(error))
        results = {
            "model": run.args.model,
            "method": run.args.prune_method or "dense",
            "flags": vars(run.args),
            "error": reason if expected and reason else f"{type(error).__name__}: {reason}",
        }
    else:
        results["peak_memory"]["of"] = kept.beside(own_peak)
    write_results(run.folder, results)
    return results


def read_results(run: Planned) -> dict[str, Any]:
    """What stands in the run's results.json; {} where there is none that can be read."""
    try:
        return json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def why_again(run: Planned, results: dict[str, Any], kept: SweepCache) -> str | None:
    """Why a run with these results is done again; None where it would give the same."""
    if "error" in results:
        return f"failed before ({results['error']})"
    if "fingerprint" not in results:
        return "its results do not tell what they were made of"
    try:
        now = check(run.args, kept).fingerprint
    except (UserError, OSError) as error:
        return f"can't be checked ({one_line(str(error))})"
    for section in ("pruning", "measuring"):
        if found := difference(results["fingerprint"][section], now[section]):
            name, before, after = found
            return f"{name} was {before}, is {after}"
    saved = "save" in results["seconds"] and (run.folder / "model").is_dir()
    return "its model was not kept" if run.args.save_model and not saved else None


def _outcome(results: dict[str, Any]) -> str:
    if "error" in results:
        return f"failed: {results['error']}"
    return ", ".join(f"{name} {value:.2f}" for name, value in results["perplexity"].items())
