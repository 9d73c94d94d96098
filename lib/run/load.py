"""How a run comes to the dense model, where it has room.

    loaded = load(job, at_end)  # the model, and what runs its blocks

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from lib.run.job import Job, LoadedModel

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lib.model.fetched import Sharing
    from lib.model.placement import BlockPlacement
    from lib.run.memory import Room, Training


def load(job: Job, at_end: ExitStack) -> LoadedModel:
    """The dense model, where it has room; `at_end` gets what is to be cleared away then."""
    from lib.model import pretrained
    from lib.model.blocks import BlockRunner
    from lib.model.finite import check_finite
    from lib.util.host import keep_freed_memory

    keep_freed_memory()
    sharing = _sharing(job)
    room = _see_memory(job, sharing is not None)
    with job.timed("load"):
        if room.fetched:
            model, placement = _fetched(job, at_end, sharing)
        else:
            model, placement = _read_model(job, {"": job.device}), None
            if sharing:
                sharing.close()
    runner = BlockRunner(model, job.device, placement)
    if placement is None:  # otherwise every block is checked when it is fetched
        check_finite(runner)
    runner.verify()
    size = pretrained.footprint(model)
    return LoadedModel(
        model, runner.blocks, runner, room.state_device, size, room.checkpointed, room.cache_inputs
    )


def _sharing(job: Job) -> Sharing | None:
    """How the processes of this machine come to one copy of the blocks; None where they don't."""
    from lib.model.fetched import Sharing, can_be_shared

    blocks = job.skeleton.get_submodule(job.blocks_name)
    # what is trained, and what is quantised, must be each process's own
    if job.schedule or job.args.load_bit or not can_be_shared(job.skeleton, blocks):
        return None
    return Sharing.arrange(job.dist)


def _fetched(
    job: Job, at_end: ExitStack, sharing: Sharing | None
) -> tuple[nn.Module, BlockPlacement]:
    """The dense model with its blocks on the host, or on disk under `--offload`."""
    from lib.model.fetched import fetched_model
    from lib.model.placement import device_map
    from lib.model.pretrained import saved_dtype, skeleton

    args, folder = job.args, None
    where: dict[str, Any] = {"": job.device}
    if args.offload or job.device.type == "cuda":
        place = "disk" if args.offload else "cpu"
        where = device_map(job.skeleton, job.blocks_name, job.device, place)
    if args.offload:
        folder = at_end.enter_context(_offload_folder(job, sharing is not None))
    return fetched_model(
        lambda: _read_model(job, where, folder),
        lambda: skeleton(job.config, job.checkpoint),
        job.device,
        sharing,
        folder,
        saved_dtype(args.dtype, job.config),
    )


def _read_model(job: Job, where: dict[str, Any], folder: str | None = None) -> nn.Module:
    """The dense model, each part on the device that `where` says."""
    from lib.model.pretrained import load_model, pick_dtype

    args = job.args

    def read() -> nn.Module:
        return load_model(
            job.checkpoint,
            job.config,
            dtype=pick_dtype(args.dtype, job.config, job.device),
            device_map=where,
            offload=folder,
            load_bit=args.load_bit,
        )

    quantised = args.load_bit or getattr(job.config, "quantization_config", None)
    if len(where) > 1 or quantised or job.dist.size > 1:
        return read()
    return job.cache.model(job.model_key, job.device, read)


def _offload_folder(job: Job, shared: bool) -> AbstractContextManager[str]:
    """The part of `--offload` that is this process's, or its machine's, which has room."""
    from lib.model.fetched import check_offload_room, own_folder
    from lib.model.pretrained import pick_dtype, saved_dtype

    args = job.args
    loaded = pick_dtype(args.dtype, job.config, job.device)
    saved = saved_dtype(args.dtype, job.config)
    sizes = args.offload, args.model, job.skeleton, job.blocks_name, loaded, saved
    check_offload_room(*sizes, 1 if shared else job.dist.local_size)
    return own_folder(args.offload, job.dist, shared)


def _see_memory(job: Job, shared: bool) -> Room:
    """Tell how much memory the run will take, and where."""
    from lib.model.pretrained import checkpoint_dtype, pick_dtype, saved_dtype
    from lib.model.quantised import packed_linears, stored_bits
    from lib.pruning.by_error import WINDOWS
    from lib.run.memory import PackedLinears, Plan, check_memory, shapes

    args, dist, texts = job.args, job.dist, job.texts
    working = pick_dtype(args.dtype, job.config, job.device)
    stored = checkpoint_dtype(job.config)
    drawn = 0 if texts.windows is None else len(texts.windows)
    windows = [drawn, sum(len(test.windows) for test in texts.tests), min(WINDOWS, drawn)]
    *passing, probed = (len(range(count)[dist.share(count)]) for count in windows)
    plan = Plan(
        shapes(job.skeleton, job.blocks_name),
        job.method_spec,
        *passing,
        job.seqlen,
        job.batch_size,
        working,
        saved_dtype(args.dtype, job.config),
        args.load_bit or stored_bits(job.config),
        None if stored == working else stored,
        on_disk=bool(args.offload),
        training=_training(job),
        device=job.device.type,
        processes=dist.local_size,
        shared=shared,
        packed=PackedLinears.of(*packed_linears(job.config)),
        pack_bits=args.pack_bits if args.replace_sparse_layers else None,
        probed=max(1, probed) if args.allocation == "error" else 0,
        compared=_compared_bytes(job, working),
    )
    room = check_memory(plan, job.device, lambda fetched: any(dist.all_gather_object(fetched)))
    if dist.is_main:
        print(room.line, flush=True)
    return room


def _compared_bytes(job: Job, working: torch.dtype) -> int:
    """Host memory of the dense model's hidden states that evaluation compares with, in bytes."""
    from lib.quality.reference import reference_bytes

    if not (job.method_spec or job.schedule):
        return 0
    width = job.config.get_text_config(decoder=True).hidden_size
    counts = [len(test.windows) for test in job.texts.tests]
    return reference_bytes(counts, job.seqlen * width * working.itemsize, job.dist)


def _training(job: Job) -> Training | None:
    """What the recovery means for memory."""
    from lib.run.memory import Training

    if not job.schedule:
        return None
    share = -(-job.schedule.windows // job.dist.size)  # of a step's windows
    return Training(job.schedule.rank, min(job.batch_size, share), bool(job.args.teacher))
