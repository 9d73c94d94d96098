"""The whole job in small, on the project's own texts and a model trained on them.

    bash launch.sh demo [--folder demo] [--small]

The demo needs neither network nor GPU. It trains a tiny model on Ukrainian and English stories and
prunes it in one sweep: by every method, at 50% and 2:4, calibrated on either language, measured on
both. The best of the 2:4 models are also recovered. The report with its picture comes last. The
model and finished runs are kept, so that the same command resumes after an interruption.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from lib.commands.demo_model import DemoTraining, train_model
from lib.commands.sweep import Run, build_sweep_parser, plan, run_all
from lib.methods.registry import METHODS
from lib.util import command
from lib.util.files import check_new_folder

LANGUAGES = ("uk", "en")
STORIES = Path(__file__).parent / "demo_texts"
MARK = "demo.txt"  # in every folder that a demo has made
RECOVERED = "model/sparsegpt-2of4", "model/admm-2of4"
SMALL = DemoTraining(
    vocabulary=300, window=32, width=16, inner=32, blocks=1, heads=2, batch=4, steps=2
)


def demo(folder: Path, small: bool = False, debug: bool = False) -> None:
    """Make texts, model, runs and report in `folder`, which holds nothing but a demo.

    `small`: a model that hardly learns, and few runs.
    """
    import torch

    from lib.util.progress import quiet

    torch.set_num_threads(1)  # matrices this small gain nothing from more
    if not (folder / MARK).is_file():
        check_new_folder("--folder", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("Made by the demo, which may replace what is here.\n", "utf-8")

    train, test = (10, 1) if small else (500, 25)  # stories of each language
    print(f"1. Text: {train + test} stories each in {', '.join(LANGUAGES)}")
    texts = {language: write_texts(folder / language, train, test) for language in LANGUAGES}

    print(f"2. Model: a tiny LLaMA for both, in {folder / 'model'}", flush=True)
    quiet()
    start = time.perf_counter()
    if train_model(folder / "model", texts, SMALL if small else DemoTraining()):
        shutil.rmtree(folder / "runs", ignore_errors=True)  # they were of another model
        print(f"   trained in {time.perf_counter() - start:.0f} s")
    else:
        print("   kept from before")

    tests = [str(folder / language) for language in LANGUAGES]
    flags = ["--models", str(folder / "model"), "--out", str(folder / "runs")]
    flags += ["--methods", *(["admm"] if small else METHODS)]
    flags += ["--types", *(["2:4"] if small else ["unstructured", "2:4"])]
    flags += ["--calibration", *(tests[:1] if small else tests), "--eval_data", *tests]
    run_flags = ["--device", "cpu", "--nsamples", "8" if small else "64"]
    recover = ["--recover", "64" if small else "50000"]
    print(f"3. Runs:\n   {command.typed('sweep')} {shlex.join([*flags, '--', *run_flags])}")
    print(f"   and once more with {' '.join(recover)}: {', '.join(RECOVERED)}", flush=True)
    runs = plan(build_sweep_parser().parse_args([*flags, *["--debug"] * debug]), run_flags)
    for name, _, of_run in list(runs):
        if name.startswith(RECOVERED):
            name = f"{name}-recovered"
            saved = folder / "runs" / name
            runs.append(Run(name, saved, [*of_run, *recover, "--save", str(saved)]))
    run_all(runs, str(folder / "runs"), report=str(folder))
    print(f"all figures and texts: {folder / 'report.md'}")


def write_texts(folder: Path, train: int, test: int) -> list[str]:
    """Write the first stories of the language that `folder` is named after; return the training."""
    with gzip.open(STORIES / f"{folder.name}.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = list(file)[: train + test]
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(lines[:train]), "utf-8")
    (folder / "test.jsonl").write_text("".join(lines[train:]), "utf-8")
    return [json.loads(line)["text"] for line in lines[:train]]


def main(argv: list[str]) -> None:
    parser = command.make_parser("demo", __doc__)
    parser.add_argument("--folder", default="demo", help="what it makes goes here (default: demo)")
    parser.add_argument("--small", action="store_true", help="in seconds: hardly train it")
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # of the runs
    start = time.perf_counter()
    demo(Path(args.folder), args.small, args.debug)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(command.run(main))
