"""The checks of a run before any weight is read: all that can fail cheaply fails here."""

from __future__ import annotations

import argparse
import copy
import shutil
from dataclasses import replace
from datetime import date
from operator import le
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.documents import are_dialogues, check_source, read_documents, read_line
from ..data.samples import as_windows
from ..data.sources import is_parted
from ..data.templates import set_date, writes_date
from ..distributed.context import DistContext, local_device
from ..methods.sparsity import ALLOCATIONS, EXPERTS
from ..model import pretrained
from ..model.access import Checkpoint
from ..model.parts import find_parts
from ..model.processor import processor_ids
from ..model.quantized import check_format, stored_bits
from ..model.rows import config_token_ids, keep_rows_, trimmable_rows
from ..model.run_folder import JOB, RunFolder, begun_with
from ..packed.formats import FORMATS
from ..pruning.allocation import read_layers
from ..pruning.inputs import check_widths
from ..pruning.masks import check_new_file
from ..recover import CROSS_ENTROPY, TrainSchedule
from ..remove import experts_left, neurons_left
from ..sharded import check_rows, ranks_of_state
from ..sparse import check_packable
from ..util.errors import UserError
from ..util.files import check_new_folder, check_writable, partial_of
from ..util.host import gib
from ..util.progress import quiet
from ..vocabulary import TrimmedVocabulary, trim_vocabulary
from .fingerprint import EARLIER, fingerprint, first_difference
from .flags import named, shown
from .job import Job
from .plan import Plan
from .save import CARD
from .tasks import check_tasks
from .texts import named_sources, read_texts, same_texts


