"""Load the dense model of a run, on the device or in files of blocks, as memory allows.

Memory is a rule: the weights and hidden states against what is free decide whether blocks are
fetched one at a time, where hidden states are, and what is kept in memory to save passes. Nothing
is refused on an estimate; what does not fit ends in one line that names the flags to use.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lib.model import pretrained
from lib.model.access import stored_names
from lib.model.blocks import BlockRunner
from lib.model.run_folder import RunFolder
from lib.model.store import CONVERTED, BlockStore, Files, are_apart, device_map, place_blocks
from lib.run.job import Job
from lib.util.errors import UserError
from lib.util.host import available, gib, keep_freed_memory

BITS = {"4": 4.5, "8": 8.1}  # for each weight of --load_bit, scales included
TRAINED = 16  # bytes of a trained weight: float32, gradient and AdamW's two averages
CACHED = 8  # inputs of a block's linears, in hidden states
KEPT = 40  # activations of a block that a backward pass needs, in hidden states of a batch
MEMORY = Path("/dev/shm")  # on Linux: files in memory


def load(job: Job, cleanup: ExitStack) -> BlockRunner:
    """Load the dense model where it fits; `cleanup` closes and removes what that needs."""
    keep_freed_memory()
    plan = plan_memory(job)
    with job.timed("load"):
        if plan.fetched:
            model, files = _read_in_files(job, cleanup)
        else:
            model, files = _read_model(job, {"": job.device}), None
    save_dtype = pretrained.saved_dtype(job.args.dtype, job.config, job.plan.narrows)
    if job.plan.narrows and not plan.fetched:
        with pretrained.cast(model, save_dtype):
            pass  # the model is measured as it will be saved
    name, blocks = pretrained.decoder_blocks(model)
    weights = BlockStore(
        blocks,
        job.device,
        name,
        files=files,
        save_dtype=save_dtype,
        exact=frozenset(model._keep_in_fp32_modules_strict or ()),
        finished=job.store,
        resumes=any(job.dist.all_gather_object(bool(job.store and job.plan.changes))),
        dist=job.dist,
    )
    runner = BlockRunner(
        model,
        job.device,
        weights,
        dist=job.dist,
        batch_size=job.batch_size,
        state_device=plan.state_device,
        cache_inputs=plan.cache_inputs,
        save_dtype=save_dtype,
    )
    runner.checkpointed = plan.checkpointed
    if weights.resident:  # otherwise every block is checked when it is fetched
        runner.check_finite()
    try:
        runner.verify()
    except UserError as error:
        if job.plan.changes or job.plan.has_dense:
            raise
        runner.whole = True
        runner.verify()
        job.print(f"measured as a whole: {error}")
    return runner


@dataclass(frozen=True)
class MemoryPlan:
    """What is kept where."""

    fetched: bool  # blocks come to the device one at a time
    state_device: torch.device  # holds hidden states between two blocks
    cache_inputs: bool  # of the linears of a block; saves passes through it
    checkpointed: bool  # activations are computed again in training


def plan_memory(job: Job) -> MemoryPlan:
    """Decide where blocks and hidden states are kept, and print one line on it."""
    args, dist, config = job.args, job.dist, job.config
    blocks = job.skeleton.get_submodule(job.blocks_name)
    dtype = pretrained.pick_dtype(args.dtype, config, job.device)
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
    quantised = args.load_bit or getattr(config, "quantization_config", None)
    apart = not quantised and not job.schedule and are_apart(blocks)
    if args.offload and not apart:
        raise UserError(
            f"--offload {args.offload}: the model's blocks share weights, or are quantised; leave "
            "it out"
        )
    many = 2 * weights > free if gpu else dist.local_size > 1
    fetched = any(dist.all_gather_object(bool(args.offload or (apart and many))))
    texts, width = job.texts, config.get_text_config(decoder=True).hidden_size
    windows = 0 if texts.windows is None else len(texts.windows)
    windows = len(range(windows)[dist.share(windows)])
    hidden = 2 * windows * job.seqlen * width * dtype.itemsize  # pruned and dense stream
    left = free - (3 * weights // len(blocks) if fetched else weights)
    on_device = not gpu or 4 * hidden < left
    batch = job.batch_size * job.seqlen * width * dtype.itemsize
    training = TRAINED * inside + weights + KEPT * len(blocks) * batch
    where = "" if not gpu else f" on {job.device}" if on_device else " on the host"
    job.print(
        f"memory: weights {gib(weights)}{', one block at a time' if fetched else ''}, hidden "
        f"states {gib(hidden)}{where}, of {gib(free)} free"
    )
    return MemoryPlan(
        fetched=fetched,
        state_device=job.device if on_device else torch.device("cpu"),
        cache_inputs=left - hidden > CACHED * hidden,
        checkpointed=training > free,
    )


def _read_in_files(job: Job, cleanup: ExitStack) -> tuple[nn.Module, Files]:
    """Load the dense model with its blocks in files, which the ranks of a machine share."""
    folder = _block_folder(job, cleanup) if job.dist.is_local_main else None
    if folder:
        converted = folder.folder
    else:  # this rank maps what it converts itself
        converted = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    (converted / CONVERTED).mkdir(exist_ok=True)
    where = device_map(job.skeleton, job.blocks_name, job.device)
    model = _read_model(job, where, str(converted / CONVERTED))
    places = place_blocks(model, job.blocks_name, stored_names(job.checkpoint), converted)
    return model, Files(places, folder, on_disk=bool(job.args.offload))


def _block_folder(job: Job, cleanup: ExitStack) -> RunFolder:
    """Return where this machine keeps changed blocks: the run's own folder, or a temporary one."""
    if job.store:
        return job.store
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


def _read_model(job: Job, where: dict, converted: str | None = None) -> nn.Module:
    """Load the dense model, each part on the device that `where` maps it to.

    Weights on disk that transformers converts on loading go into the folder `converted`.
    """
    return pretrained.load_model(
        job.checkpoint,
        job.config,
        dtype=pretrained.pick_dtype(job.args.dtype, job.config, job.device),
        device_map=where,
        offload=converted,
        load_bit=job.args.load_bit,
    )
