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
from ..model.saving import cast
from ..model.skeleton import decoder_blocks
from ..model.sparsity_check import SparsityCheck
from ..model.store import BlockStore
from ..offload.store import FileBlockStore, device_map
from ..util.errors import UserError
from ..util.files import temporary_folder
from ..util.host import keep_freed_memory
from ..util.resume import RunFolder
from .memory import Memory, local_memory
from .run import Run
from .trimmed import predict_rows_

LEAST_ZEROS = 0.01  # share of zeros in the blocks below which a model counts as not pruned
MEMORY = Path("/dev/shm")  # on Linux: files in memory


def load(run: Run, cleanup: ExitStack, folder: RunFolder | None) -> BlockRunner:
    """Load the model where it fits; `cleanup` closes and removes temporary files.

    `folder` is the run's folder of blocks, in the main rank.
    """
    keep_freed_memory()
    flags, dist, memory, options = run.flags, run.dist, *plan_memory(run)
    first = dist.local_rank == 0  # first rank of its machine
    where, converted, blocks_at = {"": run.device}, None, None
    if memory.offloaded:
        where = device_map(run.model.skeleton, run.model.blocks_name, run.device)
        if first:
            blocks_at = _block_folder(run, cleanup, folder, memory)
        converted = dist.of_machine(blocks_at and str(blocks_at.converted))
    with run.timed("load"):
        model = pretrained.load_model(
            run.model.checkpoint,
            run.model.config,
            dtype=run.model.dtype,
            device_map=where,
            offload=converted,
            writes=first,
            load_bit=flags.load_bit,
        )
    dist.barrier()  # files that one rank converts serve all ranks of its machine
    save_dtype = run.model.save_dtype
    if flags.fake_quantizes:
        with cast(model, save_dtype):
            pass  # evaluated as it will be saved; blocks in files are cast when fetched
    store = BlockStore
    if memory.offloaded:
        on_disk, casts = bool(flags.offload_folder), flags.fake_quantizes
        store = partial(FileBlockStore, folder=blocks_at, on_disk=on_disk, cast_on_load=casts)
    finished = folder if run.flags.changes else None
    weights = store(model, run.device, save_dtype=save_dtype, finished=finished, dist=run.dist)
    runner = BlockRunner(model, run.device, weights, **options)
    if weights.resident:  # otherwise blocks are checked when they are fetched
        runner.check_finite()
    try:
        runner.verify()
    except UserError as error:
        if run.flags.changes or run.flags.has_dense:
            raise
        runner = BlockRunner(model, run.device, weights, **options, whole=True)
        runner.verify()
        run.print(f"evaluated as a whole: {error}")
    return runner


def load_teacher(run: Run, runner: BlockRunner, cleanup: ExitStack) -> BlockRunner:
    """Load the teacher: `--teacher`, or a copy of the model before pruning.

    If the blocks of a model in training are fetched, so are the teacher's. Raises UserError if an
    already pruned model is to be recovered, but has no zeros.
    """
    passes = dict(dist=run.dist, batch_size=run.batch_size, state_device=runner.state_device)
    passes["most_windows"] = runner.most_windows
    store, resident = None, runner.weights.resident or not run.fetches_teacher
    if not run.teacher:
        model = pretrained.fresh_copy(runner.model, with_blocks=resident)
        if not resident:
            store = runner.weights.of_copy(model)
        return BlockRunner(model, run.device, store, **passes)
    spec = run.teacher
    needs_zeros = run.schedule and not (run.flags.fake_quantizes or spec.is_larger)
    if needs_zeros and (zeros := SparsityCheck(runner).overall) < LEAST_ZEROS:
        raise UserError(
            str(run.model.checkpoint),
            f"{zeros:.1%} of its blocks' weights are zero, so there is nothing to recover",
            "Prune it with --prune_method, without --teacher",
        )
    with run.timed("load teacher"):
        where, converted, first = {"": run.device}, None, run.dist.local_rank == 0
        if not resident:
            name, _ = decoder_blocks(spec.skeleton)
            where = device_map(spec.skeleton, name, run.device)
            converted = str(cleanup.enter_context(temporary_folder())) if first else None
            converted = run.dist.of_machine(converted)
        model = pretrained.load_model(
            spec.checkpoint,
            spec.config,
            dtype=run.model.dtype,
            device_map=where,
            offload=converted,
            writes=first,
        )
        run.dist.barrier()  # as above
        if spec.rows is not None:
            predict_rows_(model, spec.rows)
            model.generation_config = runner.model.generation_config  # with the model's ids
        if not resident:
            files = dict(folder=None, on_disk=False, cast_on_load=False, dist=run.dist)
            store = FileBlockStore(model, run.device, **files)
        teacher = BlockRunner(model, run.device, store, flag=spec.checkpoint.flag, **passes)
        teacher.check_finite()
    return teacher


def plan_memory(run: Run) -> tuple[Memory, dict[str, Any]]:
    """Return the memory of a run, and options of `BlockRunner` that it decides; print a line.

    Raises UserError if the run cannot fit in memory.
    """
    memory = local_memory(run)
    with run.dist.fail_together():  # another program may be on one rank's card
        memory.check()
    run.print(memory.line())
    return memory, dict(
        dist=run.dist,
        batch_size=run.batch_size,
        state_device=run.device if memory.hidden_on_device else torch.device("cpu"),
        cache_inputs=memory.cache_inputs,
        checkpointed=memory.checkpointed,
        most_windows=memory.tests_at_once,
    )


def _block_folder(
    run: Run, cleanup: ExitStack, folder: RunFolder | None, memory: Memory
) -> RunFolder:
    """Return this machine's folder of changed blocks: that of the run, or a temporary one."""
    if folder:
        return folder
    if run.flags.offload_folder:
        path = Path(f"{run.flags.offload_folder}-rank-{run.dist.rank}")
    else:
        size = sum(parameter.nbytes for parameter in run.model.skeleton.parameters())
        taken = memory.on_host_alone  # training needs that memory
        in_memory = MEMORY.is_dir() and size < shutil.disk_usage(MEMORY).free and not taken
        parent = MEMORY if in_memory else None
        path = cleanup.enter_context(temporary_folder(parent))
    folder = RunFolder("--offload_folder", path)
    cleanup.callback(folder.clear)
    folder.begin({})
    return folder