def check(
    args: argparse.Namespace,
    shared: Path | None = None,
    longest: int = pretrained.LONGEST_WINDOW,
) -> Job:
    """Check outputs, texts, device, config, tokenizer, vocabulary and windows, cheapest first.

    `shared` is the folder in which the runs of a sweep share the dense model's states. `longest` is
    the longest window, in tokens, without --seqlen. Raises UserError for a run that cannot succeed.
    """
    plan = Plan.of(args)
    check_outputs(args)
    if args.load_bit or args.recover_optimizer == "adamw8bit":
        import bitsandbytes  # noqa: F401 -- fails early if it is not installed
    sources, vocabulary_sources, tests = named_sources(args, plan)
    read = [(source, "train") for source in sources] if plan.reads_train else []
    read += [(each, "train") for each in vocabulary_sources if (each, "train") not in read]
    read += [(source, "test") for source in tests]
    _check_readable(read, hub=False)
    job = _open_model(args, plan, longest)
    _set_date(job)
    job = replace(
        job,
        shared=shared,
        sources=sources,
        vocabulary_sources=vocabulary_sources,
        tests=tests,
    )
    _check_readable(read, hub=True)
    folders = [(one, split) for one, split in read if one.path and one.path.is_dir()]
    job.print(*dict.fromkeys(read_line(one, split) for one, split in folders))
    for test in tests:
        if is_parted(test, "test"):
            count = len(test.read["test"])
            job.print(f"{test.text}: {count} documents, a tenth, are held out for evaluation")
    job.print(*same_texts([source for source, split in read if split == "train"], tests))
    if plan.tokens:
        job = replace(job, schedule=_schedule(job))
    if plan.trims:
        vocabulary = _vocabulary(job)
        job = replace(job, vocabulary=vocabulary, tokenizer=vocabulary.tokenizer)
    if plan.teacher:
        job = _with_teacher(job)
    job = read_texts(job, None)
    if job.schedule and args.recover < job.seqlen:
        raise UserError(
            f"{shown(args, 'recover')}: it is less than one step, a window of {job.seqlen} "
            f"tokens. Give at least {job.seqlen}, or a smaller --seqlen."
        )
    width = job.config.get_text_config(decoder=True).hidden_size
    size = args.batch_size or pretrained.default_batch_size(job.device, job.seqlen, width)
    job = replace(job, batch_size=size)
    _check_tokens(job)
    if job.shares:
        blocks = job.small_skeleton().get_submodule(job.blocks_name)
        check_rows(blocks, job.blocks_name, job.dist.size)
    return open_store(job)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError if the run cannot write its outputs."""
    args.save = args.save or Plan.of(args).default_save(args.model)
    check_writable("--save", args.save)
    if args.save_masks:
        check_new_file("--save_masks", args.save_masks)
    if args.save_model:
        check_new_folder("--save_model", args.save_model)
        _check_unfinished(args, partial_of(args.save_model))
    if args.tasks:
        check_tasks(args.tasks, args.include_path)


def _check_unfinished(args: argparse.Namespace, stage: Path) -> None:
    """Raise UserError if OUT.partial is left by another run, and this run does not continue it."""
    left = {each.name for each in stage.iterdir()} if stage.exists() else set()
    problem, resumed = None, Path(args.resume) if args.resume else None
    if CARD in left:
        problem = f"is the complete model of a run that was killed. Rename it to {args.save_model}."
    elif resumed and (resumed / JOB).exists() and JOB not in left and "config.json" in left:
        return  # the run was killed while it saved, and saves again
    elif left and not (resumed and resumed.resolve() == stage.resolve()):
        can_resume = f"Continue it with --resume {stage}, or remove" if JOB in left else "Remove"
        problem = f"holds the state of an unfinished run. {can_resume} the folder."
    if problem:
        raise UserError(f"--save_model {args.save_model}: {stage} {problem}")


def _check_readable(sources: list[tuple[Any, str]], hub: bool) -> None:
    for source, split in sources:
        if bool(source.hub) == hub:
            check_source(source, split)


def _open_model(args: argparse.Namespace, plan: Plan, longest: int) -> Job:
    """Read config and tokenizer, and check that the flags fit the model's shape."""
    quiet()
    device = local_device(pretrained.pick_device(args.device))
    pretrained.set_current_device(device)
    dist = DistContext(device)
    checkpoint = Checkpoint(
        args.model, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    config = pretrained.load_config(checkpoint)
    checkpoint = checkpoint.pinned(config)
    changing = named(changes_alone=True)
    check_format(
        checkpoint,
        config,
        load_bit=args.load_bit,
        changes=next((f"--{name}" for name in changing if getattr(args, name)), None),
        offload=args.offload_folder,
    )
    skeleton = pretrained.skeleton(config, checkpoint)
    blocks_name, blocks = pretrained.decoder_blocks(skeleton)
    layout = left = None
    if plan.removes:
        layout = find_parts(plan.removes, config, checkpoint, skeleton, blocks_name)
        count_left = experts_left if plan.removes == EXPERTS else neurons_left
        left = count_left(layout, plan.sparsity.ratio)
    elif plan.method:
        check_widths(blocks, blocks_name, plan.sparsity)
        if plan.allocation not in ALLOCATIONS:
            read_layers(plan.allocation, blocks, blocks_name, plan.sparsity)
    if plan.method and not plan.removes and not FORMATS[plan.format].zero:
        raise UserError(
            f"{shown(args, 'quantize')}: it has no 0, as --prune_method {plan.method} needs. Use "
            "--quantize q4_0, or --sparsity_type neurons or experts."
        )
    if args.text_only:
        pretrained.text_alone(skeleton, checkpoint)  # raises if that is impossible
    if plan.packs:
        check_packable(skeleton, blocks_name)
    job = Job(
        args=args,
        plan=plan,
        device=device,
        dtype=pretrained.pick_dtype(args.dtype, config, device),
        save_dtype=pretrained.saved_dtype(args.dtype, config, plan.fake_quantizes),
        dist=dist,
        checkpoint=checkpoint,
        config=config,
        tokenizer=pretrained.load_tokenizer(checkpoint),
        seqlen=pretrained.window_length(config, args.seqlen, longest),
        skeleton=skeleton,
        blocks_name=blocks_name,
        layout=layout,
        left=left,
    )
    if args.device is None:
        job.print(f"device: {device}")
    return job


def _set_date(job: Job) -> None:
    """Set --date, alike in all ranks, if the chat template writes one; else to None."""
    args = job.args
    day = args.date or begun_with(args.resume, "--date") or str(date.today())
    asks = not args.no_chat_template and writes_date(job.tokenizer)
    args.date = job.dist.all_gather_object(day if asks else None)[0]
    if args.date:
        set_date(args.date)


def _vocabulary(job: Job) -> TrimmedVocabulary:
    """Choose the tokens to keep; the smaller tokenizer is checked on every test text.

    Raises UserError if the model or its tokenizer cannot be trimmed, or if a text would decode
    differently.
    """
    rows = trimmable_rows(job.skeleton, job.checkpoint)
    ids = config_token_ids(job.checkpoint, job.config)
    if getattr(job.skeleton, "unread", None):
        ids |= processor_ids(job.checkpoint, job.tokenizer)
    with job.timed("vocabulary"):
        vocabulary = trim_vocabulary(
            job.tokenizer,
            job.checkpoint,
            config=job.config,
            sources=job.vocabulary_sources,
            dist=job.dist,
            rows=rows,
            config_ids=ids,
        )
        lines = vocabulary.verify(job.tests)
        vocabulary.hold_out(job.tests[0], job.seqlen)
    job.print(vocabulary.summary(), *lines)
    return vocabulary


def _schedule(job: Job) -> TrainSchedule:
    """Return the schedule of the recovery. Raises UserError if the model cannot be trained."""
    args, plan, flag = job.args, job.plan, shown(job.args, "recover")
    if stored_bits(job.config):
        problem = f"the weights of {args.model} are quantized and cannot be trained"
        raise UserError(f"{flag}: {problem}. Name the unquantized model.")
    chats = any(are_dialogues(read_documents(source, "train")[0]) for source in job.sources)
    default = 0.0 if chats else CROSS_ENTROPY  # the model did not write the answers of a chat
    return TrainSchedule(
        tokens=args.recover,
        seqlen=job.seqlen,
        rate=args.recover_lr,
        rank=args.recover_rank,
        optimizer=args.recover_optimizer,
        ce_weight=default if args.recover_ce_weight is None else args.recover_ce_weight,
        seed=args.seed,
        pruned=not plan.quantizes or bool(plan.method or plan.teacher),
        ranks=job.dist.size,
    )


def _with_teacher(job: Job) -> Job:
    """Return the job with its teacher. Raises UserError if the model was not made from it."""
    checkpoint = replace(job.checkpoint, name=job.args.teacher, flag="--teacher", revision=None)
    config = pretrained.load_config(checkpoint)
    checkpoint = checkpoint.pinned(config)
    check_format(checkpoint, config, load_bit=None, changes="--recover")
    if stored_bits(config):
        raise UserError(f"{checkpoint}: it is quantized. Name the unquantized model.")
    dense = copy.deepcopy(pretrained.skeleton(config, checkpoint))  # and its config
    model = copy.deepcopy(job.skeleton)
    if job.vocabulary:
        keep_rows_(model, job.vocabulary.rows)
    rows = _teacher_rows(job, checkpoint, model)
    if rows is not None:
        trimmable_rows(dense, checkpoint)
        keep_rows_(dense, rows)
    return replace(
        job,
        teacher=checkpoint,
        teacher_config=config,
        teacher_rows=rows,
        smaller=_is_smaller(job, checkpoint, dense, model),
    )


def _is_smaller(job: Job, checkpoint: Checkpoint, dense: nn.Module, model: nn.Module) -> bool:
    """Return whether the blocks have fewer rows or columns; no other shape may differ."""
    changed = pretrained.changed_shapes(model, dense)
    for name, (ours, theirs) in changed.items():
        lost = len(ours) == len(theirs) and all(map(le, ours, theirs))
        if not lost or not name.startswith(f"{job.blocks_name}."):
            raise UserError(
                f"{checkpoint}: its {name} is {list(theirs) or 'missing'}, and that of "
                f"{job.checkpoint} is {list(ours) or 'missing'}. Name the dense model that it was "
                "made from."
            )
    return bool(changed)


def _teacher_rows(job: Job, checkpoint: Checkpoint, model: nn.Module) -> Tensor | None:
    """Return the rows of the teacher's vocabulary that `model` has; None: all of them.

    Raises UserError if the teacher lacks tokens of the model.
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
            f"{checkpoint}: its vocabulary differs from that of {job.checkpoint}. Name the dense "
            "model that it was made from."
        )
    return torch.tensor([teacher_ids[token] for token, _ in tokens])


def _check_tokens(job: Job) -> None:
    """Raise UserError if the texts have tokens for which the model's embedding has no row."""
    rows = job.skeleton.get_input_embeddings().num_embeddings
    texts = job.texts
    sets = [texts.windows, *(test.windows for test in texts.tests)]
    if texts.training:
        sets += [texts.training.windows, texts.training.held_out]
    highest = max(int(as_windows(one).ids.max()) for one in sets if one is not None and len(one))
    if highest >= rows:
        token = job.tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"--model {job.args.model}: the texts have token {highest} ({token!r}), but the "
            f"embedding has {rows} rows. Use the tokenizer of this model, or add rows with "
            "resize_token_embeddings."
        )


