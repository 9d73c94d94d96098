"""The checks of a run before any weight is read: all that can fail cheaply fails here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from operator import le
from pathlib import Path
from typing import Any

import torch

from ..calibration.allocation import read_layers
from ..calibration.inputs import check_widths
from ..calibration.mixed_types import read_types
from ..data.documents import Corpus, are_dialogues, check_corpus, read_line
from ..data.templates import set_date, writes_date
from ..data.windows import WindowSpec
from ..formats.grids import Types
from ..formats.registry import AUTO, FORMATS
from ..methods.sparsity import ALLOCATIONS
from ..model.bitsandbytes import check_format, stored_bits
from ..model.checkpoint import Checkpoint
from ..model.device import (
    default_batch_size,
    pick_device,
    pick_dtype,
    saved_dtype,
    set_current_device,
)
from ..model.masks import check_new_file
from ..model.matrix import unread_of
from ..model.pretrained import LONGEST_WINDOW, load_config, load_tokenizer, window_length
from ..model.saving import parameter_bytes, text_alone
from ..model.skeleton import build_skeleton, changed_shapes, decoder_blocks
from ..offload.sharded import check_rows, ranks_of_state
from ..sparse import check_packable
from ..stages.recover import CROSS_ENTROPY, TrainSchedule, state_bytes
from ..util.cli import typed
from ..util.errors import UserError
from ..util.files import check_new_folder, check_writable, partial_of
from ..util.host import gib
from ..util.progress import quiet
from ..util.ranks import DistContext, local_device
from ..util.resume import JOB, RunFolder, begun_with
from .fingerprint import EARLIER, TRIMS, fingerprint, first_difference
from .flags import named, shown
from .gguf_size import room_for_types
from .lm_eval import check_tasks
from .plan import TRIM, Flags
from .run import Model, Run, Teacher, kept_parts
from .save import CARD
from .trimmed import OTHER_TEACHER, read_list, teacher_rows
from .windows import (
    Corpora,
    RunWindows,
    draw_windows,
    may_need_bos,
    named_corpora,
    same_texts,
)

PACKED_AT_MOST = 8  # times as many bytes has the dense model, in 32 bits and packed in 4
# until benchmarks/results has a file of benchmarks/gpu/first_run.py
UNTRIED = "no real GPU has run this code, only a simulated one; report errors, or use --device cpu"


def check(
    flags: Flags,
    shared: Path | None = None,
    longest: int = LONGEST_WINDOW,
) -> Run:
    """Check outputs, texts, device, config, tokenizer and windows, cheapest first.

    `shared` is the folder in which the runs of a sweep share the dense model's states. `longest` is
    the longest window, in tokens, without --seqlen. Raises UserError for a run that cannot succeed.
    """
    check_outputs(flags)
    if flags.load_bit or flags.recover_optimizer == "adamw8bit":
        import bitsandbytes  # noqa: F401 -- fails early if it is not installed
    corpora = named_corpora(flags)
    read = corpora.read_by(flags)
    _check_readable(read, hub=False)
    quiet()
    device = local_device(pick_device(flags.device))
    set_current_device(device)
    dist = DistContext(device)
    model = open_model(flags, device, longest)
    form = _format(flags, model)
    if flags.device is None:
        dist.print(f"device: {device}")
    if device.type != "cpu":
        dist.print(f"{device}: {UNTRIED}")
    _set_date(flags, model.tokenizer, dist)
    _check_readable(read, hub=True)
    dist.print(*_lines_on_texts(read))
    schedule_of = _schedule(flags, model, corpora, dist) if flags.recover else None
    teacher = _open_teacher(flags, model) if flags.teacher else None
    spec = WindowSpec(model.tokenizer, model.window, seed=flags.seed)
    windows = draw_windows(flags, corpora, spec, schedule_of, dist)
    if not may_need_bos(flags, model.tokenizer):
        corpora.free()
    seqlen = windows.seqlen
    if flags.recover and flags.recover < seqlen:
        problem = f"it is less than one step, a window of {seqlen} tokens"
        fix = f"Give at least {seqlen}, or a smaller --seqlen"
        raise UserError(shown(flags, "recover"), problem, fix)
    size = flags.batch_size or default_batch_size(device, seqlen, model.width)
    _check_tokens(flags, model, windows)
    run = Run(
        flags=flags,
        dist=dist,
        model=model,
        corpora=corpora,
        windows=windows,
        batch_size=size,
        schedule=windows.schedule,
        teacher=teacher,
        form=form,
        shared=shared,
    )
    if flags.format == AUTO:
        room_for_types(run)  # raises if there is too little
    if run.is_sharded:
        check_rows(model.small_blocks, model.blocks_name, dist.size)
    if flags.save_model:
        check_disk(run, "--save_model", flags.save_model)
    place = folder_of(flags)
    run.fingerprint = fingerprint(run, bool(place and flags.changes) or shared is not None)
    run.folder = open_folder(run)
    return run


def check_outputs(flags: Flags) -> None:
    """Raise UserError if the run cannot write its outputs."""
    flags.save = flags.save or flags.default_save
    check_writable("--save", flags.save)
    if flags.save_masks:
        check_new_file("--save_masks", flags.save_masks)
    if flags.save_model:
        check_new_folder("{--save_model}", flags.save_model)
        _check_unfinished(flags, partial_of(flags.save_model))
    if flags.tasks:
        check_tasks(flags.tasks, flags.include_path)


def _check_unfinished(flags: Flags, partial: Path) -> None:
    """Raise UserError if OUT.partial is left by another run, and this run does not continue it."""
    left = {each.name for each in partial.iterdir()} if partial.exists() else set()
    what = f"{{--save_model}} {flags.save_model}"
    resumed = Path(flags.resume) if flags.resume else None
    if CARD in left:
        problem = f"{partial} is the complete model of a run that was killed"
        raise UserError(what, problem, f"Rename it to {flags.save_model}")
    if resumed and (resumed / JOB).exists() and JOB not in left and "config.json" in left:
        return  # the run was killed while it saved, and saves again
    if left and not (resumed and resumed.resolve() == partial.resolve()):
        can_resume = f"Continue it with --resume {partial}, or remove" if JOB in left else "Remove"
        problem = f"{partial} holds the state of an unfinished run"
        raise UserError(what, problem, f"{can_resume} the folder")


def _check_readable(read: list[tuple[Corpus, str]], hub: bool) -> None:
    for corpus, split in read:
        if bool(corpus.source.hub) == hub:
            check_corpus(corpus, split)


def _lines_on_texts(read: list[tuple[Corpus, str]]) -> Iterator[str]:
    """Yield lines on folders, held-out documents, and tests that the training text overlaps."""
    folders = [each for each in read if each[0].source.path and each[0].source.path.is_dir()]
    yield from dict.fromkeys(read_line(*each) for each in folders)
    train, tests = ([one for one, split in read if split == each] for each in ("train", "test"))
    for test in tests:
        if test.is_parted("test"):
            count = len(test.documents("test"))
            yield f"{test.source.text}: {count} documents, a tenth, are held out for evaluation"
    yield from same_texts(train, tests)


def open_model(flags: Flags, device: torch.device, longest: int) -> Model:
    """Read config and tokenizer, and check that the flags fit the model's shape."""
    checkpoint = Checkpoint(
        flags.model, cache_dir=flags.cache_dir, trust_remote_code=flags.trust_remote_code
    )
    config = load_config(checkpoint)
    checkpoint = checkpoint.pinned(config)
    changing = named(changes_alone=True)
    check_format(
        checkpoint,
        config,
        load_bit=flags.load_bit,
        changes=next((f"--{name}" for name in changing if getattr(flags, name)), None),
        offload=flags.offload_folder,
    )
    skeleton = build_skeleton(config, checkpoint)
    blocks_name, blocks = decoder_blocks(skeleton)
    layout = left = None
    if flags.removes:
        layout, left = kept_parts(flags, config, checkpoint, skeleton, blocks_name)
    elif flags.prune_method:
        check_widths(blocks, blocks_name, flags.sparsity)
        if flags.allocation not in ALLOCATIONS:
            read_layers(flags.allocation, blocks, blocks_name, flags.sparsity)
    if flags.text_only:
        text_alone(skeleton, checkpoint)  # raises if that is impossible
    if flags.packs:
        check_packable(skeleton, blocks_name)
    return Model(
        checkpoint=checkpoint,
        config=config,
        dtype=pick_dtype(flags.dtype, config, device),
        save_dtype=saved_dtype(flags.dtype, config, flags.fake_quantizes),
        tokenizer=load_tokenizer(checkpoint),
        window=window_length(config, flags.seqlen, longest),
        skeleton=skeleton,
        blocks_name=blocks_name,
        layout=layout,
        left=left,
        listed=read_list(checkpoint, config),
    )


