"""The checks of a run before any weight is read.

    job = check(args)  # everything that can fail cheaply fails here

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lib.methods.registry import MethodSpec
from lib.methods.sparsity import NEURONS, Sparsity
from lib.run.flag import INPUT, RESULT
from lib.run.flags import values
from lib.run.job import Job, NoCache
from lib.run.results import RESULTS
from lib.run.teacher import set_teacher
from lib.run.texts import (
    check_readable,
    method_of,
    named_sources,
    read_texts,
    reads_train,
    rounding_of,
    same_texts,
)
from lib.util.errors import UserError


def check(args: argparse.Namespace, cache: NoCache | None = None) -> Job:
    """Check outputs, texts, device, config, tokenizer, vocabulary and windows, cheapest first.

    Raises UserError, in one line, for what can't be done.
    """
    method_spec, rounding = method_of(args), rounding_of(args)
    _check_outputs(args)
    sources, vocabulary_sources, tests = named_sources(args)
    train_sources = list(sources) if reads_train(args) else []
    train_sources += [source for source in vocabulary_sources if source not in train_sources]
    splits = [(source, "train") for source in train_sources]
    splits += [(source, "test") for source in tests]
    check_readable([(source, split) for source, split in splits if not source.hub])
    from lib.distributed.context import DistContext, local_device
    from lib.model import pretrained
    from lib.model.access import Checkpoint
    from lib.model.mlp import find_mlps
    from lib.model.quantised import check_format
    from lib.pruning.inputs import check_widths
    from lib.pruning.neurons import count_left
    from lib.sparse import check_embeddings
    from lib.util.progress import quiet

    quiet()
    device = local_device(pretrained.pick_device(args.device))
    pretrained.set_current_device(device)
    dist = DistContext(device, minutes=args.timeout)
    checkpoint = Checkpoint(
        args.model, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    config = pretrained.load_config(checkpoint)
    checkpoint = checkpoint.pinned(config)
    check_format(
        checkpoint,
        config,
        load_bit=args.load_bit,
        changes=_changing_flag(args, method_spec, rounding),
        offload=args.offload,
    )
    tokenizer = pretrained.load_tokenizer(checkpoint)
    seqlen = pretrained.window_length(config, args.seqlen)
    width = config.get_text_config(decoder=True).hidden_size
    skeleton = pretrained.skeleton(config, checkpoint)
    blocks_name, blocks = pretrained.decoder_blocks(skeleton)
    sparsity = Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    mlps = neurons_left = None
    if method_spec and args.sparsity_type == NEURONS:
        mlps = find_mlps(config, checkpoint, skeleton, blocks_name)
        neurons_left = count_left(mlps.width, sparsity.ratio, args.neurons_multiple)
    elif method_spec:
        check_widths(blocks, blocks_name, sparsity)
    if args.pack_embeddings:
        check_embeddings(skeleton)
    if args.bos == "always":
        pretrained.required_bos_id(tokenizer)
    check_readable([(source, split) for source, split in splits if source.hub])
    if dist.is_main and reads_train(args):
        for line in same_texts(sources, tests):
            print(line, flush=True)
    job = Job(
        args=args,
        cache=cache or NoCache(),
        sources=sources,
        vocabulary_sources=vocabulary_sources,
        tests=tests,
        device=device,
        dist=dist,
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        seqlen=seqlen,
        batch_size=args.batch_size or pretrained.default_batch_size(device, seqlen, width),
        skeleton=skeleton,
        blocks_name=blocks_name,
        method_spec=method_spec,
        sparsity=sparsity,
        rounding=rounding,
        mlps=mlps,
        neurons_left=neurons_left,
    )
    if args.recover:
        _set_schedule(job)
    if args.trim_vocabulary:
        _set_vocabulary(job)
    if args.teacher:
        set_teacher(job)
    bos = pretrained.required_bos_id(job.tokenizer) if args.bos == "always" else None
    job.texts = read_texts(job, bos)
    _check_tokens(job)
    _compare_fingerprints(job)
    return job


def _changing_flag(
    args: argparse.Namespace, method_spec: MethodSpec | None, rounding: MethodSpec | None
) -> str | None:
    """Return the flag by which the run changes the linears' weights; None if it does not."""
    if method_spec:
        return "--prune_method"
    if args.recover:
        return "--recover"
    return "--rounding" if rounding else None


def _check_outputs(args: argparse.Namespace) -> None:
    from lib.util.files import check_output_folder
    from lib.util.folders import check_replaceable

    check_output_folder("--save", args.save)
    _check_results(args.save)
    if args.save_model:
        check_replaceable("--save_model", args.save_model)
    if args.tasks:
        from lib.quality.tasks import check_tasks

        check_tasks(args.tasks, args.include_path)


