"""Make a model small for one language, in as many minutes as are given, by one command.

    bash launch.sh compress MODEL OUT --data uk [--minutes 30] [--for cpu|gpu|llama.cpp]

It measures the dense model, plans by what that took (lib/compress/plan.py), prints the main.py
command that the plan stands for and runs it: vocabulary, pruning, recovery, packing, evaluation,
saving. A table and a picture then compare both models.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import main as command_line
from lib.compress import plan
from lib.compress.measure import Figures, measured
from lib.report.markdown import escape, padded_table
from lib.report.results import Results
from lib.run.check import check
from lib.run.flag_checks import check_flags
from lib.run.flags import build_parser
from lib.util.command import add_debug_flag, split_argv
from lib.util.errors import UserError
from lib.util.files import check_output_folder, write_text
from lib.util.host import gib

ROOT = Path(__file__).resolve().parents[2]
TABLE, PICTURE = "compressed.md", "compressed.png"


def main(argv: list[str]) -> None:
    """Run the command; what follows `--` goes to main.py, after the flags of the plan."""
    own, passed_on = split_argv(argv)
    args = _parser().parse_args(own)
    if not args.minutes > 0:  # also refuses nan
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    check_output_folder("--save", args.save)
    target = args.target or (plan.GPU if args.device.startswith("cuda") else plan.CPU)
    start = time.perf_counter()
    shared = ["--device", args.device, *passed_on]  # later flags replace earlier ones
    tests = ["--eval_data", *(args.eval_data or args.data)]
    texts = ["--calibration_data", *args.data, *tests]

    # the whole plan is checked before the dense model is measured
    saving = ["--save", str(Path(args.save, "compressed")), "--save_model", args.out]
    checked = _checked([*_pruned(args.model, target, 10**9), *texts, *saving, *shared])

    shared = [*plan.windows(args.device, _longest(checked)), *shared]
    dense_flags = ["--model", args.model, "--eval_only", *tests]
    dense = _run([*dense_flags, "--save", str(Path(args.save, "dense")), *shared])
    settings = _parse([*dense_flags, *shared])
    budget = _budget(dense, args.minutes * 60 - (time.perf_counter() - start), settings)
    tokens = budget.recovery_tokens() if args.recover is None else args.recover
    if not tokens and args.recover is None:
        print(f"--minutes {args.minutes:g}: too short for a recovery, which is left out")
    compressed = _run([*_pruned(args.model, target, tokens), *texts, *saving, *shared])
    if target == plan.LLAMA_CPP:
        _convert(args)
    _report(args, dense, compressed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compress", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="hub id or local folder of a dense model")
    parser.add_argument("out", metavar="OUT", help="folder for the compressed model")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="SOURCE", help="texts, as --calibration_data"
    )
    parser.add_argument(
        "--eval_data", nargs="+", metavar="SOURCE", help="test texts (default: those of --data)"
    )
    parser.add_argument(
        "--minutes", type=float, default=30, help="time for all of it (default: 30)"
    )
    parser.add_argument(
        "--recover",
        type=int,
        metavar="TOKENS",
        help="train on so many, 0 for none (default: as many as --minutes leave time for)",
    )
    parser.add_argument(
        "--for",
        dest="target",
        choices=plan.TARGETS,
        help="where the model is to run (default: gpu with --device cuda:N, else cpu)",
    )
    parser.add_argument(
        "--device",
        default="cuda:0",
        help=f"where blocks are computed; on a CPU calibration takes {plan.CPU_WINDOWS} windows of "
        f"{plan.CPU_SEQLEN} tokens at most, unless flags after -- say otherwise",
    )
    parser.add_argument(
        "--save", default="out/compress", help="folder for table, picture and results.json"
    )
    add_debug_flag(parser)
    return parser


def _pruned(model: str, target: str, recovery_tokens: int) -> list[str]:
    return ["--model", model, *plan.flags(target, recovery_tokens)]


def _parse(flags: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(flags)


def _checked(flags: list[str]) -> argparse.Namespace:
    """Parse main.py's flags and refuse, in one line, what contradicts itself."""
    args = _parse(flags)
    check_flags(build_parser(), args)
    return args


