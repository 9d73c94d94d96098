"""What compress plans: what is removed, how long is trained, on how many windows is measured."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.data.chats import Dialogue, row_of
from lib.data.documents import PIECE_CHARACTERS, pieces_of, read_documents
from lib.methods.sparsity import EXPERTS
from lib.util.errors import UserError
from lib.util.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from lib.run.job import Job

REHEARSED_ROUNDING = 2  # windows, on which the rehearsal rounds
LEAST_ROUNDING, ROUNDING_SHARE = 8, 0.25  # windows to round on, and at most that part of the time
LEAST_WINDOWS = 16  # of training; with fewer, what is rounded on text is not trained
LEAST_TESTS, TEST_SHARE = 4, 0.15  # windows to measure on, and their part of the time

# costs in passes of one window through the trimmed model
TEST_PASSES = 6  # of a test window: both models, before and after, and the proof by llama.cpp
PRUNING_PASSES = 7  # of a calibration window: ADMM's passes and solving, allocation
ROUNDING_PASSES = 8  # of a calibration window
HELD_OUT_PASSES = 13  # of a window held out of training
FIXED = 4  # times a rehearsal's loading and generating, for both models, proof and speeds

BLOCK_BYTES, OUTER_BYTES = 18 / 32, 34 / 32  # of a weight in q4_0, and in q8_0
TOKEN_BYTES = 40  # of a token in a GGUF file, about: its text, merge and score


class Times(NamedTuple):
    """What there is time for: windows to measure and to round on, tokens to train on."""

    tests: int
    rounding: int
    tokens: int
    seconds: float  # that all of it takes


def plan_time(
    rehearsal: dict[str, Any],
    wall: float,
    left: float,
    *,
    tests: int,
    rounding: int,
    passes: int,
    trains: bool = True,
) -> Times:
    """Plan what follows in `left` seconds by the results of a small run, which took `wall` seconds.

    There are so many windows of the `tests`, and for `rounding` at most. Pruning takes so many
    `passes` of a window, and needs training after it; what is but rounded may do without, and does
    unless it `trains`.
    """
    from lib.data.training import HELD_OUT, HELD_OUT_SHARE

    spent, size, evaluation = (rehearsal[name] for name in ("seconds", "footprint", "evaluation"))
    steps = ("dense", "quantize", "measure before", "recover", "eval")
    scaling = sum(spent.get(step, 0) for step in steps)
    rehearsed = 2 * sum(test["windows"] for test in evaluation)
    passed = (spent.get("dense", spent["eval"]) + spent["eval"]) / rehearsed  # seconds of a pass
    tested = (TEST_PASSES + size["before"] / size["after"]) * passed
    windows = min(tests, max(LEAST_TESTS, int(TEST_SHARE * left / tested)))
    fixed = FIXED * (wall - scaling) + windows * tested + passes * passed
    if "quantize" in spent:
        rounded = ROUNDING_PASSES * passed
        solving = max(0, spent["quantize"] - REHEARSED_ROUNDING * rounded)
        fits = int(((ROUNDING_SHARE * left if trains else left - fixed) - solving) / rounded)
        rounding = min(rounding, max(LEAST_ROUNDING, fits))
        fixed += solving + rounding * rounded
    if not trains:
        return Times(windows, rounding, 0, fixed)
    recovery, seqlen = rehearsal["recovery"], evaluation[0]["seqlen"]
    held_out = (1 + len(recovery["curve"])) * recovery["text"]["held_out"]
    training = (spent["recover"] - held_out * passed) * seqlen / recovery["tokens"]
    training = max(3 * passed, training)  # seconds of a window
    for held_out in range(HELD_OUT[1], HELD_OUT[0] - 1, -1):  # the fewer, the less is trained on
        measured = HELD_OUT_PASSES * held_out * passed
        trained = max(LEAST_WINDOWS, int((left - fixed - measured) / training))
        if held_out <= HELD_OUT_SHARE * trained:
            break
    seconds = fixed + measured + trained * training
    if seconds > left and "quantize" in spent and not passes:
        return Times(windows, rounding, 0, fixed)
    return Times(windows, rounding, trained * seqlen, seconds)


def choose_size(job: Job, megabytes: float | None) -> tuple[str, str | None, str]:
    """Return the type of a file of `megabytes`, the share of experts or neurons to lose, if any.

    And the plan in words. Raises UserError where the blocks have too few.
    """
    from lib.model.pretrained import checkpoint_dtype, skeleton_with
    from lib.pruning.experts import fewest
    from lib.pruning.neurons import multiple_of

    def blocks(model: Any) -> list[Tensor]:
        return list(model.get_submodule(job.blocks_name).parameters())

    def megabytes_of(model: Any, bytes_of: float) -> float:
        sizes = rows * (outer * OUTER_BYTES + TOKEN_BYTES)
        for weight in blocks(model):  # norms, biases, rows of no whole blocks: 16 bits
            held = weight.dim() > 1 and weight.shape[-1] % 32 == 0
            sizes += weight.numel() * (bytes_of if held else 2)
        return sizes / 1e6

    model, layout, embedding = job.skeleton, job.layout, job.skeleton.get_input_embeddings()
    weights, rows = sum(p.numel() for p in model.parameters()), len(job.vocabulary.rows)
    outer = (weights - sum(p.numel() for p in blocks(model))) / embedding.num_embeddings
    summary, counts = f"{rows:,} of {embedding.num_embeddings:,} rows of the vocabulary, ", [0]
    dense = weights * checkpoint_dtype(job.config).itemsize / 1e6
    if megabytes and (size := megabytes_of(model, OUTER_BYTES)) <= megabytes:
        what = f"nothing rounded to 4 bits, as q8_0 of about {size:.3g} MB is small enough, "
        return "q8_0", None, summary + what
    if layout:
        mixture = layout.kind == EXPERTS
        step = layout.groups if mixture else multiple_of(layout.count)
        least = fewest(layout) if mixture else step
        counts = [layout.count, *range((layout.count - 1) // step * step, least - 1, -step)]
    for left in counts:
        if left < counts[0]:
            model = skeleton_with(job.config, layout.field, left, job.checkpoint)
        if (size := megabytes_of(model, BLOCK_BYTES)) <= (megabytes or math.inf):
            break
    cut = left < counts[0]
    kept = f"{left} of {layout.count} {layout.kind} in each block" if cut else "nothing pruned"
    summary += f"{kept}, about {size:.3g} MB as q4_0 of {dense:.3g} MB, "
    if megabytes and size > megabytes:
        problem = f"--megabytes {megabytes}: {summary}which is the least"
        raise UserError(f"{problem}; give more, or take a smaller model")
    return "q4_0", (f"{1 - left / counts[0]:.6g}" if cut else None), summary


def cut_tests(job: Job, folder: Path, share: float) -> list[str]:
    """Write a share of each test text, about two windows at least; return the files' names."""
    from lib.data.windows import test_documents

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for source, test in zip(job.tests, job.texts.tests, strict=True):
        texts = list(test_documents(source, read_documents(source, "test")[0]))
        random.Random(0).shuffle(texts)
        left = math.ceil(test.facts["bytes"] * max(share, 2 / len(test.windows)))
        if test.dialogues:  # all of them, or two where few windows are measured
            texts, left = texts[: None if share else 2], math.inf
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
