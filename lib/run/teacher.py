"""The teacher of a recovery: `--teacher`, or the model as it is before pruning.

Without a recovery, the teacher is the dense model that evaluation compares with.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lib.run.job import Job, LoadedModel
from lib.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lib.model.access import Checkpoint
    from lib.model.blocks import BlockRunner

LEAST_ZEROS = 0.01  # share of the blocks' weights; a model with fewer was not pruned


def set_teacher(job: Job) -> None:
    """Set the job's teacher. Raises UserError if it does not match the model."""
    from lib.model import pretrained
    from lib.model.quantised import check_format, stored_bits
    from lib.model.rows import keep_rows_, trimmable_rows

    args = job.args
    checkpoint = replace(job.checkpoint, name=args.teacher, flag="--teacher", revision=None)
    config = pretrained.load_config(checkpoint)
    checkpoint = checkpoint.pinned(config)
    check_format(checkpoint, config, load_bit=None, changes="--recover")
    if stored_bits(config):
        raise UserError(f"{checkpoint}: is quantised; name the unquantised model")
    skeleton = copy.deepcopy(pretrained.skeleton(config, checkpoint))
    student = copy.deepcopy(job.skeleton)
    if job.vocabulary:
        keep_rows_(student, job.vocabulary.rows)
    rows = _teacher_rows(job, checkpoint, student)
    read = _weights(skeleton)
    if rows is not None:
        trimmable_rows(skeleton, checkpoint)
        keep_rows_(skeleton, rows)
    teacher_shapes, shapes = _shapes(skeleton), _shapes(student)
    if teacher_shapes != shapes and (narrow := _narrowed(config, checkpoint, skeleton, job)):
        job.smaller, teacher_shapes = True, teacher_shapes | narrow
    for name in {**shapes, **teacher_shapes}:
        if shapes.get(name) != teacher_shapes.get(name):
            raise UserError(
                f"{checkpoint}: its {name} is {teacher_shapes.get(name, 'missing')}, that of "
                f"{job.checkpoint} {shapes.get(name, 'missing')}; name the dense model that it "
                "was made of"
            )
    job.teacher, job.teacher_config, job.teacher_rows = checkpoint, config, rows
    job.teacher_weights = read, _weights(skeleton)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _narrowed(
    config: Any, checkpoint: Checkpoint, skeleton: nn.Module, job: Job
) -> dict[str, list[int]]:
    """Return the teacher's MLP shapes with the model's number of neurons; {} if none fit."""
    from lib.model.linears import find_linears
    from lib.model.mlp import find_mlps
    from lib.model.pretrained import skeleton as skeleton_of

    try:
        mlps = find_mlps(config, checkpoint, skeleton, job.blocks_name)
        down = job.skeleton.get_submodule(f"{job.blocks_name}.0.{mlps.blocks[0].down}")
    except (UserError, AttributeError):  # another architecture: its shapes will differ
        return {}
    width = find_linears(down, "")[0][0].shape[1]
    if width > mlps.width:  # no pruning adds neurons
        return {}
    config = copy.deepcopy(config)
    mlps.set_width(config, width)
    shapes, dense = _shapes(skeleton_of(config, checkpoint)), _shapes(skeleton)
    inside = f"{job.blocks_name}."
    return {
        name: shape for name, shape in shapes.items() if name.startswith(inside) and name in dense
    }


def _teacher_rows(job: Job, checkpoint: Checkpoint, student: nn.Module) -> Tensor | None:
    """Return the rows of the teacher that a smaller model has, or None if it has all of them.

    `student` is the model as it will be, without weights. Raises UserError if the teacher lacks
    tokens of the model.
    """
    import torch

    from lib.model.pretrained import load_tokenizer

    teacher_ids = load_tokenizer(checkpoint).get_vocab()
    original = job.vocabulary.original_tokenizer if job.vocabulary else job.tokenizer
    if teacher_ids == original.get_vocab():
        return job.vocabulary.rows if job.vocabulary else None
    tokens = sorted(job.tokenizer.get_vocab().items(), key=lambda item: item[1])
    rows = student.get_input_embeddings().num_embeddings
    has_every_row = [index for _, index in tokens] == list(range(rows))
    if has_every_row and all(token in teacher_ids for token, _ in tokens):
        return torch.tensor([teacher_ids[token] for token, _ in tokens])
    raise UserError(
        f"{checkpoint}: has another vocabulary than {job.checkpoint}; name the dense model that it "
        "was made of"
    )


def load_teacher(job: Job, loaded: LoadedModel) -> BlockRunner:
    """Load the teacher: `--teacher`, or a copy of the model as it is before pruning.

    Raises UserError if a model that was pruned before is to be recovered, but has no zeros.
    """
    from lib.model import pretrained
    from lib.model.blocks import BlockRunner
    from lib.model.finite import check_finite
    from lib.model.rows import keep_rows_
    from lib.pruning.check import measure

    args = job.args
    if not args.teacher:
        model = pretrained.fresh_copy(loaded.model)
        return BlockRunner(model, job.device)
    zeros = measure(loaded.runner).overall
    if job.schedule and zeros < LEAST_ZEROS and not job.smaller:
        raise UserError(
            f"{job.checkpoint}: {zeros:.1%} of its blocks' weights are zero, so there is "
            "nothing to recover; prune it by --prune_method, without --teacher"
        )
    with job.timed("load teacher"):
        model = pretrained.load_model(
            job.teacher,
            job.teacher_config,
            dtype=pretrained.pick_dtype(args.dtype, job.config, job.device),
            device_map={"": job.device},
        )
        if job.teacher_rows is not None:
            keep_rows_(model, job.teacher_rows)
        runner = BlockRunner(model, job.device, flag=job.teacher.flag)
        check_finite(runner)
    return runner
