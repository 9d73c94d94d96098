"""Run many prunings (models x methods x types x ratios x calibration sets x seeds) and report.
For researchers who compare methods, calibration texts or settings.

    bash launch.sh sweep --models MODEL --calibration uk en uk=0.5,en=0.5 --seeds 0 1 2
        --vary nsamples=8,32,128 --out runs -- --device cpu

Flags after `--` go to every run of main.py that they concern. A place that is written, such as
--save_masks runs/masks.safetensors, becomes one for each run, runs/MODEL/RUN/masks.safetensors.
Each value of a `--vary` gives separate runs, also of the dense model if its figures depend on that
flag. Each run is a process with a folder in `--out` (see run.py). Finished runs are kept, so
the same command continues after an interruption and retries failed runs. A report on all runs ends
the sweep.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import product
from pathlib import Path

from tqdm import tqdm

from ...data.sources import is_in_path, mixture_name, parse_sources
from ...methods.registry import METHODS, WITHOUT_NEURONS, label
from ...methods.sparsity import NEURONS, SMALLER, TYPES
from ...run.flags import FLAGS, METHOD, build_parser, check_flags, named, without
from ...run.plan import retired
from ...run.results import RESULTS
from ...util.cli import make_parser, split_argv
from ...util.errors import UserError
from ...util.files import check_writable, write_text
from ...util.processes import call
from ..report.table import PLANNED

SHARED = ".dense-states"  # folder in --out: the dense models' states, for all runs
SET_BY_SWEEP = "sweep sets this flag", "Use the flags of sweep"  # problem and fix
DATE = "date.txt"  # file in --out: the date for chat templates, also if continued later


def build_sweep_parser() -> argparse.ArgumentParser:
    epilog = "Flags after -- go to every run of main.py, such as: -- --nsamples 64 --device cpu"
    parser = make_parser("sweep", __doc__, epilog=epilog)

    def several(name: str, text: str, **options) -> None:
        parser.add_argument(f"--{name}", nargs="+", help=text, **options)

    several("models", "Hub ids or local folders of models", required=True)
    text = "methods of --prune_method, also FILE.py:CLASS (default: all except those for experts)"
    several("methods", text, type=METHOD, default=list(METHODS), metavar="METHOD")
    types = [kind for kind in TYPES if kind not in SMALLER]
    text = f"sparsity types (default: all except {' and '.join(SMALLER)})"
    several("types", text, choices=TYPES, default=types)
    several("ratios", "shares to prune, except for N:M (default: 0.5)", type=float, default=[0.5])
    text = "calibration texts; a mix is one argument, uk=0.5,en=0.5 (default: ubertext)"
    several("calibration", text, default=["ubertext"])
    several("eval_data", "test texts (default: those of the calibration texts, else ubertext)")
    several("seeds", "seeds of the calibration windows (default: 0)", type=int, default=[0])
    about = "flag of main.py with a run for each value: nsamples=8,32, or on,off; can be repeated"
    vary = dict(action="append", default=[], metavar="FLAG=VALUE,...")
    parser.add_argument("--vary", help=about, **vary)
    parser.add_argument("--save_models", action="store_true", help="save every pruned model")
    parser.add_argument("--out", default="runs", help="folder of the runs (default: runs)")
    return parser


def plan(args: argparse.Namespace, passed_on: Sequence[str]) -> dict[str, list[str]]:
    """Return {name of a run: its flags of main.py}, model by model; all flags are checked."""
    from ...run.windows import default_tests  # imports torch, which a wrong flag does not need

    parser = build_parser()
    for flag in (word.split("=")[0] for word in passed_on):
        if flag.removeprefix("--") in named(set_by="sweep"):
            parser.error(str(UserError(f"{flag} after '--'", *SET_BY_SWEEP)))
    varied = [_values(given, passed_on) for given in args.vary]
    check_writable("--out", args.out)
    mixtures = [[one] if is_in_path(",", one) else one.split(",") for one in args.calibration]
    parsed = [parse_sources(parts, "--calibration", mixture=True) for parts in mixtures]
    sources = [source for mixture in parsed for source in mixture]
    names = _names(args.calibration, [mixture_name(mixture) for mixture in parsed])
    calibrations = dict(zip(names, mixtures, strict=True))
    tests = args.eval_data or default_tests(sources)
    parse_sources(tests, "--eval_data")
    folders = _names(args.models, [Path(model).resolve().name for model in args.models])
    passed_on = [*passed_on, *["--debug"] * args.debug]
    runs: dict[str, list[str]] = {}
    for model, parent in zip(args.models, folders, strict=True):
        for short, point in _points(args, calibrations, passed_on, varied):
            name = f"{parent}/{short}"
            if name in runs:
                fix = "Give no value twice"
                raise UserError(f"--out {args.out}", f"two runs would be {name}", fix)
            folder = str(Path(args.out, name))
            flags = ["--model", model, *point, "--eval_data", *tests, "--save", folder]
            of_run = parser.parse_args(flags)
            for output in named(output=True):
                if place := getattr(of_run, output):
                    flags += [f"--{output}", _place_of_run(output, Path(place), name)]
            if args.save_models and not of_run.eval_only:
                flags += ["--save_model", f"{folder}/model"]
            check_flags(parser, parser.parse_args(flags))
            runs[name] = flags
    return runs


def _place_of_run(output: str, place: Path, name: str) -> str:
    """Return a run's own place: FOLDER/NAME, or FOLDER/NAME/FILE of a flag that names a file."""
    is_file = next(flag.metavar for flag in FLAGS if flag.name == output) == "FILE"
    return str(place.parent / name / place.name if is_file else place / name)


