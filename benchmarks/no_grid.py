"""Make a checkpoint whose weights lie on no grid, of one whose weights come from a 4-bit file.

    python benchmarks/no_grid.py MODEL NEW [--file FILE.gguf] -- --calibration_data en \\
        --seqlen 512 --recover 32768 --device cpu

Uniform noise, as wide as the file's own step, is added to each weight of the blocks; then main.py
trains all of them, with MODEL as teacher. A step is the least distance of two values in 16 inputs
that follow each other, since types of GGUF files have at least so many with one step. `--file`: the
GGUF file, if MODEL holds its values only rounded to 16 bits. NEW is saved in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gguf_weights import matrices_of

import main as command
from lib.model.blocks import BlockRunner
from lib.model.sparsity_check import SparsityCheck
from lib.run import steps
from lib.run.check import check
from lib.run.flags import build_parser, check_flags
from lib.run.run import Run
from lib.util.cli import add_debug_flag, run, split_argv

GROUP = 16  # inputs
LIMIT = 1.01  # of perplexity, relative to MODEL's


def add_noise_(file: Path | None, job: Run, runner: BlockRunner) -> SparsityCheck:
    """Add the noise, and return the shares of zeros, as a step of main.py."""
    exact = matrices_of(file, Path(job.flags.model)) if file else {}
    generator, changes = torch.Generator().manual_seed(job.flags.seed), []
    for linear in runner.each_linear():
        weight = linear.matrix()
        groups = exact.get(linear.parameter_name, weight).reshape(-1, GROUP)
        steps_ = groups.sort(1).values.diff()
        steps_ = steps_.masked_fill_(steps_ == 0, torch.inf).amin(1, keepdim=True)
        steps_.masked_fill_(steps_.isinf(), 0)
        noise = (torch.rand(groups.shape, generator=generator) - 0.5) * steps_
        changes.append(noise.norm() / groups.norm())
        linear.set_weight_(weight + noise.view_as(weight))
    print(f"noise: {float(torch.stack(changes).mean()):.2%} of the weights' norm", flush=True)
    return SparsityCheck(runner)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="local folder")
    parser.add_argument("new", metavar="NEW", help="new folder")
    parser.add_argument("--file", type=Path, metavar="FILE.gguf")
    add_debug_flag(parser)
    own, passed_on = split_argv(argv)
    args, parser = parser.parse_args(own), build_parser()
    flags = ["--model", args.model, "--save_model", args.new, "--save", f"{args.new}-results"]
    flags = parser.parse_args([*flags, *passed_on])
    check_flags(parser, flags)
    job = check(flags)
    job.model = replace(job.model, save_dtype=torch.bfloat16)
    with mock.patch.object(steps, "prune", partial(add_noise_, args.file)):
        results = command.run(job)
    for test in results["evaluation"] if flags.recover else ():  # else there is no MODEL beside it
        ratio = test["perplexity"] / test["dense"]["perplexity"]
        print(f"{test['name']}: perplexity {ratio - 1:+.2%}, {'near' if ratio <= LIMIT else 'far'}")


if __name__ == "__main__":
    sys.exit(run(main))
