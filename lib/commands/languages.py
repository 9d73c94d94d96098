"""Compare which weights, neurons or experts each language needs, by pruning the model on each.

    bash launch.sh languages MODEL SOURCE SOURCE [SOURCE ...] [--method wanda] [--out FOLDER]

It prunes MODEL once for each calibration set, and once more with another seed, which shows how much
of a difference is chance. Then it measures how far the masks overlap (overlap.py). What follows
`--` goes to every run of main.py; finished runs are kept, as in sweep.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lib.commands import sweep
from lib.commands.process import call
from lib.methods.registry import EXPERT_METHODS, METHODS, method_of
from lib.methods.sparsity import TYPES, UNSTRUCTURED
from lib.util import command
from lib.util.errors import UserError


def main(argv: list[str]) -> None:
    argv, passed_on = command.split_argv(argv)
    parser = command.Parser(
        "languages",
        description=__doc__.split("\n")[0],
        epilog=sweep.EPILOG,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id or local folder")
    add("first", metavar="SOURCE", help="a calibration set")
    add("others", nargs="+", metavar="SOURCE", help="what to compare it with")
    add("--method", choices=(*METHODS, *EXPERT_METHODS), default="wanda", help="how to prune")
    add("--type", choices=TYPES, default=UNSTRUCTURED, help="sparsity type")
    add("--ratio", default="0.5", help="share, if not N:M")
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="X", help="of the drawn windows")
    add("--out", default="languages", help="folder for the runs and the files")
    command.add_debug_flag(parser)
    args = parser.parse_args(argv)
    if not method_of(args.method).observes:
        parser.error(f"--method {args.method}: looks at no text; use another one")
    sweep_argv = ["--models", args.model, "--methods", args.method, "--types", args.type]
    sweep_argv += ["--ratios", args.ratio, "--calibration", args.first, *args.others]
    sweep_argv += ["--seeds", *map(str, args.seeds), "--out", args.out, "--save_models"]
    runs = sweep.sweep([*sweep_argv, *["--debug"] * args.debug], passed_on)
    first, *others = (
        [run.folder for run in runs if run.name.endswith(f"-seed{seed}")] for seed in args.seeds
    )
    noise, out = ["--noise", *others[0]] if others else [], Path(args.out, "overlap")
    if call("lib.commands.overlap", *first, *noise, "--out", out):
        raise UserError(f"{out}: was not written, see above; the pruned models are kept")


if __name__ == "__main__":
    sys.exit(command.run(main))