def _longest(args: argparse.Namespace) -> int:
    """Return the tokens in a window of the model of main.py's flags, where none says how many."""
    from lib.model import pretrained
    from lib.model.access import Checkpoint

    checkpoint = Checkpoint(
        args.model, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    return pretrained.window_length(pretrained.load_config(checkpoint), None)


def _run(flags: list[str]) -> Results:
    """Run main.py with these flags, after its command was printed, and return results.json."""
    print(f"python main.py {shlex.join(flags)}", flush=True)
    return command_line.run(check(_checked(flags)))


def _budget(dense: Results, seconds: float, settings: argparse.Namespace) -> plan.Budget:
    tests = dense["evaluation"]
    tokens = sum(test["tokens"] for test in tests)
    return plan.Budget(
        seconds=seconds,
        tokens_per_second=tokens / max(dense["seconds"]["eval"], 1e-3),
        test_tokens=tokens,
        nsamples=settings.nsamples,
        seqlen=tests[0]["seqlen"],
    )


def _convert(args: argparse.Namespace) -> None:
    """Write OUT.gguf, proven on the test texts; UserError where the converter refuses."""
    out = f"{args.out.rstrip('/')}.gguf"
    command = ["-m", "lib.gguf", args.out, out, "--type", "q8_0"]
    command += ["--data", *(args.eval_data or args.data)]
    print(f"python {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT)
    if done.returncode:
        raise UserError(f"{out}: was not written, see above; the model is saved in {args.out}")


def _report(args: argparse.Namespace, dense: Results, compressed: Results) -> None:
    """Print the table that compares both models, and write it with the picture."""
    from lib.report.plots.bars import bars
    from lib.report.plots.style import can_draw, save_figure

    folder = Path(args.save)
    figures = measured([_local(args.model, args.device, dense), Path(args.out)], args.device)
    rows = _rows(dense, compressed, figures)
    text = padded_table(["", "dense", "compressed"], [row[:3] for row in rows])
    text += "".join(_completions(compressed))
    print(text)
    write_text(folder / TABLE, f"{text}\n")
    if can_draw():
        values = [row for row in rows if row[3]]
        figure = bars(
            names=["dense", "compressed"],
            panels={row[0].replace("on disk", "MB on disk"): row[3] for row in values},
            title=f"{Path(args.model).name}, compressed for {', '.join(dense['perplexity'])}",
        )
        save_figure(figure, folder / PICTURE)
        print(f"picture: {folder / PICTURE}")


def _local(model: str, device: str, dense: Results) -> Path:
    """Return the folder of a model that may be named by its hub id."""
    from transformers.utils import cached_file

    if Path(model).is_dir():
        return Path(model)
    return Path(cached_file(model, "config.json", cache_dir=dense["flags"]["cache_dir"])).parent


def _rows(
    dense: Results, compressed: Results, figures: list[Figures]
) -> list[tuple[str, str, str, list[float] | None]]:
    """Return (measure, dense, compressed, the two numbers for the picture if they are drawn)."""
    sizes = [each["bytes"] for each in figures]
    memory = [each["memory"] for each in figures]
    speeds = [each["tokens_per_second"] for each in figures]
    rows: list[tuple[str, str, str, list[float] | None]] = [
        ("on disk", *map(gib, sizes), [size / 1e6 for size in sizes]),
        ("memory", *map(gib, memory), None),
        ("tokens a second", *(f"{speed:.1f}" for speed in speeds), speeds),
    ]
    for before, after in zip(dense["evaluation"], compressed["evaluation"], strict=True):
        bits = [before["bits_per_byte"], after["bits_per_byte"]]
        name = before["name"]
        rows.append((f"bits per byte, {name}", *(f"{value:.4f}" for value in bits), bits))
        if "kl" in after:
            rows.append((f"KL to dense, {name}", "", f"{after['kl']:.4f} nats", None))
            share = f"{after['top1_agreement']:.1%}"
            rows.append((f"same first choice as dense, {name}", "", share, None))
    return rows


def _completions(results: dict[str, Any]) -> list[str]:
    """Return the prompts with both completions, as Markdown."""
    return [
        f"\n\n> {escape(each['prompt'])} …\n>\n> dense: {escape(each.get('dense', ''))}\n>\n"
        f"> compressed: {escape(each.get('model', ''))}"
        for each in results.get("completions", [])
    ]
