"""The whole job in small, on the project's own texts and a model trained on them.

    python -m lib.demo [--folder demo] [--fresh] [--small]

The demo needs neither network nor GPU. It trains a tiny model on Ukrainian and English stories and
prunes it in one sweep: by every method, at 50% and 2:4, calibrated on either language, measured on
both. The best of the 2:4 models are also recovered. A table of perplexities and a picture of what
pruning cost come last. The model and finished runs are kept, so that the same command resumes
after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.demo.model import SETTINGS, DemoTraining, train_model
from lib.demo.text import LANGUAGES, read_stories, write_texts
from lib.sweep.plan import Planned, plan
from lib.sweep.sweep import build_sweep_parser, do_all
from lib.util import command
from lib.util.errors import UserError
from lib.util.files import check_output_folder, write_text
from lib.util.folders import check_replaceable

MODEL, RUNS, TABLE, PICTURE = "model", "runs", "report.md", "pruning_cost.png"
RATIO = "0.5"
RECOVERED = ("sparsegpt", "admm"), "2:4"


@dataclass(frozen=True)
class Scale:
    """The size of a demo: its model, its texts and its runs."""

    training: DemoTraining = DemoTraining()
    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt", "admm")
    types: tuple[str, ...] = ("unstructured", "2:4")
    train: int = 500  # stories of each language
    test: int = 25  # stories of each language
    windows: int = 64  # calibration windows
    recovery: int = 50_000  # tokens


SMALL = Scale(
    DemoTraining(
        vocabulary=300, window=32, width=16, inner=32, blocks=1, heads=2, batch=4, steps=2
    ),
    methods=("wanda", "admm"),
    train=10,
    test=1,
    windows=8,
    recovery=64,
)


def demo(folder: Path, scale: Scale, fresh: bool = False, debug: bool = False) -> None:
    """Make texts, model, runs, table and picture in `folder`.

    `fresh` trains the model again. `debug` shows the traceback of a run that fails. Raises
    UserError if `folder` holds something else, and at the end if a run failed.
    """
    check_folder(folder)
    prepare(folder, scale, fresh)
    sweep_flags, run_flags = flags_of_sweep(folder, scale)
    print(f"3. Runs:\n   bash launch.sh sweep {shlex.join([*sweep_flags, '--', *run_flags])}")
    methods, kind = RECOVERED
    named = ", ".join(method for method in methods if method in scale.methods)
    print(f"   and once more with --recover {scale.recovery}: {kind} by {named}")
    with one_thread():
        planned = sweep(sweep_flags, run_flags, scale.recovery, debug)
    conclude(folder, planned)


def check_folder(folder: Path) -> None:
    """Raise UserError if `folder` can't be written or holds anything but a demo."""
    check_output_folder("--folder", str(folder))
    names = sorted(item.name for item in folder.glob("[!.]*"))
    if names and not is_demo(folder):
        raise UserError(
            f"--folder {folder}: holds {names[0]}, but no demo; name a new or empty folder"
        )
    check_replaceable("--folder", str(folder / MODEL))


def is_demo(folder: Path) -> bool:
    """Return whether the model in `folder` bears the settings that only a demo writes."""
    try:
        settings = json.loads((folder / MODEL / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.keys() == {*asdict(DemoTraining()), "text"}


def prepare(folder: Path, scale: Scale, fresh: bool) -> None:
    """Write texts and model; an earlier model stays if it would come out the same.

    The model is written first: once it stands, the folder is a demo's and its texts may be
    replaced.
    """
    from lib.util.progress import quiet

    print(f"1. Text: {scale.train + scale.test} stories each in {', '.join(LANGUAGES)}")
    stories = read_stories(scale.train + scale.test)
    print(f"2. Model: a tiny LLaMA for both, in {folder / MODEL}", flush=True)
    quiet()
    start = time.perf_counter()
    train_texts = {language: texts[: scale.train] for language, texts in stories.items()}
    trained = train_model(folder / MODEL, train_texts, scale.training, fresh)
    seconds = time.perf_counter() - start
    print(f"   trained in {seconds:.0f} s" if trained else "   kept from before")
    write_texts(folder, stories, scale.test)


def flags_of_sweep(folder: Path, scale: Scale) -> tuple[list[str], list[str]]:
    """Return the flags of the sweep, and those of each of its runs of main.py."""
    texts = [str(folder / language) for language in LANGUAGES]
    flags = ["--models", str(folder / MODEL), "--methods", *scale.methods]
    flags += ["--types", *scale.types]
    flags += ["--ratios", RATIO, "--calibration", *texts, "--eval_data", *texts]
    flags += ["--out", str(folder / RUNS)]
    return flags, ["--device", "cpu", "--nsamples", str(scale.windows)]


def sweep(sweep_flags: list[str], run_flags: list[str], tokens: int, debug: bool) -> list[Planned]:
    """Do all runs and report on them; raises UserError at the end if some failed."""
    args = build_sweep_parser().parse_args(sweep_flags)
    planned = plan(args, run_flags)
    methods, kind = RECOVERED
    planned += [
        recovered(run, tokens)
        for run in planned
        if run.args.prune_method in methods and run.args.sparsity_type == kind
    ]
    do_all(planned, args.out, debug)
    return planned


def recovered(run: Planned, tokens: int) -> Planned:
    """Return the same run with recovery after pruning."""
    name, folder = f"{run.name}-recovered", run.folder.with_name(f"{run.folder.name}-recovered")
    changed = vars(run.args) | {"recover": tokens, "save": str(folder)}
    return Planned(name, folder, argparse.Namespace(**changed))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread inside, so that the figures do not depend on the number of cores.

    Matrices as small as the demo's gain nothing from more threads.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conclude(folder: Path, planned: Sequence[Planned]) -> None:
    """Write table and picture; the sweep has already shown its report on all runs."""
    from lib.report.completion_tables import completions_of_runs
    from lib.report.plots.cost import pruning_cost
    from lib.report.plots.style import can_draw, save_figure
    from lib.report.results import load_runs
    from lib.report.tables import comparable_tables
    from lib.report.write import report_text

    runs = load_runs(run.folder for run in planned)
    (all_runs,) = comparable_tables(runs)
    drawn = can_draw()
    if drawn:
        save_figure(pruning_cost(all_runs), folder / PICTURE)
    shown = f"\n![pruning cost]({PICTURE})\n" if drawn else ""
    write_text(folder / TABLE, f"{report_text(runs)}{shown}\n{completions_of_runs(runs)}\n")
    print(f"table: {folder / TABLE}" + (f"\npicture: {folder / PICTURE}" if drawn else ""))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="demo", help="what it makes goes here (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="train the model anew")
    parser.add_argument(
        "--small",
        action="store_true",
        help="hardly train it and do fewer runs: in seconds, to see what is made",
    )
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    start = time.perf_counter()
    demo(Path(args.folder), SMALL if args.small else Scale(), args.fresh, args.debug)
    print(f"done in {time.perf_counter() - start:.0f} s")
