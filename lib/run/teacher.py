"""Whom a recovery follows: `--teacher`, or the model as it is before it is pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lib.run.job import Job, LoadedModel
from lib.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lib.model.blocks import BlockRunner

LEAST_ZEROS = 0.01  # share of the blocks' weights, of a model that was pruned before


@contextmanager
def told_of_teacher() -> Iterator[None]:
    """Inside, what is wrong with `--model` is wrong with `--teacher`."""
    try:
        yield
    except UserError as error:
        told = str(error)
        if "--teacher " not in told:
            told = told.replace("--model ", "--teacher ", 1)
        raise UserError(told) from error


def set_teacher(job: Job) -> None:
    """Its config, and which of its tokens are the model's. UserError where it does not match."""
    from lib.model import pretrained
    from lib.model.quantised import check_format, stored_bits
    from lib.model.rows import count_rows, keep_rows_

    args = job.args
    known = args.teacher, args.cache_dir, args.trust_remote_code
    config = pretrained.load_config(*known)
    check_format(args.teacher, config, None, True)
    if stored_bits(config):
        raise UserError(f"--teacher {args.teacher}: is quantised; name the unquantised model")
    skeleton = copy.deepcopy(pretrained.skeleton(config, args.trust_remote_code))
    student = copy.deepcopy(job.skeleton)
    if job.vocabulary:
        keep_rows_(student, job.vocabulary.rows)
    rows = _taught_rows(job, pretrained.load_tokenizer(*known).get_vocab(), student)
    if rows is not None:
        count_rows(skeleton, args.teacher)
        keep_rows_(skeleton, rows)
    theirs, ours = (
        {name: list(one.shape) for name, one in model.named_parameters()}
        for model in (skeleton, student)
    )
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"--teacher {args.teacher}: its {name} is {theirs.get(name, 'missing')}, that of "
                f"--model {args.model} {ours.get(name, 'missing')}; name the dense model that it "
                "was made of"
            )
    job.teacher_config, job.teacher_rows = config, rows


def _taught_rows(job: Job, theirs: dict[str, int], student: nn.Module) -> Tensor | None:
    """Which rows of the teacher are the model's, where the model has fewer; None: all of them.

    `theirs`: the teacher's tokens; `student`: the model without weights, as it will be. UserError
    where it has other tokens.
    """
    import torch

    whole = job.vocabulary.before if job.vocabulary else job.tokenizer
    if theirs == whole.get_vocab():
        return job.vocabulary.rows if job.vocabulary else None
    ours = sorted(job.tokenizer.get_vocab().items(), key=lambda item: item[1])
    rows = student.get_input_embeddings().num_embeddings
    if all(token in theirs for token, _ in ours) and [n for _, n in ours] == list(range(rows)):
        return torch.tensor([theirs[token] for token, _ in ours])
    raise UserError(
        f"--teacher {job.args.teacher}: has another vocabulary than --model {job.args.model}; name "
        "the dense model that it was made of"
    )


def load_teacher(job: Job, loaded: LoadedModel) -> BlockRunner:
    """Whom the recovery follows: `--teacher`, or the model as it is before it is pruned.

    UserError where the model is to be recovered as it is, but has no zeros.
    """
    from lib.model import pretrained
    from lib.model.blocks import BlockRunner
    from lib.model.finite import check_finite
    from lib.model.rows import keep_rows_
    from lib.pruning.check import measure

    args = job.args
    if not args.teacher:
        model = pretrained.fresh_copy(loaded.model)
        return BlockRunner(model, pretrained.decoder_blocks(model)[1], job.device)
    zeros = measure(loaded.runner, job.blocks_name).overall
    if zeros < LEAST_ZEROS:
        raise UserError(
            f"--model {args.model}: {zeros:.1%} of its blocks' weights are zero, so there is "
            "nothing to recover; prune it by --prune_method, without --teacher"
        )
    with job.timed("load teacher"), told_of_teacher():
        model = pretrained.load_model(
            args.teacher,
            job.teacher_config,
            dtype=pretrained.pick_dtype(args.dtype, job.config, job.device),
            device_map={"": job.device},
            cache_dir=args.cache_dir,
            trust_remote_code=args.trust_remote_code,
        )
        if job.teacher_rows is not None:
            keep_rows_(model, job.teacher_rows)
        runner = BlockRunner(model, pretrained.decoder_blocks(model)[1], job.device)
        check_finite(runner)
    return runner
