"""What compress plans: what is removed, how long is trained, on how many windows is measured."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.data.chats import Dialogue, row_of
from lib.data.documents import PIECE_CHARACTERS, pieces_of, read_documents
from lib.methods.sparsity import EXPERTS
from lib.util.errors import UserError
from lib.util.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from lib.run.job import Job

LEAST_WINDOWS = 16  # of training, which take less time than rounding on calibration text
LEAST_TESTS, TEST_SHARE = 4, 0.15  # windows to measure on, and their part of the time

# costs in passes of one window through the trimmed model
TEST_PASSES = 6  # of a test window: both models, before and after, and the proof by llama.cpp
PRUNING_PASSES = 7  # of a calibration window: ADMM's passes and solving, allocation
HELD_OUT_PASSES = 13  # of a window held out of training
FIXED = 7  # times a rehearsal's loading and generating, for both models, proof and speeds

BLOCK_BYTES, OUTER_BYTES = 18 / 32, 34 / 32  # of a weight in q4_0, and in q8_0
TOKEN_BYTES = 40  # of a token in a GGUF file, about: its text, merge and score


def plan_time(
    rehearsal: dict[str, Any], wall: float, left: float, most: int, passes: int
) -> tuple[int, int, float]:
    """Return windows to measure on, tokens to train on, few at least, and seconds they will take.

    `rehearsal` are the results of a small run, which took `wall` seconds; of `left` seconds all
    that follows is to be done. The test text has `most` windows; pruning takes so many `passes` of
    one.
    """
    from lib.data.training import HELD_OUT, HELD_OUT_SHARE

    spent, recovery, size = rehearsal["seconds"], rehearsal["recovery"], rehearsal["footprint"]
    seqlen, held_out = rehearsal["evaluation"][0]["seqlen"], recovery["text"]["held_out"]
    scaling = sum(spent[step] for step in ("dense", "measure before", "recover", "eval"))
    passed = spent["measure before"] / held_out  # seconds of a pass
    training = spent["recover"] - len(recovery["curve"]) * held_out * passed
    training = max(3 * passed, training * seqlen / recovery["tokens"])  # seconds of a window
    tested = (TEST_PASSES + size["before"] / size["after"]) * passed
    windows = min(most, max(LEAST_TESTS, int(TEST_SHARE * left / tested)))
    rest = FIXED * (wall - scaling) + windows * tested + passes * passed
    for held_out in range(HELD_OUT[1], HELD_OUT[0] - 1, -1):  # the fewer, the less is trained on
        fixed = rest + HELD_OUT_PASSES * held_out * passed
        trained = max(LEAST_WINDOWS, int((left - fixed) / training))
        if held_out <= HELD_OUT_SHARE * trained:
            break
    return windows, trained * seqlen, fixed + trained * training


def choose_size(job: Job, megabytes: float | None) -> tuple[str | None, str]:
    """Return the share of experts or neurons that a q4_0 file of `megabytes` needs to lose, if any.

    And the plan in words. Raises UserError where the blocks have too few.
    """
    from lib.model.pretrained import checkpoint_dtype, skeleton_with
    from lib.pruning.experts import fewest
    from lib.pruning.neurons import multiple_of

    def blocks(model: Any) -> list[Tensor]:
        return list(model.get_submodule(job.blocks_name).parameters())

    def nbytes(weight: Tensor) -> float:  # norms, biases, rows of no whole blocks: 16 bits
        held = weight.dim() > 1 and weight.shape[-1] % 32 == 0
        return weight.numel() * (BLOCK_BYTES if held else 2)

    model, layout, embedding = job.skeleton, job.layout, job.skeleton.get_input_embeddings()
    weights, rows = sum(p.numel() for p in model.parameters()), len(job.vocabulary.rows)
    outer = (weights - sum(p.numel() for p in blocks(model))) / embedding.num_embeddings
    summary, counts = f"{rows:,} of {embedding.num_embeddings:,} rows of the vocabulary, ", [0]
    if layout:
        mixture = layout.kind == EXPERTS
        step = layout.groups if mixture else multiple_of(layout.count)
        least = fewest(layout) if mixture else step
        counts = [layout.count, *range((layout.count - 1) // step * step, least - 1, -step)]
    for left in counts:
        if left < counts[0]:
            model = skeleton_with(job.config, layout.field, left, job.checkpoint)
        size = sum(map(nbytes, blocks(model))) + rows * (outer * OUTER_BYTES + TOKEN_BYTES)
        if (size := size / 1e6) <= (megabytes or math.inf):
            break
    cut = left < counts[0]
    kept = f"{left} of {layout.count} {layout.kind} in each block" if cut else "nothing pruned"
    dense = weights * checkpoint_dtype(job.config).itemsize / 1e6
    summary += f"{kept}, about {size:.3g} MB as q4_0 of {dense:.3g} MB, "
    if megabytes and size > megabytes:
        problem = f"--megabytes {megabytes}: {summary}which is the least"
        raise UserError(f"{problem}; give more, or take a smaller model")
    return (f"{1 - left / counts[0]:.6g}" if cut else None), summary


def cut_tests(job: Job, folder: Path, share: float) -> list[str]:
    """Write a share of each test text, about two windows at least; return the files' names."""
    from lib.data.windows import test_documents

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for source, test in zip(job.tests, job.texts.tests, strict=True):
        texts = list(test_documents(source, read_documents(source, "test")[0]))
        random.Random(0).shuffle(texts)
        left = math.ceil(test.bytes * max(share, 2 / len(test.windows)))
        files.append(str(folder / (re.sub(r"[^\w.-]+", "_", test.name) + ".jsonl")))
        lines = []
        while left > 0 and texts:
            text = texts.pop()
            whole = isinstance(text, Dialogue) or len(text) <= PIECE_CHARACTERS
            if len(text.encode()) > left and not whole:
                texts += reversed(pieces_of(text))  # by which training leaves them out
                continue
            left -= len(text.encode())
            row = row_of(text, job.args.column)  # for gguf and for main.py
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(Path(files[-1]), "".join(lines))
    return files