def _format(flags: Flags, model: Model) -> Any:
    """Return the format of the linear layers. Raises UserError if other flags exclude it."""
    if flags.format in FORMATS:
        form = FORMATS[flags.format]
    else:
        form = Types(read_types(flags.format, model.small, model.blocks_name))
    if flags.prune_method and not flags.removes and not form.has_zero:
        problem = f"it has no 0, as --prune_method {flags.prune_method} needs"
        fix = "Use --quantize q4_0, or --sparsity_type neurons or experts"
        raise UserError(shown(flags, "quantize"), problem, fix)
    return form


def _set_date(flags: Flags, tokenizer: Any, dist: DistContext) -> None:
    """Set --date, alike in all ranks, if the chat template writes one; else to None."""
    day = flags.date or begun_with(flags.resume, "--date") or str(date.today())
    asks = not flags.no_chat_template and writes_date(tokenizer)
    flags.date = dist.all_gather_object(day if asks else None)[0]
    if flags.date:
        set_date(flags.date)


def _schedule(
    flags: Flags, model: Model, corpora: Corpora, dist: DistContext
) -> Callable[..., TrainSchedule]:
    """Return a function that makes the schedule of the recovery, for windows of `seqlen` tokens.

    Raises UserError if the model cannot be trained.
    """
    if stored_bits(model.config):
        problem = f"the weights of {flags.model} are quantized and cannot be trained"
        raise UserError(shown(flags, "recover"), problem, "Name the unquantized model")
    chats = any(are_dialogues(corpus.documents("train")) for corpus in corpora.calibration)
    default = 0.0 if chats else CROSS_ENTROPY  # the model did not write the answers of a chat
    return partial(
        TrainSchedule,
        tokens=flags.recover,
        rate=flags.recover_lr,
        rank=flags.recover_rank,
        optimizer=flags.recover_optimizer,
        ce_weight=default if flags.recover_ce_weight is None else flags.recover_ce_weight,
        seed=flags.seed,
        pruned=not flags.quantizes or bool(flags.prune_method or flags.teacher),
        ranks=dist.size,
    )


