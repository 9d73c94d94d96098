"""Load the dense model of a run, on the device or in files of blocks, as memory allows.

    loaded = load(job, at_end)  # the model and the runner of its blocks

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.run.job import Job, LoadedModel
from lib.util.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lib.model.weights import BlockFiles
    from lib.model.work_folder import WorkFolder
    from lib.pruning.neurons import Removal
    from lib.run.memory import MemoryDecision, Training


def load(job: Job, at_end: ExitStack) -> LoadedModel:
    """Load the dense model where it fits; `at_end` closes and removes what that needs."""
    from lib.model import pretrained
    from lib.model.blocks import BlockRunner
    from lib.model.finite import check_finite
    from lib.model.weights import BlockWeights
    from lib.util.host import gib, keep_freed_memory

    keep_freed_memory()
    if job.finished:
        at_end.callback(job.finished.close)
    _check_outputs_room(job)
    size = _scratch_bytes(job)
    place, shared = _place_of_blocks(job, size)
    decision = _check_memory(job, shared)
    with job.timed("load"):
        if decision.fetched and place is None:
            raise UserError(
                f"{job.checkpoint}: its blocks need {gib(size)} beside the device, for which there "
                "is no room in memory or in the folder for temporary files; give --offload FOLDER"
            )
        if decision.fetched:
            folder = at_end.enter_context(_scratch_folder(job, place, shared))
            model, files = _read_in_files(job, folder, shared)
        else:
            model, files = _read_model(job, {"": job.device}), None
    weights = BlockWeights(
        pretrained.decoder_blocks(model)[1],
        job.device,
        files,
        rounding=pretrained.saved_dtype(job.args.dtype, job.config),
        exact=frozenset(model._keep_in_fp32_modules_strict or ()),
        finished=job.finished,
        resumes=bool(job.args.resume and (job.method_spec or job.rounding)),
        dist=job.dist,
    )
    runner = BlockRunner(model, job.device, weights)
    if weights.resident:  # otherwise every block is checked when it is fetched
        check_finite(runner)
    runner.verify()
    size = pretrained.footprint(model)
    return LoadedModel(
        model=model,
        blocks=runner.blocks,
        runner=runner,
        state_device=decision.state_device,
        footprint=size,
        checkpointed=decision.checkpointed,
        cache_inputs=decision.cache_inputs,
    )


def _check_outputs_room(job: Job) -> None:
    """Raise UserError if the disks of --save_model and --resume lack room for the run's files."""
    from lib.model.pretrained import saved_dtype
    from lib.util.files import check_room

    args, skeleton = job.args, job.skeleton
    if not job.dist.is_main or not (job.method_spec or job.schedule or job.rounding):
        return
    saved = saved_dtype(args.dtype, job.config).itemsize
    inside = sum(p.numel() for p in skeleton.get_submodule(job.blocks_name).parameters())
    total = sum(p.numel() for p in skeleton.parameters())
    if args.save_model and not args.load_bit and not args.replace_sparse_layers:
        check_room("--save_model", args.save_model, total * saved)
    if job.finished:
        needed = inside * (4 if args.load_bit else saved) if job.method_spec else 0
        if job.rounding:
            needed += inside * _kept_dtype(job).itemsize
        if job.schedule:  # trained weights, AdamW's two averages, and the best weights so far
            needed += inside * (3 * 4 + saved) if job.schedule.rank is None else inside * saved
        check_room("--resume", args.resume, needed - job.finished.size())


def _scratch_bytes(job: Job) -> int:
    """Return the bytes of the files of all blocks, for blocks that do not stay on the device."""
    from lib.model.access import stored_names
    from lib.model.offload import scratch_bytes
    from lib.model.pretrained import pick_dtype

    args = job.args
    return scratch_bytes(
        job.skeleton,
        job.blocks_name,
        stored=stored_names(job.checkpoint) if Path(args.model).is_dir() else {},
        loaded=pick_dtype(args.dtype, job.config, job.device),
        rounding=_kept_dtype(job),
    )


def _kept_dtype(job: Job) -> torch.dtype:
    """Return the dtype in which the blocks' changed weights are kept until they are saved."""
    from lib.model.pretrained import pick_dtype, saved_dtype

    if job.rounding and job.args.pack_bits == 8:  # integers times scales, which 16 bits can't hold
        return pick_dtype(job.args.dtype, job.config, job.device)
    return saved_dtype(job.args.dtype, job.config)


def _place_of_blocks(job: Job, size: int) -> tuple[Path | None, bool]:
    """Return the folder for files of blocks, None if none has room, and whether processes share it.

    `size` are the bytes of the files. The processes of each machine share them, or none do.
    """
    from lib.model.offload import can_be_shared, place_in_memory
    from lib.util.files import check_room
    from lib.util.host import available

    args, dist = job.args, job.dist
    blocks = job.skeleton.get_submodule(job.blocks_name)
    # every process needs its own copy of trained or quantised weights
    needs_copy = job.schedule or args.load_bit or not can_be_shared(job.skeleton, blocks)
    shared = not needs_copy and all(dist.all_gather_object(dist.local_size > 1))
    writers = 1 if shared else dist.local_size
    if args.offload:
        check_room("--offload", args.offload, writers * size)
        return Path(args.offload), shared
    if not shared and job.device.type == "cpu":
        return None, False
    outside = sum(p.nbytes for p in job.skeleton.parameters())
    place = place_in_memory(writers * size + (outside if shared else 0), available())
    places = dist.all_gather_object(place)
    place = places[
        dist.rank - dist.local_rank
    ]  # the machine's first process decides for all of them
    return place, shared and None not in places


