"""main.py whose quantizer knows an importance matrix alone, to split its gain.

    python benchmarks/no_feedback.py --model MODEL --quantize q4_0 ... [no_text]

The off-diagonal sums of products of inputs are 0, and so is the error of the inputs that earlier
rounding has caused. What is left are scales fitted to weights by the mean squares of their inputs,
and rounding to the nearest. `no_text` as the last word: these means are 1, weights alone decide.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import main as command
from lib.methods.gptq import GPTQ
from lib.util.cli import run

problem = GPTQ.problem


def without_feedback(self: GPTQ, weights: Any) -> tuple:
    start, _, hessian, norms, share = problem(self, weights)
    diagonal = hessian.diagonal()
    return start, start * diagonal[:, None], torch.diag(diagonal), norms, share


def without_text(self: GPTQ, weights: Any) -> tuple:
    start, _, hessian, norms, share = problem(self, weights)
    start = start / norms
    return start, start.clone(), torch.eye(len(hessian)), torch.ones_like(norms), share


def main(argv: list[str]) -> None:
    less = without_text if argv[-1:] == ["no_text"] else without_feedback
    argv = argv[: -1 if less is without_text else None]
    with mock.patch.object(GPTQ, "problem", less):
        command.main(argv)


if __name__ == "__main__":
    sys.exit(run(main))