def open_store(job: Job) -> Job:
    """Open the folder of finished blocks: --resume, --offload_folder, or beside --save_model.

    Returns the job with its fingerprint. Raises UserError if that of an interrupted run, or of
    another rank, differs.
    """
    args, changes = job.args, job.plan.changes
    places = [
        ("--resume", args.resume if changes else None),
        ("--offload_folder", args.offload_folder),
    ]
    if changes and args.save_model:
        places.append(("--save_model", str(partial_of(args.save_model))))
    flag, path = next(((flag, path) for flag, path in places if path), (None, None))
    weighed = bool(path and changes) or job.shared is not None
    job = replace(job, fingerprint=job.fingerprint or fingerprint(job, weighed))
    pruning = job.fingerprint["pruning"]
    job.dist.check_equal(pruning | job.fingerprint["measuring"])
    if path and job.dist.is_main:
        job = _open_folder(job, flag, path, pruning)
    if changes and job.shares:
        _check_seen(job, flag, job.outcome.folder)
    return job


def _check_seen(job: Job, flag: str, folder: RunFolder | None) -> None:
    """Raise UserError if a rank cannot see the main rank's folder, where it has to write."""
    file = folder and (folder.path / JOB).absolute()
    file, text = job.dist.all_gather_object(file and (file, file.read_text("utf-8")))[0] or (0, 0)
    sees = not file or (file.is_file() and file.read_text("utf-8") == text)
    blind = [str(rank) for rank, sees in enumerate(job.dist.all_gather_object(sees)) if not sees]
    if blind:
        if folder:
            folder.close()
        raise UserError(
            f"{flag} {file.parent}: rank {', '.join(blind)} cannot see this folder, where "
            "each rank keeps its part of the training. Name one that all machines share."
        )


