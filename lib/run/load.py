"""Load the models of a run, resident on the device or as files of blocks, as memory allows.

lib/run/memory.py estimates the memory of a run and decides by it.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..model import pretrained
from ..model.blocks import BlockRunner
from ..model.rows import keep_rows_
from ..model.run_folder import RunFolder
from ..model.store import BlockStore, FileBlockStore, device_map
from ..pruning.check import SparsityCheck
from ..sharded import is_sharded
from ..util.errors import UserError
from ..util.files import temporary_folder
from ..util.host import keep_freed_memory
from .job import Job
from .memory import Memory

LEAST_ZEROS = 0.01  # share of zeros in the blocks below which a model counts as not pruned
MEMORY = Path("/dev/shm")  # on Linux: files in memory


def load(job: Job, cleanup: ExitStack, folder: RunFolder | None) -> BlockRunner:
    """Load the model where it fits; `cleanup` closes and removes temporary files.

    `folder` is the run's folder of blocks, in the main rank.
    """
    keep_freed_memory()
    args, dist, (fetched, options) = job.args, job.dist, plan_memory(job)
    first = dist.local_rank == 0  # first rank of its machine
    where, converted, blocks_at = {"": job.device}, None, None
    if fetched:
        where = device_map(job.skeleton, job.blocks_name, job.device)
        if first:
            blocks_at = _block_folder(job, cleanup, folder)
        converted = dist.of_machine(blocks_at and str(blocks_at.converted))
    with job.timed("load"):
        model = pretrained.load_model(
            job.checkpoint,
            job.config,
            dtype=job.dtype,
            device_map=where,
            offload=converted,
            writes=first,
            load_bit=args.load_bit,
        )
    dist.barrier()  # files that one rank converts serve all ranks of its machine
    save_dtype = job.save_dtype
    if job.plan.fake_quantizes:
        with pretrained.cast(model, save_dtype):
            pass  # evaluated as it will be saved; blocks in files are cast when fetched
    store = BlockStore
    if fetched:
        on_disk, narrow = bool(args.offload_folder), job.plan.fake_quantizes
        store = partial(FileBlockStore, folder=blocks_at, on_disk=on_disk, narrow=narrow)
    finished = folder if job.plan.changes else None
    weights = store(model, job.device, save_dtype=save_dtype, finished=finished, dist=job.dist)
    runner = BlockRunner(model, job.device, weights, **options)
    if weights.resident:  # otherwise blocks are checked when they are fetched
        runner.check_finite()
    try:
        runner.verify()
    except UserError as error:
        if job.plan.changes or job.plan.has_dense:
            raise
        runner = BlockRunner(model, job.device, weights, **options, whole=True)
        runner.verify()
        job.print(f"evaluated as a whole: {error}")
    return runner


def load_teacher(job: Job, runner: BlockRunner, cleanup: ExitStack) -> BlockRunner:
    """Load the teacher: `--teacher`, or a copy of the model before pruning.

    If ranks share out the model's blocks, the teacher's are fetched whole. Raises UserError if an
    already pruned model is to be recovered, but has no zeros.
    """
    passes = dict(dist=job.dist, batch_size=job.batch_size, state_device=runner.state_device)
    passes["most_windows"] = runner.most_windows
    store, resident = None, not is_sharded(runner)
    if not job.teacher:
        model = pretrained.fresh_copy(runner.model, with_blocks=resident)
        if not resident:
            store = runner.weights.of_copy(model)
        return BlockRunner(model, job.device, store, **passes)
    needs_zeros = job.schedule and not (job.plan.fake_quantizes or job.smaller)
    if needs_zeros and (zeros := SparsityCheck(runner).overall) < LEAST_ZEROS:
        raise UserError(
            f"{job.checkpoint}: {zeros:.1%} of its blocks' weights are zero, so there is "
            "nothing to recover. Prune it with --prune_method, without --teacher."
        )
    with job.timed("load teacher"):
        where, converted, first = {"": job.device}, None, job.dist.local_rank == 0
        if not resident:
            skeleton = pretrained.skeleton(job.teacher_config, job.teacher)
            where = device_map(skeleton, pretrained.decoder_blocks(skeleton)[0], job.device)
            converted = str(cleanup.enter_context(temporary_folder())) if first else None
            converted = job.dist.of_machine(converted)
        model = pretrained.load_model(
            job.teacher,
            job.teacher_config,
            dtype=job.dtype,
            device_map=where,
            offload=converted,
            writes=first,
        )
        job.dist.barrier()  # as above
        if job.teacher_rows is not None:
            keep_rows_(model, job.teacher_rows)
        if not resident:
            files = dict(folder=None, on_disk=False, narrow=False, dist=job.dist)
            store = FileBlockStore(model, job.device, **files)
        teacher = BlockRunner(model, job.device, store, flag=job.teacher.flag, **passes)
        teacher.check_finite()
    return teacher


def plan_memory(job: Job) -> tuple[bool, dict[str, Any]]:
    """Decide whether blocks are fetched, and other options of `BlockRunner`; print a line.

    Raises UserError if the run cannot fit in memory.
    """
    memory = Memory.of(job)
    with job.dist.fail_together():  # another program may be on one rank's card
        memory.check()
    job.print(memory.line())
    return memory.fetched, dict(
        dist=job.dist,
        batch_size=job.batch_size,
        state_device=job.device if memory.hidden_on_device else torch.device("cpu"),
        cache_inputs=memory.cache_inputs,
        checkpointed=memory.checkpointed,
        most_windows=memory.tests_at_once,
    )


def _block_folder(job: Job, cleanup: ExitStack, folder: RunFolder | None) -> RunFolder:
    """Return this machine's folder of changed blocks: that of the run, or a temporary one."""
    if folder:
        return folder
    if job.args.offload_folder:
        path = Path(f"{job.args.offload_folder}-rank-{job.dist.rank}")
    else:
        size = sum(parameter.nbytes for parameter in job.skeleton.parameters())
        in_memory = MEMORY.is_dir() and size < shutil.disk_usage(MEMORY).free
        parent = MEMORY if in_memory else None
        path = cleanup.enter_context(temporary_folder(parent))
    folder = RunFolder("--offload_folder", path)
    cleanup.callback(folder.clear)
    folder.begin({})
    return folder
