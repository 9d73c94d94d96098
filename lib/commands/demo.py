"""The whole job in small, on the project's own texts and a model trained on them.

    python -m lib.commands.demo [--folder demo] [--fresh] [--small]

The demo needs neither network nor GPU. It trains a tiny model on Ukrainian and English stories and
prunes it in one sweep: by every method, at 50% and 2:4, calibrated on either language, measured on
both. The best of the 2:4 models are also recovered. The report with its pictures comes last. The
model and finished runs are kept, so that the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.commands.demo_model import DemoTraining, train_model
from lib.commands.sweep import Run, build_sweep_parser, plan, run_all
from lib.run.flags import build_parser
from lib.util import command
from lib.util.errors import UserError
from lib.util.files import check_writable

LANGUAGES = ("uk", "en")
STORIES = Path(__file__).parent / "demo_texts"
MARK = "demo.txt"  # in every folder that a demo has made
RECOVERED = ("sparsegpt", "admm"), "2:4"


@dataclass(frozen=True)
class Scale:
    """The size of a demo: its model, its texts and its runs."""

    training: DemoTraining = DemoTraining()
    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt", "admm")
    languages: tuple[str, ...] = LANGUAGES  # of calibration
    types: tuple[str, ...] = ("unstructured", "2:4")
    train: int = 500  # stories of each language
    test: int = 25  # stories of each language
    windows: int = 64  # calibration windows
    recovery: int = 50_000  # tokens


SMALL = Scale(
    DemoTraining(
        vocabulary=300, window=32, width=16, inner=32, blocks=1, heads=2, batch=4, steps=2
    ),
    methods=("admm",),
    languages=("uk",),
    types=("2:4",),
    train=10,
    test=1,
    windows=8,
    recovery=64,
)


def demo(folder: Path, scale: Scale, fresh: bool = False, debug: bool = False) -> None:
    """Make texts, model, runs and report in `folder`.

    `fresh` trains the model again. Raises UserError if `folder` holds anything but a demo, and at
    the end if a run failed.
    """
    check_writable("--folder", str(folder))
    names = sorted(path.name for path in folder.glob("*"))
    if names and MARK not in names:
        raise UserError(f"--folder {folder}: holds {names[0]}, but no {MARK}; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("Made by launch.sh demo, which may replace what is here.\n", "utf-8")
    _prepare(folder, scale, fresh)
    runs = _plan(folder, scale, debug)
    # figures do not depend on the number of cores, and such small matrices gain nothing from more
    os.environ["OMP_NUM_THREADS"] = "1"
    run_all(runs, str(folder / "runs"), report=str(folder))
    print(f"table: {folder / 'report.md'}")


def _prepare(folder: Path, scale: Scale, fresh: bool) -> None:
    """Write texts and model; an earlier model stays if it would come out the same."""
    from lib.util.progress import quiet

    print(f"1. Text: {scale.train + scale.test} stories each in {', '.join(LANGUAGES)}")
    stories = read_stories(scale.train + scale.test)
    write_texts(folder, stories, scale.test)
    print(f"2. Model: a tiny LLaMA for both, in {folder / 'model'}", flush=True)
    quiet()
    start = time.perf_counter()
    train_texts = {language: texts[: scale.train] for language, texts in stories.items()}
    trained = train_model(folder / "model", train_texts, scale.training, fresh)
    seconds = time.perf_counter() - start
    print(f"   trained in {seconds:.0f} s" if trained else "   kept from before")


def read_stories(count: int) -> dict[str, list[str]]:
    """Return the first `count` stories of each language."""
    stories = {}
    for language in LANGUAGES:
        with gzip.open(STORIES / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
            stories[language] = [json.loads(line)["text"] for line in lines][:count]
    return stories


def write_texts(folder: Path, stories: Mapping[str, Sequence[str]], n_test: int) -> None:
    """Write FOLDER/LANGUAGE/{train,test}.jsonl, rows {"text": ...}; the last ones are the test."""
    for language, texts in stories.items():
        target = folder / language
        target.mkdir(parents=True, exist_ok=True)
        for split, part in (("train", texts[:-n_test]), ("test", texts[-n_test:])):
            rows = (json.dumps({"text": text}, ensure_ascii=False) for text in part)
            (target / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8")


def _plan(folder: Path, scale: Scale, debug: bool) -> list[Run]:
    """Return the runs of a sweep, and some of them once more with recovery."""
    train = [str(folder / language) for language in scale.languages]
    tests = [str(folder / language) for language in LANGUAGES]
    flags = ["--models", str(folder / "model"), "--methods", *scale.methods]
    flags += ["--types", *scale.types, "--ratios", "0.5"]
    flags += ["--calibration", *train, "--eval_data", *tests, "--out", str(folder / "runs")]
    flags += ["--debug"] * debug
    run_flags = ["--device", "cpu", "--nsamples", str(scale.windows)]
    print(f"3. Runs:\n   bash launch.sh sweep {shlex.join([*flags, '--', *run_flags])}")
    methods, kind = RECOVERED
    named = ", ".join(method for method in methods if method in scale.methods)
    print(f"   and once more with --recover {scale.recovery}: {kind} by {named}", flush=True)
    runs = plan(build_sweep_parser().parse_args(flags), run_flags)
    return runs + [
        _recovered(run, scale.recovery)
        for run in runs
        if run.args.prune_method in methods and run.args.sparsity_type == kind
    ]


def _recovered(run: Run, tokens: int) -> Run:
    """Return the same run with recovery after pruning."""
    folder = run.folder.with_name(f"{run.folder.name}-recovered")
    flags = [*run.flags, "--recover", str(tokens), "--save", str(folder)]
    return Run(f"{run.name}-recovered", folder, flags, build_parser().parse_args(flags))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.commands.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--folder", default="demo", help="what it makes goes here (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="train the model anew")
    parser.add_argument(
        "--small",
        action="store_true",
        help="hardly train it and do fewer runs: to see what is made",
    )
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    start = time.perf_counter()
    demo(Path(args.folder), SMALL if args.small else Scale(), args.fresh, args.debug)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(command.run(main))
