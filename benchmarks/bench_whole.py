"""The whole tool on one model: dense, trimmed, pruned, recovered, packed at 16 and at 4 bits.

    python benchmarks/bench_whole.py MODEL --data uk --out whole -- --device cpu

Each stage is a run of main.py on what the stage before has saved, or on what `trim` writes: `--out`
keeps models and results, and the same command goes on where it was. Then one token after another
is decoded by every stage's model in turn, and a table tells bytes on disk, bits per byte and tokens
a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import decoding_speeds
from stages import Stage, do

from lib.commands.compress.measure import disk_size
from lib.commands.trim.__main__ import main as trim
from lib.model.device import pick_device
from lib.run.flags import build_parser
from lib.run.results import read_results
from lib.util.cli import add_debug_flag, run, split_argv
from lib.util.host import gib
from lib.util.markdown import padded_table
from lib.util.progress import quiet


def stages(model: str, data: Sequence[str], folder: Path, tokens: int) -> list[Stage]:
    """Return the stages in their order; each works on what one before it has saved."""
    saved = {name: str(folder / name / "model") for name in ("trimmed", "pruned", "recovered")}
    train, pack = ["--calibration_data", *data], ["--model", saved["recovered"]]
    pack += ["--replace_sparse_layers"]
    prune = ["--model", saved["trimmed"], "--prune_method", "admm", "--allocation", "error", *train]
    again = ["--model", saved["pruned"], "--teacher", saved["trimmed"], *train]
    flags = {
        "dense": ("dense", ["--model", model, "--eval_only"]),
        "trimmed": ("+ vocabulary trimmed", ["--model", saved["trimmed"], "--eval_only"]),
        "pruned": ("+ half pruned by admm", prune),
        "recovered": (f"+ recovered, {tokens:,} tokens", [*again, "--recover", str(tokens)]),
        "packed-16": ("+ packed, 16 bits", [*pack, "--eval_only"]),
        "packed-4": ("+ packed, 4 bits, embedding 8", [*pack, "--quantize", "int4", *train]),
    }
    made = []
    for name, (heading, own) in flags.items():
        kept = name in ("dense", "trimmed")
        target = [] if kept else ["--save_model", str(folder / name / "model")]
        made.append(Stage(name, heading, [*own, "--eval_data", *data, *target]))
    return made


def report(args: argparse.Namespace, done: Sequence[Stage], device: str) -> None:
    """Print the table and write it into `--out`."""
    folders = [Path(args.model) if s.name == "dense" else args.out / s.name / "model" for s in done]
    evaluations = [read_results(args.out / stage.name)["evaluation"] for stage in done]
    sizes = [disk_size(folder) for folder in folders]
    tests = [test["name"] for test in evaluations[0]]
    body = [
        [
            stage.heading,
            gib(size),
            *(f"{test['bits_per_byte']:.4f}" for test in its),
            f"{speed:.0f}",
        ]
        for stage, size, its, speed in zip(
            done, sizes, evaluations, decoding_speeds(folders, device, args.rounds), strict=True
        )
    ]
    head = ["", "on disk", *(f"{test}: bits per byte" for test in tests), "tokens a second"]
    text = padded_table(head, body)
    print(text)
    (args.out / "whole.md").write_text(text + "\n", "utf-8")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="local folder of a dense model")
    parser.add_argument(
        "--data", nargs="+", required=True, help="folders of texts, a language each"
    )
    parser.add_argument("--out", type=Path, default=Path("whole"), help="models and results")
    parser.add_argument("--recover", type=int, default=300_000, help="tokens of recovery")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding, all models in turn")
    parser.add_argument("--last", help="name of the last stage to do, such as recovered")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args = parser.parse_args(own)
    quiet()
    planned = stages(args.model, args.data, args.out, args.recover)
    names = [stage.name for stage in planned]
    if args.last and args.last not in names:
        parser.error(f"--last {args.last}: no such stage; there are {', '.join(names)}")
    planned = planned[: names.index(args.last) + 1] if args.last else planned
    small = args.out / "trimmed" / "model"
    if not small.is_dir():
        trim([args.model, str(small), "--data", *args.data])
    for stage in planned:
        do(stage, args.out, passed_on)
    device = build_parser().parse_args([*planned[0].flags, *passed_on]).device
    report(args, planned, device or str(pick_device(None)))


if __name__ == "__main__":
    sys.exit(run(main))
