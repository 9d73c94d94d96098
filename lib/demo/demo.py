"""The whole job in small, on texts and a model that it makes itself; no network, no GPU.

    python -m lib.demo [--folder demo] [--fresh]

Composes Ukrainian and English stories, trains a tiny model on both, and prunes it in one sweep: by
every method, at 50% and 2:4, calibrated on either language, measured on both; the best of the 2:4
models are also recovered. Ends with a table of perplexities and a picture of what pruning cost. The
model and finished runs are kept, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib.demo.model import Training, trained_model
from lib.demo.text import LANGUAGES, compose, write_texts
from lib.sweep.plan import Planned, plan
from lib.sweep.sweep import build_sweep_parser, do_all
from lib.util import command
from lib.util.errors import UserError
from lib.util.files import check_output_folder, write_text
from lib.util.folders import check_replaceable

MODEL, RUNS, TABLE, PICTURE = "model", "runs", "report.md", "pruning_cost.png"
METHODS, TYPES, RATIO = ("magnitude", "wanda", "sparsegpt", "admm"), ("unstructured", "2:4"), "0.5"
RECOVERED = ("sparsegpt", "admm"), "2:4"


@dataclass(frozen=True)
class Scale:
    """How large a demo is."""

    training: Training = Training()
    train: int = 500  # stories of either language
    test: int = 25  # stories of either language
    windows: int = 64  # of calibration
    recovery: int = 50_000  # tokens


def demo(folder: Path, scale: Scale, fresh: bool = False, debug: bool = False) -> None:
    """Texts, model, runs, table and picture, all in `folder`.

    `fresh`: train the model anew; `debug`: show the traceback of a run that fails. UserError where
    `folder` holds something else, and at the end where a run failed.
    """
    check_folder(folder)
    prepare(folder, scale, fresh)
    own, passed_on = flags_of_sweep(folder, scale.windows)
    print(f"3. Runs:\n   bash launch.sh sweep {shlex.join([*own, '--', *passed_on])}")
    methods, kind = RECOVERED
    print(f"   and once more with --recover {scale.recovery}: {kind} by {', '.join(methods)}")
    with one_thread():
        planned = sweep(own, passed_on, scale.recovery, debug)
    conclude(folder, planned)


def check_folder(folder: Path) -> None:
    """UserError where `folder` can't be written or holds what is not a demo's."""
    check_output_folder("--folder", str(folder))
    held = sorted(item.name for item in folder.glob("[!.]*"))
    if held and MODEL not in held:
        raise UserError(f"--folder {folder}: holds {held[0]}, but no demo; name another folder")
    check_replaceable("--folder", str(folder / MODEL))


def prepare(folder: Path, scale: Scale, fresh: bool) -> None:
    """Texts and model; an earlier model is kept where it would come out the same.

    The model comes first: where it stands, the folder is a demo's, and its texts may be replaced.
    """
    from lib.util.progress import quiet

    print(f"1. Text: {scale.train + scale.test} stories each in {', '.join(LANGUAGES)}")
    texts = compose(scale.train + scale.test)
    print(f"2. Model: a tiny LLaMA for both, in {folder / MODEL}", flush=True)
    quiet()
    start = time.perf_counter()
    seen = {language: stories[: scale.train] for language, stories in texts.items()}
    trained = trained_model(folder / MODEL, seen, scale.training, fresh)
    seconds = time.perf_counter() - start
    print(f"   trained in {seconds:.0f} s" if trained else "   kept from before")
    write_texts(folder, texts, scale.test)


def flags_of_sweep(folder: Path, windows: int) -> tuple[list[str], list[str]]:
    """The sweep's own flags, and those that go on to every run of main.py."""
    texts = [str(folder / language) for language in LANGUAGES]
    own = ["--models", str(folder / MODEL), "--methods", *METHODS, "--types", *TYPES]
    own += ["--ratios", RATIO, "--calibration", *texts, "--eval_data", *texts]
    own += ["--out", str(folder / RUNS)]
    return own, ["--device", "cpu", "--nsamples", str(windows)]


def sweep(own: list[str], passed_on: list[str], tokens: int, debug: bool) -> list[Planned]:
    """Do all runs and report on them; UserError at the end where some failed."""
    args = build_sweep_parser().parse_args(own)
    planned = plan(args, passed_on)
    methods, kind = RECOVERED
    planned += [
        recovered(run, tokens)
        for run in planned
        if run.args.prune_method in methods and run.args.sparsity_type == kind
    ]
    do_all(planned, args.out, debug)
    return planned


def recovered(run: Planned, tokens: int) -> Planned:
    """The same run, with recovery after pruning."""
    name, folder = f"{run.name}-recovered", run.folder.with_name(f"{run.folder.name}-recovered")
    changed = vars(run.args) | {"recover": tokens, "save": str(folder)}
    return Planned(name, folder, argparse.Namespace(**changed))


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads split sums, whose last digits then depend on how many cores there are; matrices as
    small as the demo's gain nothing from them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conclude(folder: Path, planned: Sequence[Planned]) -> None:
    """Beside the report on all runs, which the sweep has shown: table and one picture, in files."""
    from lib.report.completion_tables import completions_of_runs
    from lib.report.plots.cost import pruning_cost
    from lib.report.plots.style import can_draw
    from lib.report.report import table
    from lib.report.results import load_runs
    from lib.report.tables import tables

    runs = load_runs(run.folder for run in planned)
    (all_runs,) = tables(runs)
    drawn = can_draw()
    if drawn:
        pruning_cost(all_runs, folder / PICTURE)
    shown = f"\n![pruning cost]({PICTURE})\n" if drawn else ""
    write_text(folder / TABLE, f"{table(runs)}{shown}\n{completions_of_runs(runs)}\n")
    print(f"table: {folder / TABLE}" + (f"\npicture: {folder / PICTURE}" if drawn else ""))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="demo", help="what it makes goes here (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="train the model anew")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    start = time.perf_counter()
    demo(Path(args.folder), Scale(), args.fresh, args.debug)
    print(f"done in {time.perf_counter() - start:.0f} s")
