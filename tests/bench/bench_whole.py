"""The whole tool on one model: dense, trimmed, pruned, recovered, packed at 16, 8 and 4 bits.

    python tests/bench/bench_whole.py MODEL --data uk --out whole -- --device cpu
    python tests/bench/bench_whole.py MODEL --data uk --out whole --picture .github/images/whole.png

Each stage is a run of main.py on what the stage before has saved: `--out` keeps models and results,
and the same command goes on where it was. Then one token after another is decoded by every stage's
model in turn, and a table and a picture tell bytes on disk, bits per byte and tokens a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from stages import Stage, do
from transformers import AutoModelForCausalLM

import lib.sparse  # noqa: F401  the packed form is known to transformers
from lib.compress.measure import decoding_speed, disk_size
from lib.report.markdown import padded_table
from lib.report.plots.bars import bars
from lib.report.plots.style import save_figure
from lib.report.results import load_runs
from lib.run.flags import build_parser
from lib.util.command import add_debug_flag, run, split_argv
from lib.util.host import gib
from lib.util.progress import quiet

PANELS = ("MB on disk", "bits per byte", "tokens a second")


def stages(model: str, data: Sequence[str], folder: Path, tokens: int) -> list[Stage]:
    """In their order; each works on what one before it has saved."""
    names = ("trimmed", "pruned", "recovered", "packed-16", "packed-8", "packed-4")
    saved = {name: str(folder / name / "model") for name in names}
    train = ["--calibration_data", *data]

    def packed(bits: int) -> list[str]:
        flags = ["--model", saved["recovered"], "--replace_sparse_layers", "--pack_bits", str(bits)]
        return flags if bits == 16 else [*flags, "--pack_embeddings", "8", *train]

    prune = ["--model", saved["trimmed"], "--prune_method", "admm", "--allocation", "error", *train]
    again = ["--model", saved["pruned"], "--teacher", saved["trimmed"], *train]
    trim = ["--model", model, "--trim_vocabulary", "--vocabulary_data", *data]
    flags = {
        "dense": ("dense", ["--model", model, "--eval_only"]),
        "trimmed": ("+ vocabulary trimmed", trim),
        "pruned": ("+ half pruned by admm", prune),
        "recovered": (f"+ recovered, {tokens:,} tokens", [*again, "--recover", str(tokens)]),
        "packed-16": ("+ packed, 16 bits", [*packed(16), "--eval_only"]),
        "packed-8": ("+ packed, 8 bits, embedding too", packed(8)),
        "packed-4": ("+ packed, 4 bits, embedding 8", packed(4)),
    }
    made = []
    for name, (heading, own) in flags.items():
        rest = ["--eval_data", *data]
        rest += ["--save_model", saved[name]] if name in saved else []
        made.append(Stage(name, heading, [*own, *rest]))
    return made


def speeds(folders: Sequence[Path], device: str, rounds: int) -> list[float]:
    """Median tokens a second of each model, in turn, in the dtype that it was saved in."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        for folder in folders
    ]
    found = [[] for _ in models]
    for turn in range(rounds + 1):  # the first does not count
        for times, model in zip(found, models, strict=True):
            speed = decoding_speed(model)
            if turn:
                times.append(speed)
    return [sorted(times)[rounds // 2] for times in found]


def report(args: argparse.Namespace, done: Sequence[Stage], device: str) -> None:
    """Table on the terminal and in a file, and the picture."""
    folders = [Path(args.model) if s.name == "dense" else args.out / s.name / "model" for s in done]
    runs = {run.folder.name: run for run in load_runs([args.out / stage.name for stage in done])}
    tests = list(runs[done[0].name].tests)
    per_second = speeds(folders, device, args.rounds)
    sizes = [disk_size(folder) for folder in folders]
    bits: list[list[float]] = [
        [runs[stage.name].tests[test]["bits_per_byte"] for test in tests] for stage in done
    ]
    head = ["", "on disk", *(f"{test}: bits per byte" for test in tests), "tokens a second"]
    body = [
        [stage.heading, gib(size), *(f"{value:.4f}" for value in its), f"{speed:.0f}"]
        for stage, size, its, speed in zip(done, sizes, bits, per_second, strict=True)
    ]
    text = padded_table(head, body)
    print(text)
    (args.out / "whole.md").write_text(text + "\n", "utf-8")
    columns: list[Any] = [[size / 1e6 for size in sizes], [its[0] for its in bits], per_second]
    names = [stage.heading for stage in done]
    picture = args.picture or args.out / "whole.png"
    panels = dict(zip(PANELS, columns, strict=True))
    save_figure(bars(names, panels, f"{Path(args.model).name}, for {tests[0]}"), picture)
    print(f"picture: {picture}")


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
    parser.add_argument("--picture", type=Path, help="where it goes (default: into --out)")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args = parser.parse_args(own)
    quiet()
    planned = stages(args.model, args.data, args.out, args.recover)
    names = [stage.name for stage in planned]
    if args.last and args.last not in names:
        parser.error(f"--last {args.last}: no such stage; there are {', '.join(names)}")
    planned = planned[: names.index(args.last) + 1] if args.last else planned
    for stage in planned:
        do(stage, args.out, passed_on)
    device = build_parser().parse_args([*planned[0].flags, *passed_on]).device
    report(args, planned, device)


if __name__ == "__main__":
    sys.exit(run(main))