def _open_folder(job: Job, flag: str, path: str, pruning: dict[str, Any]) -> Job:
    """Open a folder of finished blocks, in the main rank."""
    check_room(job, flag, path)
    store = RunFolder(flag, path)
    changed, problem = store.begun and first_difference(EARLIER | store.begun, pruning), None
    if store.begun is not None and flag != "--resume":
        problem = f"it holds the state of an unfinished run. Add --resume {path} to continue it, "
        problem += "or remove the folder."
    elif changed:
        problem = "it was begun with {} {!r}, not {!r}. Give the same again, or another folder."
        problem = problem.format(*changed)
    elif store.begun is not None:
        ranks = ranks_of_state(store) - {job.dist.size if job.shares else 1}
        if ranks:
            problem = f"its training was begun with WORLD_SIZE {ranks.pop()}, not {job.dist.size}. "
            problem += "Start as many ranks, or give another folder."
    if problem:
        store.close()
        raise UserError(f"{flag} {path}: {problem}")
    before = store.decided.get("batch_size", job.batch_size)
    store.begin(pruning, batch_size=job.batch_size)
    job.outcome.folder = store
    if store.begun:
        total = len(job.skeleton.get_submodule(job.blocks_name))
        job.print(f"{flag} {path}: finished before: {store.summary(total)}")
    if before != job.batch_size:
        job.print(
            f"{flag} {path}: begun with --batch_size {before}, continued with {job.batch_size}; a "
            "run with a single batch size differs by rounding"
        )
    return job


def check_room(job: Job, flag: str, folder: str | Path) -> None:
    """Print the maximum size of the training checkpoints. Raises UserError if the disk is full."""
    if not job.schedule:
        return
    blocks = job.small_skeleton().get_submodule(job.blocks_name)
    # bytes per weight: its best value, its float32 master, and two averages
    state, eight_bits = job.dtype.itemsize, job.schedule.optimizer == "adamw8bit"
    state += 0 if job.schedule.rank else 6 if eight_bits else 12
    size = 2 * state + (6 if job.plan.quantizes else 0)  # old and new state exist together
    size *= sum(weight.numel() for weight in blocks.parameters())
    kept = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + kept
    line = f"{flag} {folder}: training needs up to {gib(size)} there, and {gib(free)} are free"
    if size > free:
        raise UserError(f"{line}. Make room, or name a folder on another disk.")
    job.print(line)
