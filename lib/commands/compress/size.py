"""How `compress` reaches a size of the GGUF file: by its types, and by neurons or experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...formats.registry import AUTO, Q8_0
from ...methods.sparsity import EXPERTS, NEURONS
from ...util.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ...run.run import Run

METHODS = {NEURONS: "admm", EXPERTS: "contribution"}


def removing(kind: str, share: str) -> dict[str, str]:
    """Return flags of main.py that remove a share of the neurons or experts."""
    return dict(prune_method=METHODS[kind], sparsity_type=kind, sparsity_ratio=share)


def megabytes_of(job: Run, model: nn.Module, type_: str, blocks: bool = False) -> float:
    """Return the size of a model's file in MB, with `auto` of its smallest types.

    `blocks`: without the vocabulary.
    """
    from ...run.gguf_size import gguf_bytes, sizes_and_rest, vocabulary_bytes

    outer = 0.0 if blocks else vocabulary_bytes(job)
    if type_ != AUTO:
        return gguf_bytes(job, model, job.form, outer) / 1e6
    sizes, size = sizes_and_rest(job, model, outer)
    inside = f"{job.model.blocks_name}."
    for name, each in sizes.items():
        size += each[Q8_0] if blocks and not name.startswith(inside) else min(each.values())
    return size / 1e6


def check_size(job: Run, type_: str, megabytes: float, blocks: bool = False) -> None:
    """Raise UserError if a file without removal is larger than `megabytes`."""
    least = megabytes_of(job, job.model.skeleton, type_, blocks=blocks)
    if least > megabytes:
        least = math.ceil(10 * least) / 10
        types = "with the smallest types" if type_ == AUTO else f"as {type_}"
        about = "alone take" if blocks else "and vocabulary take"
        problem = f"the blocks {about} {least:,} MB {types}"
        fix = f"Give at least {least:g}, or --recover TOKENS, which removes neurons or experts"
        raise UserError(f"--megabytes {megabytes}", problem, fix)


def removal(job: Run, type_: str, megabytes: float) -> dict[str, str]:
    """Return flags that remove as few neurons or experts as `megabytes` ask for; {} for none.

    Raises UserError if the size cannot be reached.
    """
    from ...model.skeleton import skeleton_with
    from ...stages.remove import possible_counts

    layout, model = job.model.layout, job.model.skeleton
    for left in possible_counts(layout):
        if left < layout.count:
            model = skeleton_with(job.model.config, layout.field, left, job.model.checkpoint)
        size = megabytes_of(job, model, type_)
        about = f"{left} of {layout.count} {layout.kind} in each block, and {size:.3g} MB"
        if size <= megabytes:
            break
    else:
        problem, fix = f"the smallest file has {about}", "Give more, or choose a smaller model"
        raise UserError(f"--megabytes {megabytes}", problem, fix)
    share = f"{1 - left / layout.count:.6g}"
    return removing(layout.kind, share) if left < layout.count else {}
