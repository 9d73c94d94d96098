"""Estimates for `compress`: time by a rehearsal, size of a GGUF file, room for training, tests."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.chats import Dialogue, row_of
from ..data.documents import PIECE_CHARACTERS, pieces_of, read_documents
from ..util.errors import UserError
from ..util.files import write_text

if TYPE_CHECKING:
    from ..run.job import Job

REHEARSED_ROUNDING = 2  # calibration windows of the rehearsal
LEAST_ROUNDING, ROUNDING_SHARE = 8, 0.25  # fewest calibration windows, largest share of the time
LEAST_WINDOWS = 16  # fewest training windows; a quantized model is not trained on fewer
LEAST_TESTS, TEST_SHARE = 4, 0.15  # fewest test windows, and their share of the time
SCALED = ("trim", "dense", "quantize", "measure before", "recover", "eval")  # steps of main.py
FIXED = 4  # repetitions of the other steps of a rehearsal: both models, proof and speeds

# passes of a window through the trimmed model, the unit of planned time
REHEARSED_TESTS = 2  # per test window of a rehearsal: as reference, and at the end
TEST_PASSES = 6  # per test window: both models, before and after, and proof with llama.cpp
PRUNING_PASSES = 7  # per calibration window: ADMM's passes and solving, allocation
ROUNDING_PASSES = 8  # per calibration window: dense and quantized model, and solving
HELD_OUT_PASSES = 13  # per held-out training window: number of evaluations
LEAST_TRAINING = 3  # per training window: teacher, model, and gradient

# bytes in a GGUF file besides weights
STRING_BYTES = 8  # length of each token and merge
ROW_BYTES = 8  # type and score of a token
PADDING_BYTES = 16  # name of a row without a token
TENSOR_BYTES, HEADER_BYTES = 96, 2**12  # upper limits: name, shape and alignment; other fields
# per weight, with its share of a scale
BITS = {"q4_0": 4 + 16 / 32, "iq4_nl": 4 + 16 / 32, "q8_0": 8 + 16 / 32}


class Times(NamedTuple):
    """The planned work: test windows, calibration windows, training tokens."""

    tests: int
    rounding: int
    tokens: int
    seconds: float  # time for all of it


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
    """Plan the work for `left` seconds by the results of a rehearsal, which took `wall` seconds.

    `tests` and `rounding` are the largest numbers of test and calibration windows. Pruning takes
    `passes` passes and needs training after it. A model that is only quantized can skip training,
    and does so unless it `trains`.
    """
    from ..vocabulary import MEASURED_BYTES

    spent, size, evaluation = (rehearsal[name] for name in ("seconds", "footprint", "evaluation"))
    rehearsed = sum(test["windows"] for test in evaluation)
    passed = spent.get("dense", spent["eval"]) + spent["eval"]
    passed /= REHEARSED_TESTS * rehearsed  # seconds of a pass
    tested = (TEST_PASSES + size["before"] / size["after"]) * passed
    windows = min(tests, max(LEAST_TESTS, int(TEST_SHARE * left / tested)))
    fixed = FIXED * (wall - sum(spent.get(step, 0) for step in SCALED))
    fixed += windows * tested + passes * passed
    if measured := rehearsal.get("vocabulary", {}).get("measured_on"):
        fixed += spent["trim"] * min(MEASURED_BYTES / measured["bytes"], windows / rehearsed)
    if "quantize" in spent:
        rounded = ROUNDING_PASSES * passed
        solving = max(0, spent["quantize"] - REHEARSED_ROUNDING * rounded)
        fits = int(((ROUNDING_SHARE * left if trains else left - fixed) - solving) / rounded)
        rounding = min(rounding, max(LEAST_ROUNDING, fits))
        fixed += solving + rounding * rounded
    trained, seconds = plan_training(rehearsal, passed, left - fixed) if trains else (0, 0)
    if fixed + seconds > left and "quantize" in spent and not passes:
        trained, seconds = 0, 0
    return Times(windows, rounding, trained * evaluation[0]["seqlen"], fixed + seconds)


def plan_training(rehearsal: dict[str, Any], passed: float, left: float) -> tuple[int, float]:
    """Return the number of training windows for `left` seconds, and the seconds that they take.

    A pass of a window takes `passed` seconds. Held-out windows are measured often; with fewer
    training windows, fewer are held out.
    """
    from ..data.training import HELD_OUT, HELD_OUT_SHARE

    recovery, seqlen = rehearsal["recovery"], rehearsal["evaluation"][0]["seqlen"]
    measured = (1 + len(recovery["curve"])) * recovery["text"]["held_out"] * passed
    training = (rehearsal["seconds"]["recover"] - measured) * seqlen / recovery["tokens"]
    training = max(LEAST_TRAINING * passed, training)  # seconds of a window
    for held_out in range(HELD_OUT[1], HELD_OUT[0] - 1, -1):
        measured = HELD_OUT_PASSES * held_out * passed
        windows = max(LEAST_WINDOWS, int((left - measured) / training))
        if held_out <= HELD_OUT_SHARE * windows:
            break
    return windows, measured + windows * training


def choose_size(job: Job, megabytes: float | None) -> tuple[str, str | None, str]:
    """Return the GGUF type for `megabytes`, the share of experts or neurons to remove, a summary.

    Raises UserError if the size cannot be reached.
    """
    from ..model.pretrained import checkpoint_dtype, skeleton_with
    from ..remove import possible_counts

    model, layout, most = job.skeleton, job.layout, megabytes or math.inf
    all_rows, outer = model.get_input_embeddings().num_embeddings, vocabulary_bytes(job)
    rows = f"{len(job.vocabulary.rows):,} of " if job.vocabulary else "all "
    summary = f"{rows}{all_rows:,} rows of the vocabulary, "
    if megabytes and (size := gguf_megabytes(job, model, "q8_0", outer)) <= most:
        what = f"about {_megabytes(size)} MB as q8_0, small enough without 4 bits"
        return "q8_0", None, summary + what
    for left in possible_counts(layout) if layout else [None]:
        if layout and left < layout.count:
            model = skeleton_with(job.config, layout.field, left, job.checkpoint)
        if (size := gguf_megabytes(job, model, job.plan.format, outer)) <= most:
            break
    cut = bool(layout) and left < layout.count
    kept = f"{left} of {layout.count} {layout.kind} in each block" if cut else "nothing pruned"
    weights = sum(weight.numel() for weight in job.skeleton.parameters())
    dense = _megabytes(weights * checkpoint_dtype(job.config).itemsize / 1e6)
    summary += f"{kept}, {dense} -> about {_megabytes(size)} MB as {job.plan.format}"
    if size > most:
        problem = f"--megabytes {megabytes}: the smallest file has {summary}"
        raise UserError(f"{problem}. Give more, or choose a smaller model.")
    return job.plan.format, (f"{1 - left / layout.count:.6g}" if cut else None), summary


def gguf_megabytes(job: Job, model: Any, type_: str, outer: float) -> float:
    """Return an upper limit of a GGUF file in MB; `outer` is the size outside blocks in bytes.

    llama.cpp stores linear layers of whole blocks as the type, others in 16 bits, the rest in 32.
    """
    from ..model.linears import find_linears
    from ..packed.formats import FORMATS

    size = outer
    for block in model.get_submodule(job.blocks_name):
        linears = {each.parameter_name: each.shape[1] for each in find_linears(block, "block")[0]}
        for name, weight in block.named_parameters():
            inputs = linears.get(f"block.{name}")
            bits = 32 if inputs is None else 16
            if inputs is not None and FORMATS[job.plan.format].takes(inputs):
                bits = BITS[type_]
            size += weight.numel() * bits / 8 + TENSOR_BYTES
    return size / 1e6


def vocabulary_bytes(job: Job) -> float:
    """Return the bytes of a GGUF file outside its blocks: tables, tokens, merges and fields."""
    model, tokenizer = job.skeleton, job.tokenizer
    all_rows, unread = model.get_input_embeddings().num_embeddings, getattr(model, "unread", ())
    rows = len(job.vocabulary.rows) if job.vocabulary else all_rows
    size = HEADER_BYTES + 2 * len(str(tokenizer.chat_template or "").encode())
    for name, weight in model.named_parameters():
        if name.startswith(f"{job.blocks_name}.") or name in unread:
            continue
        table = len(weight) == all_rows
        numbers = weight.numel() // all_rows * rows if table else weight.numel()
        size += numbers * (BITS["q8_0"] if table else 32) / 8 + TENSOR_BYTES
    tokens = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges") or ()
    strings = [*tokens, *(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)]
    size += sum(STRING_BYTES + len(string.encode()) for string in strings)
    return size + rows * ROW_BYTES + max(0, rows - len(tokens)) * (STRING_BYTES + PADDING_BYTES)


def cut_tests(job: Job, folder: Path, share: float) -> list[str]:
    """Write a share of each test text, at least about two windows; return the files' names."""
    from ..data.windows import test_documents

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for source, test in zip(job.tests, job.texts.tests, strict=True):
        texts = list(test_documents(source, read_documents(source, "test")[0]))
        random.Random(0).shuffle(texts)
        left = math.ceil(test.record["bytes"] * max(share, 2 / len(test.windows)))
        if test.dialogues:  # all of them, or two if few windows are measured
            texts, left = texts[: None if share else 2], math.inf
        files.append(str(folder / (re.sub(r"[^\w.-]+", "_", test.name) + ".jsonl")))
        lines = []
        while left > 0 and texts:
            text = texts.pop()
            whole = isinstance(text, Dialogue) or len(text) <= PIECE_CHARACTERS
            if len(text.encode()) > left and not whole:
                texts += reversed(pieces_of(text))  # training leaves them out piece by piece
                continue
            left -= len(text.encode())
            row = row_of(text, job.args.column)  # read by gguf and main.py
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(Path(files[-1]), "".join(lines))
    return files


def untrainable(job: Job, folder: Path) -> str | None:
    """Return why training would fail on this machine; None if memory and disk suffice."""
    from ..run.check import check_room
    from ..run.memory import Memory
    from ..util.host import gib

    memory = Memory.of(job)
    needed = memory.total("train") + sum(memory.passing["train"].values())
    if needed > memory.free or not memory.fits():
        problem = f"training takes about {gib(needed)} of memory, and {gib(memory.free)} are free"
        return f"{problem}; --recover_rank 16 takes less"
    try:
        return check_room(job, "--work_dir", folder)
    except UserError as error:
        return str(error)


def _megabytes(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
