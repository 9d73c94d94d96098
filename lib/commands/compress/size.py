"""How `compress` reaches a size: the GGUF file's type, and how many neurons or experts fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...util.errors import UserError

if TYPE_CHECKING:
    from ...run.run import Run

Q8_0 = "q8_0"  # of embedding and head, and of all if that is small enough


def choose_size(job: Run, megabytes: float | None) -> tuple[str, str | None, str]:
    """Return the GGUF type for `megabytes`, the share of experts or neurons to remove, a summary.

    Raises UserError if the size cannot be reached.
    """
    from ...formats.grids import Types
    from ...model.device import checkpoint_dtype
    from ...model.skeleton import skeleton_with
    from ...remove import possible_counts
    from ...run.gguf_size import gguf_bytes, vocabulary_bytes

    model, layout, most = job.model.skeleton, job.model.layout, megabytes or math.inf
    all_rows, outer = model.get_input_embeddings().num_embeddings, vocabulary_bytes(job)
    rows = f"{len(job.vocabulary.rows):,} of " if job.vocabulary else "all "
    summary = f"{rows}{all_rows:,} rows of the vocabulary, "
    if megabytes and (size := gguf_bytes(job, model, Types(Q8_0, {}), outer) / 1e6) <= most:
        what = f"about {_megabytes(size)} MB as q8_0, small enough without 4 bits"
        return Q8_0, None, summary + what
    for left in possible_counts(layout) if layout else [None]:
        if layout and left < layout.count:
            model = skeleton_with(job.model.config, layout.field, left, job.model.checkpoint)
        if (size := gguf_bytes(job, model, job.form, outer) / 1e6) <= most:
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


def _megabytes(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
