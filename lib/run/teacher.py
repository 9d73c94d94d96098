"""The teacher of a recovery: `--teacher`, or the model as it is before pruning.

Without a recovery, the teacher is the dense model that evaluation compares with.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from operator import le

import torch
from torch import Tensor, nn

from lib.model import pretrained
from lib.model.access import Checkpoint
from lib.model.blocks import BlockRunner
from lib.model.quantized import check_format, stored_bits
from lib.model.rows import keep_rows_, trimmable_rows
from lib.pruning.check import measure
from lib.run.job import Job
from lib.util.errors import UserError

LEAST_ZEROS = 0.01  # share of the blocks' weights; a model with fewer was not pruned


def set_teacher(job: Job) -> None:
    """Set the job's teacher. UserError if the model can't have been made from it."""
    checkpoint = replace(job.checkpoint, name=job.args.teacher, flag="--teacher", revision=None)
    config = pretrained.load_config(checkpoint)
    checkpoint = checkpoint.pinned(config)
    check_format(checkpoint, config, load_bit=None, changes="--recover")
    if stored_bits(config):
        raise UserError(f"{checkpoint}: is quantized; name the unquantized model")
    dense = copy.deepcopy(pretrained.skeleton(config, checkpoint))  # and its config
    model = copy.deepcopy(job.skeleton)
    if job.vocabulary:
        keep_rows_(model, job.vocabulary.rows)
    rows = _teacher_rows(job, checkpoint, model)
    if rows is not None:
        trimmable_rows(dense, checkpoint)
        keep_rows_(dense, rows)
    job.smaller = _is_smaller(job, checkpoint, dense, model)
    job.teacher, job.teacher_config, job.teacher_rows = checkpoint, config, rows


def _is_smaller(job: Job, checkpoint: Checkpoint, dense: nn.Module, model: nn.Module) -> bool:
    """Whether the blocks have lost rows or columns; nothing else may differ in shape."""
    of_model, of_dense = (
        {name: list(parameter.shape) for name, parameter in one.named_parameters()}
        for one in (model, dense)
    )
    smaller = False
    for name in of_model | of_dense:
        ours, theirs = of_model.get(name), of_dense.get(name)
        if ours == theirs:
            continue
        lost = ours and theirs and len(ours) == len(theirs) and all(map(le, ours, theirs))
        if not lost or not name.startswith(f"{job.blocks_name}."):
            raise UserError(
                f"{checkpoint}: its {name} is {theirs or 'missing'}, that of {job.checkpoint} "
                f"{ours or 'missing'}; name the dense model that it was made of"
            )
        smaller = True
    return smaller


def _teacher_rows(job: Job, checkpoint: Checkpoint, model: nn.Module) -> Tensor | None:
    """The rows of the teacher's vocabulary that `model`, without weights, has; None: all of them.

    UserError if the teacher lacks tokens of the model.
    """
    teacher_ids = pretrained.load_tokenizer(checkpoint).get_vocab()
    original = job.vocabulary.original_tokenizer if job.vocabulary else job.tokenizer
    if teacher_ids == original.get_vocab():
        return job.vocabulary.rows if job.vocabulary else None
    tokens = sorted(job.tokenizer.get_vocab().items(), key=lambda item: item[1])
    every_row = range(model.get_input_embeddings().num_embeddings)
    names_rows = [index for _, index in tokens] == list(every_row)
    if not names_rows or any(token not in teacher_ids for token, _ in tokens):
        raise UserError(
            f"{checkpoint}: has another vocabulary than {job.checkpoint}; name the dense model "
            "that it was made of"
        )
    return torch.tensor([teacher_ids[token] for token, _ in tokens])


def load_teacher(job: Job, runner: BlockRunner) -> BlockRunner:
    """Load the teacher: `--teacher`, or a copy of the model as it is before pruning.

    UserError if a model that was pruned before is to be recovered, but has no zeros.
    """
    passes = dict(dist=job.dist, batch_size=job.batch_size, state_device=runner.state_device)
    if not job.teacher:
        return BlockRunner(pretrained.fresh_copy(runner.model), job.device, **passes)
    needs_zeros = job.schedule and not (job.plan.narrows or job.smaller)
    if needs_zeros and (zeros := measure(runner).overall) < LEAST_ZEROS:
        raise UserError(
            f"{job.checkpoint}: {zeros:.1%} of its blocks' weights are zero, so there is "
            "nothing to recover; prune it by --prune_method, without --teacher"
        )
    with job.timed("load teacher"):
        dtype = pretrained.pick_dtype(job.args.dtype, job.config, job.device)
        model = pretrained.load_model(
            job.teacher, job.teacher_config, dtype=dtype, device_map={"": job.device}
        )
        if job.teacher_rows is not None:
            keep_rows_(model, job.teacher_rows)
        teacher = BlockRunner(model, job.device, flag=job.teacher.flag, **passes)
        teacher.check_finite()
    return teacher
