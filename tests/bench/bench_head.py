"""Seconds of one window of evaluation, with few and with many positions in a product with the head.

    python tests/bench/bench_head.py MODEL [DTYPE]

Processor seconds on one thread, for 512 random tokens, the least of three: the blocks; losses from
logits in chunks that fit the cache; losses from logits in chunks of HEAD_POSITIONS; the head's
product alone, of all positions at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from lib import eval as evaluation
from lib.model.blocks import HEAD_POSITIONS, BlockRunner

TOKENS = 512
TIMES = 3


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds, the least of TIMES."""
    spent = []
    for _ in range(TIMES):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return round(min(spent), 3)


@torch.no_grad()
def main(name: str, dtype: str = "float32") -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval()
    runner = BlockRunner(model, torch.device("cpu"))
    rows = model.get_output_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    window = torch.randint(len(rows), (1, TOKENS), generator=draw)
    found = {"dtype": dtype, "vocabulary": len(rows), "tokens": TOKENS}
    found["blocks"] = seconds(lambda: runner.run_blocks([window], 1, "cpu"))
    (states,) = runner.run_blocks([window], 1, "cpu")
    for key, positions in (("losses, cache-sized chunks", 1), ("losses", HEAD_POSITIONS)):
        evaluation.HEAD_POSITIONS = positions
        found[key] = seconds(lambda: evaluation._figures(runner, states, slice(0, 1), None))
    hidden = states.hidden[0]
    found["product alone"] = seconds(lambda: hidden @ rows.T)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
