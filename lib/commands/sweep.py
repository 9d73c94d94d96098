"""Run many prunings: models x methods x types x ratios x calibration sets x seeds.

    python -m lib.commands.sweep --models MODEL --calibration uk en uk=0.5,en=0.5 --seeds 0 1 2
        --out runs -- --nsamples 64 --device cpu

What follows `--` goes to every run of main.py. Each run is a process of its own and has its own
folder in `--out` (see sweep_run.py). Finished runs are kept, so that the same command continues
after an interruption and retries failed runs. At the end comes the report on all runs.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tqdm import tqdm

from lib.commands.process import call
from lib.commands.sweep_run import FINISHED, OUTPUT, read_json
from lib.data.sources import mixture_name, parse_sources
from lib.methods.registry import METHODS
from lib.methods.sparsity import NEURONS, RATIO_TYPES, TYPES, UNSTRUCTURED
from lib.run.flags import build_parser, check_flags, reads_train
from lib.run.results import ERROR, RESULTS, write_results
from lib.run.texts import default_tests
from lib.util import command
from lib.util.errors import UserError

EPILOG = "What follows -- goes to every run of main.py, such as: -- --nsamples 64 --device cpu"
OWN_FLAGS = {  # of main.py, which the sweep sets
    *("--model", "--seed", "--calibration_data", "--prune_on_c4", "--eval_data", "--eval_only"),
    *("--prune_method", "--sparsity_ratio", "--sparsity_type", "--save", "--save_model"),
}
PRUNING_FLAGS = (  # of main.py, which a run of the dense model goes without
    *("allocation", "use_variant", "replace_sparse_layers", "pack_bits"),
    *("recover", "recover_rank", "recover_rate", "recover_ce", "resume"),
)


@dataclass(frozen=True)
class Run:
    """One run of main.py: its name, its folder, its flags and what they parse to."""

    name: str
    folder: Path
    flags: list[str]
    args: argparse.Namespace


def build_sweep_parser() -> argparse.ArgumentParser:
    """Build the parser of the sweep's own flags."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.commands.sweep",
        description=__doc__.split("\n")[0],
        epilog=EPILOG,
        allow_abbrev=False,
    )
    list_options = dict(nargs="+", metavar="X")
    parser.add_argument("--models", required=True, **list_options, help="hub ids or local folders")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="default: all"
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=TYPES,
        default=[kind for kind in TYPES if kind != NEURONS],
        help=f"default: all but {NEURONS}",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        default=[0.5],
        **list_options,
        help=f"shares to drop where the type is {' or '.join(RATIO_TYPES)}; N:M has its own "
        "(default: 0.5)",
    )
    parser.add_argument(
        "--calibration",
        default=["ubertext"],
        **list_options,
        help="calibration sets, as --calibration_data of main.py; a mixture is one argument, "
        "uk=0.5,en=0.5 (default: ubertext)",
    )
    parser.add_argument(
        "--eval_data",
        **list_options,
        help="test sets, every run is measured on all of them (default: the test texts of "
        "the calibration folders, else ubertext)",
    )
    parser.add_argument("--seeds", type=int, default=[0], **list_options, help="default: 0")
    parser.add_argument("--save_models", action="store_true", help="keep every pruned model")
    parser.add_argument("--out", default="runs", help="folder of the run folders (default: runs)")
    command.add_debug_flag(parser)
    return parser


def sweep(argv: list[str], passed_on: Sequence[str]) -> list[Run]:
    """Run the sweep that `argv` describes, report on it, and return its runs.

    Raises UserError at the end if some runs failed.
    """
    args = build_sweep_parser().parse_args(argv)
    runs = plan(args, passed_on)
    run_all(runs, args.out)
    return runs


# --- which runs there are


def plan(args: argparse.Namespace, passed_on: Sequence[str]) -> list[Run]:
    """Return the runs of a sweep in the order in which they are done, model by model.

    Exits with status 2 for flags that main.py refuses in one of the runs; raises UserError for
    sources that make no sense.
    """
    parser = build_parser()
    for flag in (word.split("=")[0] for word in passed_on):
        if flag in OWN_FLAGS:
            parser.error(f"{flag} after '--': the sweep sets it; use the sweep's own flags")
    fixed = [kind for kind in args.types if kind not in RATIO_TYPES]
    if fixed == args.types and set(args.ratios) - {_share(kind) for kind in fixed}:
        given = " ".join(map(str, args.ratios))
        parser.error(f"--ratios {given}: N:M types have their own; add --types {UNSTRUCTURED}")
    mixtures = [_split(text) for text in args.calibration]
    sources = [parse_sources(parts, "--calibration", mixture=True) for parts in mixtures]
    names = _names(args.calibration, map(mixture_name, sources))
    folders = _names(args.models, (Path(model).resolve().name for model in args.models))
    tests = args.eval_data or default_tests([source for mixture in sources for source in mixture])
    parse_sources(tests, "--eval_data")
    texts = list(dict.fromkeys(source.text for mixture in sources for source in mixture))
    calibrations = dict(zip(names, mixtures, strict=True))
    runs: dict[str, Run] = {}
    for model, parent in zip(args.models, folders, strict=True):
        for short, point in _points(args, calibrations, passed_on):
            name = f"{parent}/{short}"
            if name in runs:
                raise UserError(f"--out {args.out}: two runs would be {name}; give no value twice")
            folder = Path(args.out) / name
            flags = ["--model", model, *point, "--eval_data", *tests, "--save", str(folder)]
            if args.save_models and "--prune_method" in point:
                flags += ["--save_model", str(folder / "model")]
            parsed = parser.parse_args(flags)
            if parsed.trim_vocabulary and not parsed.vocabulary_data:
                flags += ["--vocabulary_data", *texts]  # only runs of the same tokens compare
            if parsed.resume:  # each run keeps its finished blocks apart
                flags += ["--resume", str(Path(parsed.resume) / name)]
            parsed = parser.parse_args(flags + ["--debug"] * args.debug)
            check_flags(parser, parsed)
            runs[name] = Run(name, folder, flags + ["--debug"] * args.debug, parsed)
    return list(runs.values())