def _check_results(folder: str) -> None:
    """Raise UserError if the results would replace a file that no run wrote."""
    file = Path(folder) / RESULTS
    if not file.is_file():
        return
    try:
        is_record = "flags" in json.loads(file.read_text("utf-8"))
    except (ValueError, TypeError):
        is_record = False
    if not is_record:
        raise UserError(
            f"--save {folder}: holds a {RESULTS} that no run wrote, which would be lost; name "
            "another folder"
        )


def _set_vocabulary(job: Job) -> None:
    """Choose the tokens to keep, and use the smaller tokenizer, checked on every test text.

    Raises UserError if the model or its tokenizer can't be trimmed, or if a text would decode
    differently.
    """
    from lib.model.rows import config_token_ids, trimmable_rows
    from lib.vocabulary import TrimmedVocabulary, trim_vocabulary

    args = job.args
    rows = trimmable_rows(job.skeleton, job.checkpoint)

    def make() -> TrimmedVocabulary:
        return trim_vocabulary(
            job.tokenizer,
            job.checkpoint,
            config=job.config,
            sources=job.vocabulary_sources,
            dist=job.dist,
            rows=rows,
            config_ids=config_token_ids(job.checkpoint, job.config),
            size=args.vocabulary_size,
            minimum=args.vocabulary_minimum or 1,
            keep_reserved=args.keep_reserved_tokens,
        )

    key = values(args, ["model", "vocabulary"], (RESULT, INPUT))
    key += tuple(sorted(source.text for source in job.vocabulary_sources))
    with job.timed("vocabulary"):
        job.vocabulary = job.cache.vocabulary(key, make)
        job.tokenizer = job.vocabulary.tokenizer
        lines = job.vocabulary.prove(job.tests)
    if job.dist.is_main:
        print(job.vocabulary.summary(), *lines, sep="\n", flush=True)


def _set_schedule(job: Job) -> None:
    """Set the schedule of the recovery. Raises UserError if the model can't be recovered."""
    from lib.model.quantised import stored_bits
    from lib.recover import CROSS_ENTROPY, TrainSchedule

    args, given = job.args, f"--recover {job.args.recover}"
    if args.recover < job.seqlen:
        raise UserError(
            f"{given}: less than one step, a window of {job.seqlen} tokens; give at least "
            f"{job.seqlen}, or a smaller --seqlen"
        )
    if stored_bits(job.config):
        raise UserError(f"{given}: {args.model} is quantised, and its weights can't be trained")
    job.schedule = TrainSchedule(
        tokens=args.recover,
        seqlen=job.seqlen,
        rate=args.recover_rate,
        rank=args.recover_rank,
        share=CROSS_ENTROPY if args.recover_ce is None else args.recover_ce,
        seed=args.seed,
    )


def _check_tokens(job: Job) -> None:
    """Raise UserError if the texts have tokens for which the model's embedding has no row."""
    rows = job.skeleton.get_input_embeddings().num_embeddings
    texts = job.texts
    sets = [texts.windows, *(test.windows for test in texts.tests)]
    if texts.training:
        sets += [texts.training.windows, texts.training.held_out]
    highest = max(int(ids.max()) for ids in sets if ids is not None and len(ids))
    if highest >= rows:
        token = job.tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"--model {job.args.model}: its tokenizer makes token {highest} ({token!r}) of the "
            f"texts, but its embedding has {rows} rows; use the tokenizer that belongs to it, or "
            "give it the rows by resize_token_embeddings"
        )


def _compare_fingerprints(job: Job) -> None:
    """Raise UserError if an interrupted run, or another process, has another fingerprint."""
    from lib.model.work_folder import WorkFolder
    from lib.run.fingerprint import CODE, differences, fingerprint

    job.fingerprint = fingerprint(job)
    pruning = job.fingerprint["pruning"]
    job.dist.check_equal(pruning | job.fingerprint["measuring"])
    changes = job.method_spec or job.schedule or job.rounding
    if not (changes and job.args.resume and job.dist.is_main):
        return
    folder = WorkFolder("--resume", job.args.resume)
    try:
        changed = differences(folder.begun, pruning) if folder.begun else {}
        _check_resumable(job, changed)
    except BaseException:
        folder.close()
        raise
    if CODE in changed:  # finished blocks are read only under the fingerprint they were begun with
        job.fingerprint["pruning"] = folder.begun
    folder.begin(job.fingerprint["pruning"])
    job.finished = folder


def _check_resumable(job: Job, changed: dict[str, tuple[Any, Any]]) -> None:
    """Raise UserError if the run in `--resume` was begun in a way that it can't be continued."""
    from lib.run.fingerprint import CODE

    folder = job.args.resume
    for name, (before, now) in changed.items():
        if name != CODE:
            raise UserError(
                f"--resume {folder}: was begun with {name} {before!r}, now it is {now!r}; give the "
                "same again, or another folder"
            )
    if CODE in changed and not job.args.resume_anyway:
        raise UserError(
            f"--resume {folder}: was begun by another version of this program; give "
            "--resume_anyway to continue with this one, or another folder"
        )
    if CODE in changed:
        print(f"--resume {folder}: continued by another version of this program", flush=True)