def _scratch_folder(job: Job, place: Path, shared: bool) -> AbstractContextManager[WorkFolder]:
    """Return the folder for the blocks of this process, or of its machine if they are `shared`."""
    from lib.model.offload import offload_folder, temporary_folder

    if job.args.offload:
        return offload_folder(job.args.offload, job.dist, shared)
    return temporary_folder(place, job.dist, shared)


def _read_in_files(job: Job, folder: WorkFolder, shared: bool) -> tuple[nn.Module, BlockFiles]:
    """Load the dense model with its blocks in files; return both."""
    from lib.model.access import stored_names
    from lib.model.offload import device_map, read_in_files
    from lib.model.pretrained import skeleton

    where = device_map(job.skeleton, job.blocks_name, job.device)
    return read_in_files(
        read=lambda converted: _read_model(job, where, converted),
        empty=lambda: skeleton(job.config, job.checkpoint),
        stored=stored_names(job.checkpoint),
        folder=folder,
        dist=job.dist,
        device=job.device,
        shared=shared,
        in_memory=not job.args.offload,
    )


def _read_model(job: Job, where: dict[str, Any], converted: str | None = None) -> nn.Module:
    """Load the dense model, each part on the device that `where` maps it to.

    Weights on disk that transformers converts on loading go into the folder `converted`.
    """
    from lib.model.pretrained import load_model, pick_dtype

    args = job.args

    def read() -> nn.Module:
        return load_model(
            job.checkpoint,
            job.config,
            dtype=pick_dtype(args.dtype, job.config, job.device),
            device_map=where,
            offload=converted,
            load_bit=args.load_bit,
        )

    quantised = args.load_bit or getattr(job.config, "quantization_config", None)
    if len(where) > 1 or quantised or job.dist.size > 1:
        return read()
    return job.cache.model(job.model_key, job.device, read)


def _check_memory(job: Job, shared: bool) -> MemoryDecision:
    """Decide where blocks and hidden states are kept, and print the estimate of memory."""
    from lib.model.pretrained import checkpoint_dtype, pick_dtype, saved_dtype
    from lib.model.quantised import packed_linears, stored_bits
    from lib.model.shapes import PackedLinears, Workload, shapes
    from lib.pruning.by_error import WINDOWS
    from lib.run.memory import Plan, check_memory

    args, dist, texts = job.args, job.dist, job.texts
    working = pick_dtype(args.dtype, job.config, job.device)
    stored = checkpoint_dtype(job.config)
    drawn = 0 if texts.windows is None else len(texts.windows)
    sizes = [drawn, sum(len(test.windows) for test in texts.tests), min(WINDOWS, drawn)]
    windows, tests, probed = (len(range(count)[dist.share(count)]) for count in sizes)
    load = Workload(
        shapes=shapes(job.skeleton, job.blocks_name),
        seqlen=job.seqlen,
        batch_size=job.batch_size,
        windows=windows,
        tests=tests,
        working=working,
        saved=saved_dtype(args.dtype, job.config),
        device=job.device.type,
    )
    packed, bits = packed_linears(job.config)
    plan = Plan(
        load=load,
        method_spec=job.method_spec,
        removal=_removal(job),
        rounding=job.rounding,
        load_bit=args.load_bit or stored_bits(job.config),
        stored=None if stored == working else stored,
        on_disk=bool(args.offload),
        training=_training(job),
        processes=dist.local_size,
        shared=shared,
        packed=PackedLinears.of(packed, bits),
        pack_bits=args.pack_bits if args.replace_sparse_layers else None,
        probed=max(1, probed) if args.allocation == "error" else 0,
        teacher=job.teacher_weights[1],
        teacher_read=job.teacher_weights[0],
        compared=_compared_bytes(job, working),
    )
    decision = check_memory(plan, job.device, lambda fetched: any(dist.all_gather_object(fetched)))
    if dist.is_main:
        print(decision.line, flush=True)
    return decision


def _compared_bytes(job: Job, working: torch.dtype) -> int:
    """Return the bytes of the dense model's hidden states that evaluation compares with."""
    from lib.quality.reference import reference_bytes

    if not job.has_dense:
        return 0
    width = job.config.get_text_config(decoder=True).hidden_size
    counts = [len(test.windows) for test in job.texts.tests]
    return reference_bytes(counts, job.seqlen * width * working.itemsize, job.dist)


def _training(job: Job) -> Training | None:
    """Return the settings of the recovery that its memory depends on; None without one."""
    from lib.run.memory import Training

    if not job.schedule:
        return None
    share = -(-job.schedule.windows // job.dist.size)  # of a step's windows
    return Training(
        rank=job.schedule.rank,
        batch_size=min(job.batch_size, share),
    )


def _removal(job: Job) -> Removal | None:
    """Return how many neurons go, with the shapes of what is left; None where none go."""
    from lib.model.pretrained import skeleton
    from lib.model.shapes import shapes
    from lib.pruning.neurons import Removal

    if not job.mlps:
        return None
    config = copy.deepcopy(job.config)
    job.mlps.set_width(config, job.neurons_left)
    smaller = shapes(skeleton(config, job.checkpoint), job.blocks_name)
    return Removal(job.mlps.width, job.neurons_left, smaller)
