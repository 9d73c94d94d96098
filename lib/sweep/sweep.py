"""Run many prunings: models x methods x types x ratios x calibration sets x seeds.

    python -m lib.sweep --models MODEL --calibration uk en uk=0.5,en=0.5 --seeds 0 1 2
        --out runs -- --nsamples 64 --device cpu

What follows `--` goes to every run of main.py. Each run has its own folder in `--out`. Finished
runs are kept, so that the same command continues after an interruption and retries failed runs.
Each model is read once. At the end come the table and pictures of lib/report/write.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lib.methods.registry import METHODS
from lib.methods.sparsity import NEURONS, RATIO_TYPES, TYPES
from lib.sweep.plan import Planned, plan
from lib.util import command
from lib.util.errors import UserError

EPILOG = "What follows -- goes to every run of main.py, such as: -- --nsamples 64 --device cpu"


def build_sweep_parser() -> argparse.ArgumentParser:
    """Build the parser of the sweep's own flags."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.sweep",
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


def sweep(argv: list[str], passed_on: list[str]) -> list[Planned]:
    """Run the sweep that `argv` describes, report on it, and return its runs.

    Raises UserError at the end if some runs failed.
    """
    parser = build_sweep_parser()
    args = parser.parse_args(argv)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out {args.out}: is a file; name a folder")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a sweep is one process; start main.py itself with several, run by run")
    planned = plan(args, passed_on)
    do_all(planned, args.out, args.debug)
    return planned


def do_all(planned: list[Planned], out: str, debug: bool) -> None:
    """Run what is not finished, and report on all runs in `out`.

    Raises UserError at the end if some runs failed.
    """
    from lib.sweep.runs import run_all

    with command.unfailing_output():  # a closed pipe stops no run
        failed = run_all(planned, debug)
    report(out)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(planned)} runs failed: {', '.join(failed)}; the same command "
            "tries them again"
        )


def report(out: str) -> None:
    """Write the table and pictures of all runs in `out`, of this sweep or an earlier one."""
    from lib.report.results import load_runs
    from lib.report.write import report_text, write_report

    runs = load_runs([out])
    print(f"\n{report_text(runs)}")
    for path in write_report(runs, out):
        print(f"wrote {path}", file=sys.stderr)


def main(argv: list[str]) -> None:
    own_argv, passed_on = command.split_argv(argv)
    sweep(own_argv, passed_on)
