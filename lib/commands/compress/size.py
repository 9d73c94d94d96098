"""Estimates of `compress`: the size of a GGUF file, and how many neurons or experts fit into it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from ...model.matrix import unread_of
from ...util.errors import UserError

if TYPE_CHECKING:
    from ...run.run import Run

Q8_0 = "q8_0"  # of embedding and head, and of all if that is small enough
Q8_0_BITS = 8 + 16 / 32  # per weight, with its share of a scale
# bytes in a GGUF file besides weights
STRING_BYTES = 8  # length of each token and merge
ROW_BYTES = 8  # type and score of a token
PADDING_BYTES = 16  # name of a row without a token
TENSOR_BYTES, HEADER_BYTES = 96, 2**12  # upper limits: name, shape and alignment; other fields


def choose_size(job: Run, megabytes: float | None) -> tuple[str, str | None, str]:
    """Return the GGUF type for `megabytes`, the share of experts or neurons to remove, a summary.

    Raises UserError if the size cannot be reached.
    """
    from ...model.device import checkpoint_dtype
    from ...model.skeleton import skeleton_with
    from ...remove import possible_counts

    model, layout, most = job.model.skeleton, job.model.layout, megabytes or math.inf
    all_rows, outer = model.get_input_embeddings().num_embeddings, vocabulary_bytes(job)
    rows = f"{len(job.vocabulary.rows):,} of " if job.vocabulary else "all "
    summary = f"{rows}{all_rows:,} rows of the vocabulary, "
    if megabytes and (size := gguf_megabytes(job, model, Q8_0, outer)) <= most:
        what = f"about {_megabytes(size)} MB as q8_0, small enough without 4 bits"
        return Q8_0, None, summary + what
    for left in possible_counts(layout) if layout else [None]:
        if layout and left < layout.count:
            model = skeleton_with(job.model.config, layout.field, left, job.model.checkpoint)
        if (size := gguf_megabytes(job, model, job.flags.format, outer)) <= most:
            break
    cut = bool(layout) and left < layout.count
    kept = f"{left} of {layout.count} {layout.kind} in each block" if cut else "nothing pruned"
    weights = sum(weight.numel() for weight in job.model.skeleton.parameters())
    dense = _megabytes(weights * checkpoint_dtype(job.model.config).itemsize / 1e6)
    summary += f"{kept}, {dense} -> about {_megabytes(size)} MB as {job.flags.format}"
    if size > most:
        problem = f"the smallest file has {summary}"
        raise UserError(f"--megabytes {megabytes}", problem, "Give more, or choose a smaller model")
    return job.flags.format, (f"{1 - left / layout.count:.6g}" if cut else None), summary


def gguf_megabytes(job: Run, model: Any, type_: str, outer: float) -> float:
    """Return an upper limit of a GGUF file in MB; `outer` is the size outside blocks in bytes.

    llama.cpp stores linear layers of whole blocks as the type, others in 16 bits, the rest in 32.
    """
    from ...formats.grids import FORMATS
    from ...model.linears import find_linears

    form, size = FORMATS[job.flags.format], outer
    linear_bits = Q8_0_BITS if type_ == Q8_0 else form.bits_per_weight
    for block in model.get_submodule(job.model.blocks_name):
        linears = {each.parameter_name: each.shape[1] for each in find_linears(block, "block")[0]}
        for name, weight in block.named_parameters():
            inputs = linears.get(f"block.{name}")
            bits = 32 if inputs is None else 16
            if inputs is not None and form.supports_width(inputs):
                bits = linear_bits
            size += weight.numel() * bits / 8 + TENSOR_BYTES
    return size / 1e6


def vocabulary_bytes(job: Run) -> float:
    """Return the bytes of a GGUF file outside its blocks: tables, tokens, merges and fields."""
    model, tokenizer = job.model.skeleton, job.tokenizer
    all_rows, unread = model.get_input_embeddings().num_embeddings, unread_of(model)
    rows = len(job.vocabulary.rows) if job.vocabulary else all_rows
    size = HEADER_BYTES + 2 * len(str(tokenizer.chat_template or "").encode())
    for name, weight in model.named_parameters():
        if name.startswith(f"{job.model.blocks_name}.") or name in unread:
            continue
        table = len(weight) == all_rows
        numbers = weight.numel() // all_rows * rows if table else weight.numel()
        size += numbers * (Q8_0_BITS if table else 32) / 8 + TENSOR_BYTES
    tokens = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges") or ()
    strings = [*tokens, *(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)]
    size += sum(STRING_BYTES + len(string.encode()) for string in strings)
    return size + rows * ROW_BYTES + max(0, rows - len(tokens)) * (STRING_BYTES + PADDING_BYTES)


def _megabytes(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
