"""The whole job in small, on text and a model that it makes itself; no network, no GPU.

    python -m lib.demo [--folder demo] [--fresh]

Composes Ukrainian and English stories, trains a tiny model on both (kept for the next time), and
runs main.py on it as a user would: every method, at 50% and 2:4, calibrated on either language,
measured on both. Ends with a table of perplexities and a picture of what pruning cost.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.util import command
from lib.util.errors import UserError

LANGUAGES = ("uk", "en")
TRAIN_DOCUMENTS, TEST_DOCUMENTS = 500, 25  # of either language
TYPES = {"50%": "unstructured", "2:4": "2:4"}
CALIBRATED = ("wanda", "sparsegpt", "admm")
WINDOWS = 64  # of calibration
PROJECT = Path(__file__).parents[1]
TABLE, PICTURE = "report.md", "pruning_cost.png"


@dataclass(frozen=True)
class Step:
    """One run of main.py: its folder under `runs`, and its own flags."""

    name: str
    flags: tuple[str, ...]


def steps(folder: Path) -> Iterator[Step]:
    """The dense model; magnitude, which needs no calibration; the others by language."""
    yield Step("dense", ("--eval_only",))
    for kind, sparsity_type in TYPES.items():
        pruned = ("--sparsity_ratio", "0.5", "--sparsity_type", sparsity_type)
        label = kind.replace("%", "").replace(":", "of")
        yield Step(f"magnitude-{label}", ("--prune_method", "magnitude", *pruned))
        for method in CALIBRATED:
            for language in LANGUAGES:
                text = ("--calibration_data", str(folder / language))
                name = f"{method}-{label}-{language}"
                yield Step(name, ("--prune_method", method, *pruned, *text))


def flags_of(step: Step, folder: Path) -> list[str]:
    """What a user would type after `python main.py`."""
    tests = [str(folder / language) for language in LANGUAGES]
    shared = ["--model", str(folder / "model"), "--device", "cpu", "--nsamples", str(WINDOWS)]
    out = str(folder / "runs" / step.name)
    return [*shared, "--eval_data", *tests, *step.flags, "--save", out]


def run_all(todo: Sequence[Step], folder: Path, at_once: int) -> None:
    """Run the steps, `at_once` side by side, each on one thread; UserError where one fails.

    A run of this size is mostly start-up, which uses one core. One thread each also makes the
    figures the same however many cores there are.
    """
    waiting, running = list(todo), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                step = waiting.pop(0)
                running[step] = _start(step, folder)
            for step in [step for step, process in running.items() if process.poll() is not None]:
                _report(step, running.pop(step).returncode, folder)
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _start(step: Step, folder: Path) -> subprocess.Popen:
    line = [sys.executable, str(PROJECT / "main.py"), *flags_of(step, folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "runs" / f"{step.name}.txt").open("w", encoding="utf-8") as output:
        return subprocess.Popen(line, stdout=output, stderr=output, env=environment)


def _report(step: Step, status: int, folder: Path) -> None:
    written = folder / "runs" / f"{step.name}.txt"
    if status:
        lines = written.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        raise UserError(f"{step.name}: main.py failed: {lines[-1]}; all it said is in {written}")
    from lib.report.results import load_runs

    (run,) = load_runs([folder / "runs" / step.name])
    figures = (f"{name} {test['perplexity']:.2f}" for name, test in run.tests.items())
    print(f"  {step.name:<20} perplexity: {', '.join(figures)}", flush=True)


def prepare(folder: Path, fresh: bool) -> None:
    """Texts and model; an earlier model is kept where it would come out the same."""
    from lib.demo.model import Recipe, trained_model
    from lib.demo.text import compose, write_texts
    from lib.util.progress import quiet

    print(f"1. Text: {TRAIN_DOCUMENTS + TEST_DOCUMENTS} stories each in {', '.join(LANGUAGES)}")
    texts = compose(TRAIN_DOCUMENTS + TEST_DOCUMENTS)
    write_texts(folder, texts, TEST_DOCUMENTS)
    print(f"2. Model: a tiny LLaMA for both, in {folder / 'model'}", flush=True)
    quiet()
    start = time.perf_counter()
    train = {language: some[:TRAIN_DOCUMENTS] for language, some in texts.items()}
    trained = trained_model(folder / "model", train, Recipe(), fresh)
    seconds = time.perf_counter() - start
    print(f"   trained in {seconds:.0f} s" if trained else "   kept from before")


def conclude(folder: Path, todo: Sequence[Step]) -> None:
    """The table, on the terminal and in a file, and the picture."""
    from lib.report.plots.cost import pruning_cost
    from lib.report.report import table
    from lib.report.results import load_runs
    from lib.report.tables import tables
    from lib.util.files import write_text

    runs = load_runs(folder / "runs" / step.name for step in todo)
    text = table(runs)
    (all_runs,) = tables(runs)
    pruning_cost(all_runs, folder / PICTURE)
    write_text(folder / TABLE, text + f"\n![pruning cost]({PICTURE})\n")
    print(f"\n{text}\ntable: {folder / TABLE}\npicture: {folder / PICTURE}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="demo", help="what it makes goes here (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="train the model anew")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    start = time.perf_counter()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--folder {folder}: is a file; name a folder")
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    prepare(folder, args.fresh)
    todo = list(steps(folder))
    print(f"3. Runs of main.py: {len(todo)}, the last of them")
    print(f"   python main.py {shlex.join(flags_of(todo[-1], folder))}", flush=True)
    run_all(todo, folder, at_once=min(2, os.cpu_count() or 1))
    conclude(folder, todo)
    print(f"done in {time.perf_counter() - start:.0f} s")