def _open_teacher(flags: Flags, model: Model) -> Teacher:
    """Read the teacher's config. Raises UserError if the model was not made from it."""
    checkpoint = replace(model.checkpoint, name=flags.teacher, flag="--teacher", revision=None)
    config = load_config(checkpoint)
    checkpoint = checkpoint.pinned(config)
    check_format(checkpoint, config, load_bit=None, changes="--recover")
    if stored_bits(config):
        raise UserError(str(checkpoint), "it is quantized", "Name the unquantized model")
    dense = build_skeleton(config, checkpoint)
    rows = teacher_rows(model, checkpoint, dense.get_input_embeddings().num_embeddings)
    changed, inside = changed_shapes(model.skeleton, dense), f"{model.blocks_name}."
    for name, (ours, theirs) in changed.items():  # the blocks may have fewer rows or columns
        lost = len(ours) == len(theirs) and all(map(le, ours, theirs))
        is_table = rows is not None and (len(rows), *theirs[1:]) == ours
        if not lost or not (name.startswith(inside) or is_table):
            problem = f"its {name} is {list(theirs) or 'missing'}, and that of "
            problem += f"{model.checkpoint} is {list(ours) or 'missing'}"
            raise UserError(str(checkpoint), problem, OTHER_TEACHER)
    is_larger = any(name.startswith(inside) for name in changed)
    return Teacher(checkpoint, config, rows, is_larger)


def _check_tokens(flags: Flags, model: Model, windows: RunWindows) -> None:
    """Raise UserError if the texts have tokens for which the model's embedding has no row."""
    rows = model.skeleton.get_input_embeddings().num_embeddings
    sets = [windows.calibration, *(test.windows for test in windows.tests)]
    if windows.training:
        sets += [windows.training.windows, windows.training.held_out]
    highest = max(int(each.ids.max()) for each in sets if each is not None and len(each))
    if highest >= rows:
        token = model.tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"--model {flags.model}",
            f"the texts have token {highest} ({token!r}), but the embedding has {rows} rows",
            "Use the tokenizer of this model, or add rows with resize_token_embeddings",
        )


def folder_of(flags: Flags) -> tuple[str, str] | None:
    """Return the flag and path of the folder of finished blocks; None: the run has none.

    It is --resume, --offload_folder, or beside --save_model.
    """
    places = [
        ("--resume", flags.resume if flags.changes else None),
        ("--offload_folder", flags.offload_folder),
    ]
    if flags.changes and flags.save_model:
        places.append(("--save_model", str(partial_of(flags.save_model))))
    return next((place for place in places if place[1]), None)


def open_folder(run: Run) -> RunFolder | None:
    """Open the folder of finished blocks, in the main rank.

    Raises UserError if the fingerprint of an interrupted run, or of another rank, differs.
    """
    place, folder = folder_of(run.flags), None
    run.dist.check_equal(run.fingerprint["pruning"] | run.fingerprint["measuring"])
    if place and run.dist.is_main:
        folder = _open_folder(run, *place)
    if run.flags.changes and run.is_sharded:
        _check_seen(run.dist, place and place[0], folder)
    return folder


