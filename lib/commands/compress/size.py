"""How `compress` reaches a size: the GGUF file's type, and how many neurons or experts fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...formats.registry import Q8_0
from ...run.plan import AUTO
from ...util.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ...run.run import Run


def choose_size(job: Run, type_: str, megabytes: float | None) -> tuple[str, str | None, str]:
    """Return the GGUF type for `megabytes`, the share of experts or neurons to remove, a summary.

    `type_` is the type if q8_0 is too large. With `auto` parts are removed only if the smallest
    types of all tensors do not suffice. Raises UserError if the size cannot be reached.
    """
    from ...formats.grids import Types
    from ...model.device import checkpoint_dtype
    from ...model.skeleton import skeleton_with
    from ...remove import possible_counts
    from ...run.gguf_size import gguf_bytes, sizes_and_rest, vocabulary_bytes

    model, layout, most = job.model.skeleton, job.model.layout, megabytes or math.inf
    all_rows, outer = model.get_input_embeddings().num_embeddings, vocabulary_bytes(job)
    rows = f"{len(job.vocabulary.rows):,} of " if job.vocabulary else "all "
    summary = f"{rows}{all_rows:,} rows of the vocabulary, "
    if megabytes and (size := gguf_bytes(job, model, Types(), outer) / 1e6) <= most:
        what = f"about {_megabytes(size)} MB as q8_0, small enough without 4 bits"
        return Q8_0, None, summary + what

    def smallest(model: nn.Module) -> float:
        if type_ != AUTO:
            return gguf_bytes(job, model, job.form, outer) / 1e6
        sizes, rest = sizes_and_rest(job, model, outer)
        return (rest + sum(min(types.values()) for types in sizes.values())) / 1e6

    whole = smallest(model)
    for left in possible_counts(layout) if layout else [None]:
        if layout and left < layout.count:
            model = skeleton_with(job.model.config, layout.field, left, job.model.checkpoint)
        if (size := smallest(model)) <= most:
            break
    cut = bool(layout) and left < layout.count
    kept = f"{left} of {layout.count} {layout.kind} in each block" if cut else "nothing pruned"
    weights = sum(weight.numel() for weight in job.model.skeleton.parameters())
    dense = _megabytes(weights * checkpoint_dtype(job.model.config).itemsize / 1e6)
    if type_ == AUTO:
        summary += f"with the smallest types all takes {_megabytes(whole)} MB, "
    about = most if type_ == AUTO and size <= most else size
    summary += f"{kept}, {dense} -> about {_megabytes(about)} MB as {type_}"
    if size > most:
        problem = f"the smallest file has {summary}"
        raise UserError(f"--megabytes {megabytes}", problem, "Give more, or choose a smaller model")
    return type_, (f"{1 - left / layout.count:.6g}" if cut else None), summary


def _megabytes(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
