"""Load the models of a run, the dense one on the device or in files of blocks, as memory allows.

Memory is a rule: the weights and hidden states against what is free decide whether blocks are
fetched one at a time, where hidden states are, and what is kept in memory to save passes. Nothing
is refused on an estimate; what does not fit ends in one line that names the flags to use.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model import pretrained
from ..model.blocks import BlockRunner
from ..model.rows import keep_rows_
from ..model.run_folder import CONVERTED, RunFolder
from ..model.store import BlockStore, FileBlockStore, device_map
from ..pruning.check import Measured
from ..util.errors import UserError
from ..util.host import available, gib, keep_freed_memory
from .job import Job

BITS = {"4": 4.5, "8": 8.1}  # for each weight of --load_bit, scales included
TRAINED = {"adamw": 16, "adamw8bit": 11}  # bytes of a weight: float32, gradient, two averages
CACHED = 8  # inputs of a block's linears, in hidden states
KEPT = 40  # activations of a block that a backward pass needs, in hidden states of a batch
LEAST_ZEROS = 0.01  # share of the blocks' weights; a model with fewer was not pruned
MEMORY = Path("/dev/shm")  # on Linux: files in memory


def load(job: Job, cleanup: ExitStack, folder: RunFolder | None) -> BlockRunner:
    """Load the dense model where it fits; `cleanup` closes and removes what that needs.

    `folder` is the run's own, in the main rank, where blocks are kept.
    """
    keep_freed_memory()
    args, (fetched, options) = job.args, plan_memory(job)
    where, converted, blocks_at = {"": job.device}, None, None
    if fetched:
        where = device_map(job.skeleton, job.blocks_name, job.device)
        if job.dist.local_rank == 0:  # the first of its machine
            blocks_at = _block_folder(job, cleanup, folder)
            converted = blocks_at.path / CONVERTED
        else:  # this rank maps what it converts itself
            converted = cleanup.enter_context(tempfile.TemporaryDirectory())
    with job.timed("load"):
        model = pretrained.load_model(
            job.checkpoint,
            job.config,
            dtype=job.dtype,
            device_map=where,
            offload=converted and str(converted),
            load_bit=args.load_bit,
        )
    save_dtype = job.save_dtype
    if job.plan.narrows:
        with pretrained.cast(model, save_dtype):
            pass  # it is measured as it will be saved; blocks in files are cast when fetched
    store = BlockStore
    if fetched:
        on_disk, narrow = bool(args.offload), job.plan.narrows
        store = partial(FileBlockStore, folder=blocks_at, on_disk=on_disk, narrow=narrow)
    finished = folder if job.plan.changes else None
    weights = store(model, job.device, save_dtype=save_dtype, finished=finished, dist=job.dist)
    runner = BlockRunner(model, job.device, weights, **options)
    if weights.resident:  # otherwise every block is checked when it is fetched
        runner.check_finite()
    try:
        runner.verify()
    except UserError as error:
        if job.plan.changes or job.plan.has_dense:
            raise
        runner = BlockRunner(model, job.device, weights, **options, whole=True)
        runner.verify()
        job.print(f"measured as a whole: {error}")
    return runner


def load_teacher(job: Job, runner: BlockRunner) -> BlockRunner:
    """Load the teacher: `--teacher`, or a copy of the model as it is before pruning.

    UserError if a model that was pruned before is to be recovered, but has no zeros.
    """
    passes = dict(dist=job.dist, batch_size=job.batch_size, state_device=runner.state_device)
    if not job.teacher:
        store, resident = None, runner.weights.resident
        model = pretrained.fresh_copy(runner.model, with_blocks=resident)
        if not resident:
            store = runner.weights.of_copy(model)
        return BlockRunner(model, job.device, store, **passes)
    needs_zeros = job.schedule and not (job.plan.narrows or job.smaller)
    if needs_zeros and (zeros := Measured(runner).overall) < LEAST_ZEROS:
        raise UserError(
            f"{job.checkpoint}: {zeros:.1%} of its blocks' weights are zero, so there is "
            "nothing to recover; prune it by --prune_method, without --teacher"
        )
    with job.timed("load teacher"):
        dtype = job.dtype
        model = pretrained.load_model(
            job.teacher, job.teacher_config, dtype=dtype, device_map={"": job.device}
        )
        if job.teacher_rows is not None:
            keep_rows_(model, job.teacher_rows)
        teacher = BlockRunner(model, job.device, flag=job.teacher.flag, **passes)
        teacher.check_finite()
    return teacher


def plan_memory(job: Job) -> tuple[bool, dict[str, Any]]:
    """Decide whether blocks are fetched, and other options of a `BlockRunner`; print a line."""
    args, dist, config = job.args, job.dist, job.config
    blocks = job.skeleton.get_submodule(job.blocks_name)
    dtype = job.dtype
    inside = sum(parameter.numel() for parameter in blocks.parameters())
    outside = sum(parameter.numel() for parameter in job.skeleton.parameters()) - inside
    gpu, here = job.device.type != "cpu", torch.accelerator
    if gpu:  # torch's own cache is free too
        free = torch.get_device_module(job.device).mem_get_info(job.device)[0]
        free += here.memory_reserved(job.device) - here.memory_allocated(job.device)
    else:
        free = available() // dist.local_size
    bits = BITS[args.load_bit] if args.load_bit else 8 * dtype.itemsize
    weights = int(inside * bits / 8) + outside * dtype.itemsize
    teacher = inside * dtype.itemsize if job.schedule else 0  # the copy shares what is outside
    if job.teacher:
        dense = pretrained.skeleton(job.teacher_config, job.teacher)
        teacher = sum(parameter.numel() for parameter in dense.parameters()) * dtype.itemsize
    quantized = args.load_bit or getattr(config, "quantization_config", None)
    held = [parameter for block in blocks for parameter in block.parameters()]
    # of blocks that share weights one can't be fetched without the other
    apart = not quantized and len(held) == len(set(held))
    apart = apart and (not job.schedule or dist.size > 1)  # ranks that train share out the blocks
    if args.offload and not apart:
        raise UserError(
            f"--offload {args.offload}: the model's blocks share weights, or are quantized; leave "
            "it out"
        )
    many = 2 * weights + teacher > free if gpu else dist.local_size > 1
    many = many or bool(job.schedule)
    fetched = any(dist.all_gather_object(bool(args.offload or (apart and many))))
    texts, width = job.texts, config.get_text_config(decoder=True).hidden_size
    windows = 0 if texts.windows is None else len(texts.windows)
    windows = len(range(windows)[dist.share(windows)])
    hidden = 2 * windows * job.seqlen * width * dtype.itemsize  # pruned and dense stream
    left = free - teacher - (2 * weights // len(blocks) if fetched else weights)
    on_device = not gpu or 4 * hidden < left
    batch = job.batch_size * job.seqlen * width * dtype.itemsize
    trained = _trained_bytes(blocks, TRAINED[args.recover_optimizer], args.recover_rank, dtype)
    training = trained + weights + teacher + KEPT * len(blocks) * batch
    checkpointed = bool(job.schedule) and training > free
    where = "" if not gpu else f" on {job.device}" if on_device else " on the host"
    job.print(
        f"memory: weights {gib(weights)}{', one block at a time' if fetched else ''}, "
        + f"teacher {gib(teacher)}, " * bool(teacher)
        + f"hidden states {gib(hidden)}{where}, of {gib(free)} free"
        + "; activations are computed again in training" * checkpointed
    )
    return fetched, dict(
        dist=dist,
        batch_size=job.batch_size,
        state_device=job.device if on_device else torch.device("cpu"),
        cache_inputs=left - hidden > CACHED * hidden,
        checkpointed=checkpointed,
    )


def _trained_bytes(blocks: nn.Module, each: int, rank: int | None, dtype: torch.dtype) -> int:
    """Return the bytes that training the blocks takes, besides their weights and activations."""
    size = 0
    for parameter in blocks.parameters():
        if rank and parameter.dim() > 1:  # B and A for every matrix, which is kept beside them
            *stack, rows, columns = parameter.shape
            size += each * prod(stack) * rank * (rows + columns)
            size += parameter.numel() * dtype.itemsize
        else:
            size += each * parameter.numel()
    return size


def _block_folder(job: Job, cleanup: ExitStack, folder: RunFolder | None) -> RunFolder:
    """Return where this machine keeps changed blocks: the run's own folder, or a temporary one."""
    if folder:
        return folder
    if job.args.offload:
        path = Path(f"{job.args.offload}-rank-{job.dist.rank}")
    else:
        size = sum(parameter.nbytes for parameter in job.skeleton.parameters())
        in_memory = MEMORY.is_dir() and size < shutil.disk_usage(MEMORY).free
        parent = MEMORY if in_memory else None
        path = Path(cleanup.enter_context(tempfile.TemporaryDirectory(dir=parent)))
    folder = RunFolder("--offload", path)
    cleanup.callback(folder.clear)
    folder.begin({})
    return folder