def for_dense(passed_on: Sequence[str]) -> list[str]:
    """Return the flags of main.py without those that are for prunings alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in PRUNING_FLAGS:
        parser.add_argument(f"--{name}", nargs="*")
    return parser.parse_known_args(passed_on)[1]


def _points(
    args: argparse.Namespace, calibrations: dict[str, list[str]], passed_on: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the dense run, then every pruning: its name, and its flags besides the model.

    A pruning that reads no calibration text depends on no set and no seed: it is run once.
    """
    yield "dense", ["--eval_only", *for_dense(passed_on)]
    for method, kind in product(args.methods, args.types):
        for ratio in args.ratios if kind in RATIO_TYPES else [_share(kind)]:
            share = f"{100 * ratio:g}" if kind in RATIO_TYPES else kind.replace(":", "of")
            share += f"-{NEURONS}" if kind == NEURONS else ""
            name = f"{method}-{share}"
            flags = ["--prune_method", method, "--sparsity_type", kind]
            flags += ["--sparsity_ratio", str(ratio), *passed_on]
            if not reads_train(build_parser().parse_args(["--model", "any", *flags])):
                yield name, flags
                continue
            for (text, parts), seed in product(calibrations.items(), args.seeds):
                drawn = ["--seed", str(seed), "--calibration_data", *parts]
                yield f"{name}-{text}-seed{seed}", [*flags, *drawn]


def _share(kind: str) -> float:
    n, m = map(int, kind.split(":"))
    return n / m


def _split(text: str) -> list[str]:
    """Split `uk=0.5,en=0.5` into two sources; a path that exists stays whole."""
    return [text] if Path(text).expanduser().exists() else text.split(",")


def _names(texts: Sequence[str], short: Iterable[str]) -> list[str]:
    """Return names for folders: the short names, or the whole texts if two are the same."""
    short = list(short)
    return [
        re.sub(r"[^\w.=+-]+", "_", name if short.count(name) == 1 else text).strip("_") or "_"
        for text, name in zip(texts, short, strict=True)
    ]


# --- running them


def run_all(runs: Sequence[Run], out: str, report: str | None = None) -> None:
    """Run what is not finished, and report on all runs into the folder `report`, by default `out`.

    A run that fails leaves its reason in its error.json and does not stop the others. Raises
    UserError before the first run for folders that no sweep made, and at the end for failed runs.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a sweep is one process; start main.py itself with several, run by run")
    _check_folders(runs, out)
    Path(out).mkdir(parents=True, exist_ok=True)
    print(f"{len(runs)} runs, each in a folder of {out}", flush=True)
    failed, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="dense-", dir=out) as shared:
        for index, run in enumerate(runs, 1):
            start = time.perf_counter()
            outcome = _do(run, shared)
            spent = time.perf_counter() - start
            line = f"[{index}/{len(runs)}] {run.name}: {outcome}"
            if outcome != FINISHED:
                seconds.append(spent)
                line += f"; {spent:.0f} s"
            if seconds and index < len(runs):
                left = sum(seconds) / len(seconds) * (len(runs) - index)
                line += f", about {tqdm.format_interval(left)} left"
            print(line, flush=True)
            failed += [run.name] if (run.folder / ERROR).is_file() else []
    done = [run.folder for run in runs if (run.folder / RESULTS).is_file()]
    folders = done if report or not done else [out]  # with what earlier sweeps have left there
    status = call("lib.commands.report", *folders, "--out", report or out)[0] if folders else 0
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the same command "
            "tries them again"
        )
    if status:
        raise UserError(f"the report on {out} was not written, see above")


def _check_folders(runs: Sequence[Run], out: str) -> None:
    """Raise UserError where a run's folder is not one that a sweep has made."""
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    for run in runs:
        names = sorted(path.name for path in run.folder.glob("*"))
        if names and OUTPUT not in names:
            raise UserError(
                f"--out {out}: {run.name} holds {names[0]}, but no {OUTPUT} of a sweep; name "
                "another folder"
            )


def _do(run: Run, shared: str) -> str:
    """Run one run in a process of its own, and say how it ended in a few words."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / OUTPUT).touch()  # the mark of a folder of a sweep
    (run.folder / ERROR).unlink(missing_ok=True)
    status, out = call("lib.commands.sweep_run", shared, "--", *run.flags, capture=True)
    if status == 0 and out.endswith(f"{FINISHED}\n"):
        return FINISHED
    for line in out.splitlines():
        print(f"{run.name}: {line}", flush=True)
    if status == 0:
        figures = read_json(run.folder / RESULTS).get("perplexity", {})
        return ", ".join(f"{name} {value or math.nan:.2f}" for name, value in figures.items())
    if not (run.folder / ERROR).is_file():
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        write_results(run.folder, {"error": f"its process ended with {ended}"}, ERROR)
    return f"failed: {read_json(run.folder / ERROR)['error']}"


def main(argv: list[str]) -> None:
    own_argv, passed_on = command.split_argv(argv)
    sweep(own_argv, passed_on)


if __name__ == "__main__":
    sys.exit(command.run(main))