def _check_seen(dist: DistContext, flag: str | None, folder: RunFolder | None) -> None:
    """Raise UserError if a rank cannot see the main rank's folder, where it has to write."""
    file = folder and (folder.path / JOB).absolute()
    file, text = dist.all_gather_object(file and (file, file.read_text("utf-8")))[0] or (0, 0)
    sees = not file or (file.is_file() and file.read_text("utf-8") == text)
    blind = [str(rank) for rank, sees in enumerate(dist.all_gather_object(sees)) if not sees]
    if blind:
        if folder:
            folder.close()
        raise UserError(
            f"{flag} {file.parent}",
            f"rank {', '.join(blind)} cannot see this folder, where each rank keeps its shard of "
            "the training",
            "Name one that all machines share",
        )


def _open_folder(run: Run, flag: str, path: str) -> RunFolder:
    check_room(run, flag, path)
    folder, pruning = RunFolder(flag, path), run.fingerprint["pruning"]
    if reason := _cannot_continue(run, folder, flag, path):
        folder.close()
        raise UserError(f"{flag} {path}", *reason)
    before = folder.decided.get("batch_size", run.batch_size)
    folder.begin(pruning, batch_size=run.batch_size)
    if folder.begun:
        run.print(f"{flag} {path}: finished before: {folder.summary(len(run.model.blocks))}")
    if before != run.batch_size:
        run.print(
            f"{flag} {path}: begun with --batch_size {before}, continued with {run.batch_size}; a "
            "run with a single batch size differs by rounding"
        )
    return folder


def _cannot_continue(run: Run, folder: RunFolder, flag: str, path: str) -> tuple[str, str] | None:
    """Return why the run cannot continue the one that began the folder, and the way out."""
    if folder.begun is None:
        return None
    if flag != "--resume":
        fix = f"Add --resume {path} to continue it, or remove the folder"
        return "it holds the state of an unfinished run", fix
    begun, pruning = EARLIER | folder.begun, run.fingerprint["pruning"]
    if folder.begun and (changed := first_difference(begun, pruning)):
        if changed[0] == TRIMS:
            return f"it was begun with {TRIMS}", TRIM.format(typed("trim"), "a new --resume")
        problem = "it was begun with {} {!r}, not {!r}".format(*changed)
        return problem, "Give the same again, or another folder"
    ranks = ranks_of_state(folder) - {run.dist.size if run.is_sharded else 1}
    if ranks:
        problem = f"its training was begun with WORLD_SIZE {ranks.pop()}, not {run.dist.size}"
        return problem, "Start as many ranks, or give another folder"
    return None


def check_disk(run: Run, flag: str, path: str, more: float = 0) -> None:
    """Raise UserError if the saved model, and `more` bytes, do not fit on the disk of `path`.

    A packed model is smaller than dense, here by the most that packing can save. Blocks that wait
    in the run's own folders become part of the model.
    """
    model, flags = run.model.small, run.flags
    gone = unread_of(model) if flags.text_only else ()
    dropped = sum(weight.numel() for name, weight in model.named_parameters() if name in gone)
    dense = parameter_bytes(model, run.model.save_dtype) - dropped * run.model.save_dtype.itemsize
    size = more + (dense / PACKED_AT_MOST if flags.packs or flags.load_bit else dense)
    own = {str(partial_of(path)), flags.resume, flags.offload_folder} - {None}
    files = (file for each in own for file in Path(each).rglob("*.safetensors"))
    waiting = sum(file.stat().st_size for file in files)
    free = disk_free(path) + waiting
    if size > free:
        problem = f"it takes about {gib(size)} there, and {gib(free)} are free"
        raise UserError(f"{flag} {path}", problem, "Make room, or name a folder on another disk")


def disk_free(path: str | Path) -> int:
    """Return the free bytes on the disk of a path, which need not exist."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_room(run: Run, flag: str, folder: str | Path) -> None:
    """Print the maximum size of checkpoints and blocks. Raises UserError if the disk is full."""
    schedule = run.schedule
    if not schedule:
        return
    each = run.model.dtype.itemsize
    size = 2 * (each + state_bytes(schedule))  # old and new state exist together
    size += 6 if run.flags.quantizes else 0
    size += each * bool(run.flags.prune_method)  # pruned blocks, and trained ones that are fetched
    size += each * (run.is_sharded or run.device.type != "cpu")
    size *= sum(weight.numel() for weight in run.model.small_blocks.parameters())
    kept = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    free = disk_free(folder) + kept
    problem = f"training needs up to {gib(size)} there, and {gib(free)} are free"
    if size > free:
        raise UserError(f"{flag} {folder}", problem, "Make room, or name a folder on another disk")
    run.print(f"disk of {flag} {folder}: {problem}")