def _values(given: str, passed_on: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Return (flag, its part of a run's name, its words for main.py) of each value of a --vary."""
    name, _, values = given.partition("=")
    name = name.removeprefix("--")
    option, defaults = f"--{name}", vars(build_parser().parse_args(["--model", "m"]))
    if mistake := retired([option]):
        raise mistake
    is_switch, problem = defaults.get(name) is False, None
    if name not in defaults or not values:
        problem, fix = "it is not a flag of main.py with values", "Give one, such as nsamples=8,32"
    elif name in named(set_by="sweep"):
        problem, fix = SET_BY_SWEEP
    elif option in (word.split("=")[0] for word in passed_on):
        problem, fix = f"{option} is also given after '--'", "Leave it out there"
    elif is_switch and not {*values.split(",")} <= {"on", "off"}:
        problem, fix = "it is a switch", f"Give {name}=on,off"
    if problem:
        raise UserError(f"--vary {given}", problem, fix)
    words = {value: [option, value] for value in values.split(",")}
    if is_switch:
        words = {value: [option] * (value == "on") for value in values.split(",")}
    texts = [f"{name}={value}" for value in words]
    parts = _names(texts, texts)
    return [(name, f"-{part}", each) for part, each in zip(parts, words.values(), strict=True)]


def _points(
    args: argparse.Namespace,
    calibrations: dict[str, list[str]],
    passed_on: Sequence[str],
    varied: Sequence[Sequence[tuple[str, str, list[str]]]],
) -> Iterator[tuple[str, list[str]]]:
    """Yield the dense runs, then every pruning: its name, and its flags besides the model.

    A dense run has no flag that changes the blocks, nor a value for each that only draws windows.
    """
    changing, drawing = named(changes=True), named(step="draw")
    of_dense = [v for v in varied if v[0][0] not in (*changing, *drawing)]
    for values in product(*of_dense):
        more, words = _joined(values)
        yield f"dense{more}", ["--eval_only", *without(passed_on, changing), *words]
    parser = build_parser()
    saved = ["--save_model", "saved"] * args.save_models  # for flags that require it
    names = dict(zip(args.methods, _names(args.methods, [*map(label, args.methods)]), strict=True))
    for method, kind in product(args.methods, args.types):
        if kind == NEURONS and method in WITHOUT_NEURONS:
            continue
        n, _, m = kind.partition(":")
        for ratio in [int(n) / int(m)] if m else args.ratios:
            share = f"{n}of{m}" if m else f"{100 * ratio:g}"
            name = f"{names[method]}-{share}" + f"-{kind}" * (kind in SMALLER)
            flags = ["--prune_method", method, "--sparsity_type", kind]
            flags += ["--sparsity_ratio", str(ratio), *passed_on]
            textless: set[str] = set()  # values without effect would repeat a run
            for values in product(*varied):
                words = [*flags, *_joined(values)[1], *saved]
                of_point = parser.parse_args(["--model", "any", *words])
                check_flags(parser, of_point)
                reads = of_point.reads_train
                more, words = _joined([v for v in values if reads or v[0] not in drawing])
                if not reads:  # no calibration text, no seed
                    if more not in textless:
                        yield f"{name}{more}", [*flags, *words]
                    textless.add(more)
                    continue
                for (text, parts), seed in product(calibrations.items(), args.seeds):
                    drawn = ["--seed", str(seed), "--calibration_data", *parts]
                    yield f"{name}{more}-{text}-seed{seed}", [*flags, *words, *drawn]


def _joined(values: Sequence[tuple[str, str, list[str]]]) -> tuple[str, list[str]]:
    """Return the additions of several varied flags to a run's name, and to its flags."""
    return "".join(part for _, part, _ in values), [word for *_, words in values for word in words]


def _names(texts: Sequence[str], short: Sequence[str]) -> list[str]:
    """Return names for folders: the short names, or the full texts if two are equal."""
    return [
        re.sub(r"[^\w.=+-]+", "_", name if short.count(name) == 1 else text).strip("_") or "_"
        for text, name in zip(texts, short, strict=True)
    ]


def run_all(
    runs: Mapping[str, Sequence[str]], out: str, report: Callable[[], int] | None = None
) -> None:
    """Run all unfinished runs, and report on all of `out` into it, or by a function of its own.

    Each run has the folder of its name in `out`, which is its `--save`. A run that fails does not
    stop the others. Raises UserError at the end for failed runs.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    print(f"{len(runs)} runs, each in a folder of {out}", flush=True)
    failed: list[str] = []
    seconds: list[float] = []  # of the runs that this sweep started
    if not (day := Path(out, DATE)).exists():
        write_text(day, str(date.today()))
    planned = Path(out, PLANNED)  # what `report` misses; another sweep in this folder adds its runs
    earlier = planned.read_text("utf-8").splitlines() if planned.exists() else []
    write_text(planned, "".join(f"{name}\n" for name in dict.fromkeys([*earlier, *runs])))
    dated = ["--date", day.read_text("utf-8")]
    shared = Path(out, SHARED)  # a killed sweep leaves it for the next one
    try:
        for index, (name, flags) in enumerate(runs.items()):
            folder = Path(out, name)
            left = sum(seconds) / max(1, len(seconds)) * (len(runs) - index)
            about = f", about {tqdm.format_interval(left)} left" if seconds else ""
            print(f"[{index + 1}/{len(runs)}] {name}{about}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            start = time.time()
            try:
                status = call("commands.sweep.run", shared, "--", *dated, *flags)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command continues") from None
            if status:
                failed.append(name)
                print(f"{folder}: failed with status {status}", flush=True)
            if status or (folder / RESULTS).stat().st_mtime >= start:
                seconds.append(time.time() - start)
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    status = report() if report else call("commands.report", out, "--out", out)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed",
            ", ".join(failed),
            "The same command tries them again",
        )
    if status:
        raise UserError(f"--out {out}", "the error above stopped the report", "All runs are kept")


def main(argv: list[str]) -> None:
    argv, passed_on = split_argv(argv)
    args = build_sweep_parser().parse_args(argv)
    run_all(plan(args, passed_on), args.out)
