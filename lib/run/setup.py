"""What a run is set up with: first all that can be known without a weight, then the model.

    job = check(args)              # whatever can fail cheaply fails here
    loaded = load(job, at_end)    # the dense model, and what runs its blocks
    resolve_bos(job, loaded)

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lib.methods.registry import MethodSpec
from lib.methods.sparsity import Sparsity
from lib.run.job import Job, LoadedModel, NoCache, Texts
from lib.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lib.data.sources import Source
    from lib.model.blocks import BlockRunner
    from lib.model.fetched import Sharing
    from lib.model.placement import BlockPlacement
    from lib.run.memory import Room, Training


LEAST_ZEROS = 0.01  # share of the blocks' weights, of a model that was pruned before


def check(args: argparse.Namespace, cache: NoCache | None = None) -> Job:
    """Outputs, texts, device, config, tokenizer, vocabulary, windows: by what they cost.

    UserError, in one line, for what can't be done.
    """
    method_spec = method_of(args)
    _check_outputs(args)
    sources, vocabulary_sources, tests = _named_sources(args)
    read = [(one, "train") for one in sources if _reads(args)]
    read += [(one, "train") for one in vocabulary_sources if one not in sources or not _reads(args)]
    read += [(one, "test") for one in tests]
    _check_readable([one for one in read if not one[0].hub])
    from lib.distributed.context import DistContext, local_device
    from lib.model import pretrained
    from lib.model.quantised import check_format
    from lib.pruning.inputs import check_widths
    from lib.util.progress import quiet

    quiet()
    device = local_device(pretrained.pick_device(args.device))
    pretrained.make_current(device)
    dist = DistContext(device, minutes=args.timeout)
    known = args.model, args.cache_dir, args.trust_remote_code
    config = pretrained.load_config(*known)
    check_format(args.model, config, args.load_bit, bool(method_spec or args.recover), args.offload)
    tokenizer = pretrained.load_tokenizer(*known)
    seqlen = pretrained.window_length(config, args.seqlen)
    width = config.get_text_config(decoder=True).hidden_size
    skeleton = pretrained.skeleton(config, args.trust_remote_code)
    blocks_name, blocks = pretrained.decoder_blocks(skeleton)
    sparsity = Sparsity.parse(args.sparsity_type, args.sparsity_ratio)
    if method_spec:
        check_widths(blocks, blocks_name, sparsity)
    if args.bos == "always":
        pretrained.required_bos_id(tokenizer)
    _check_readable([one for one in read if one[0].hub])
    job = Job(
        args=args,
        cache=cache or NoCache(),
        sources=sources,
        vocabulary_sources=vocabulary_sources,
        tests=tests,
        device=device,
        dist=dist,
        config=config,
        tokenizer=tokenizer,
        seqlen=seqlen,
        batch_size=args.batch_size or pretrained.default_batch_size(device, seqlen, width),
        skeleton=skeleton,
        blocks_name=blocks_name,
        method_spec=method_spec,
        sparsity=sparsity,
    )
    if args.recover:
        _set_schedule(job)
    if args.trim_vocabulary:
        _set_vocabulary(job)
    if args.teacher:
        with _told_of_teacher():
            _set_teacher(job)
    bos = pretrained.required_bos_id(job.tokenizer) if args.bos == "always" else None
    job.texts = read_texts(job, bos)
    _compare(job)
    return job


def _reads(args: argparse.Namespace) -> bool:
    """Whether the train text of the calibration sources is looked at."""
    method_spec = method_of(args)
    observes = method_spec and (method_spec.observes or args.allocation != "uniform")
    return bool(args.recover or observes)


def _set_vocabulary(job: Job) -> None:
    """Choose the tokens that stay, and go on with the smaller tokenizer, proven on every test text.

    UserError where the model or its tokenizer can't be trimmed, or where a text would not read the
    same.
    """
    from lib.model.rows import count_rows, tokens_of_configs
    from lib.vocabulary import Trimmed, trim

    args = job.args
    rows = count_rows(job.skeleton, args.model)
    known = args.model, job.config, args.cache_dir, args.trust_remote_code

    def make() -> Trimmed:
        return trim(
            job.tokenizer,
            args.model,
            job.config,
            job.vocabulary_sources,
            job.dist,
            rows=rows,
            named=tokens_of_configs(*known),
            size=args.vocabulary_size,
            minimum=args.vocabulary_minimum or 1,
            trust_remote_code=args.trust_remote_code,
        )

    key = (args.model, args.cache_dir, sorted(one.text for one in job.vocabulary_sources))
    key += (args.vocabulary_size, args.vocabulary_minimum)
    with job.timed("vocabulary"):
        job.vocabulary = job.cache.vocabulary(key, make)
        job.tokenizer = job.vocabulary.tokenizer
        lines = job.vocabulary.prove(job.tests)
    if job.dist.is_main:
        print(job.vocabulary.line(), *lines, sep="\n", flush=True)


def _set_schedule(job: Job) -> None:
    """How the recovery goes. UserError where it can't be."""
    from lib.model.quantised import stored_bits
    from lib.recover import CROSS_ENTROPY, TrainSchedule

    args, given = job.args, f"--recover {job.args.recover}"
    if args.recover < job.seqlen:
        raise UserError(
            f"{given}: less than one step, a window of {job.seqlen} tokens; give at least so many, "
            "or a smaller --seqlen"
        )
    if stored_bits(job.config):
        raise UserError(f"{given}: {args.model} is quantised, and its weights can't be trained")
    job.schedule = TrainSchedule(
        args.recover,
        job.seqlen,
        args.recover_rate,
        args.recover_rank,
        CROSS_ENTROPY if args.recover_ce is None else args.recover_ce,
        args.seed,
    )


@contextmanager
def _told_of_teacher() -> Iterator[None]:
    """Inside, what is wrong with `--model` is wrong with `--teacher`."""
    try:
        yield
    except UserError as error:
        told = str(error)
        if "--teacher " not in told:
            told = told.replace("--model ", "--teacher ", 1)
        raise UserError(told) from error


def _set_teacher(job: Job) -> None:
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


def method_of(args: argparse.Namespace) -> MethodSpec | None:
    """The pruning method that the flags name, with its options; None where nothing is pruned."""
    options: dict[str, Any] = {"variant": True} if args.use_variant else {}
    options |= {} if args.blend is None else {"blend": args.blend}
    return MethodSpec(args.prune_method, options) if args.prune_method else None


def _check_outputs(args: argparse.Namespace) -> None:
    from lib.util.files import check_output_folder
    from lib.util.folders import check_replaceable

    check_output_folder("--save", args.save)
    if args.save_model:
        check_replaceable("--save_model", args.save_model)
    if args.tasks:
        from lib.eval import check_tasks

        check_tasks(args.tasks)


def _named_sources(
    args: argparse.Namespace,
) -> tuple[list[Source], list[Source], list[Source]]:
    """To calibrate on, whose tokens stay where the vocabulary is trimmed, and to measure on."""
    from lib.data.sources import has_test, parse_sources

    names = args.calibration_data or ["c4" if args.prune_on_c4 else "ubertext"]
    sources = parse_sources(names, "--calibration_data", mixture=True)
    more = parse_sources(args.vocabulary_data or [], "--vocabulary_data")
    read = args.calibration_data or args.prune_on_c4 or not more or _reads(args)
    known = [source.text for source in sources] if read else []
    vocabulary_sources = (sources if read else []) + [one for one in more if one.text not in known]
    if not args.trim_vocabulary:
        vocabulary_sources = []
    with_test = dict.fromkeys(one.text for one in [*sources, *vocabulary_sources] if has_test(one))
    tests = args.eval_data or list(with_test) or ["ubertext"]
    return sources, vocabulary_sources, parse_sources(tests, "--eval_data")


def _check_readable(sources: list[tuple[Source, str]]) -> None:
    from lib.data.documents import check_source

    for source, split in sources:
        check_source(source, split)


def read_texts(job: Job, bos: int | None) -> Texts:
    """The windows to calibrate on and to measure on, each begun with `bos` where given."""
    from lib.data.windows import calibration_windows, test_set, training_windows

    args, schedule = job.args, job.schedule

    def read() -> Texts:
        texts = Texts(bos, None, None, [])
        if job.calibrated:
            texts.windows, texts.calibration = calibration_windows(
                job.sources, job.tokenizer, args.nsamples, job.seqlen, args.seed, bos
            )
        known = job.tokenizer, job.seqlen, bos, args.samples
        texts.tests = [test_set(one, *known) for one in job.tests]
        if schedule:
            rest = schedule.steps * schedule.windows, job.seqlen, args.seed, bos
            tests = [test.windows for test in texts.tests]
            texts.training = training_windows(job.sources, job.tokenizer, *rest, tests)
        return texts

    drawn = (args.calibration_data, args.prune_on_c4, args.nsamples, args.seed)
    key = (args.model, args.eval_data, job.seqlen, bos, drawn if job.calibrated else None)
    key += (args.samples,)
    key += (job.vocabulary.digest,) if job.vocabulary else ()
    key += (drawn, args.recover) if schedule else ()
    return job.cache.texts(key, read)


def _compare(job: Job) -> None:
    """UserError where an interrupted run, or another process, does something else."""
    from lib.pruning.journal import Journal
    from lib.run.fingerprint import TIMES, difference, fingerprint

    job.fingerprint = fingerprint(job)
    pruning = job.fingerprint["pruning"]
    everywhere = {name: value for name, value in pruning.items() if name != TIMES}
    job.dist.check_equal(everywhere | job.fingerprint["measuring"])
    changes = job.method_spec or job.schedule
    if not (changes and job.args.resume and job.dist.is_main):
        return
    job.journal = Journal(job.args.resume)
    found = difference(job.journal.begun, pruning) if job.journal.begun else None
    if found:
        name, before, now = found
        raise UserError(
            f"--resume {job.args.resume}: was begun with {name} {before!r}, now it is {now!r}; "
            "give the same again, or another folder"
        )


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
    _, blocks = pretrained.decoder_blocks(model)
    runner = BlockRunner(model, blocks, job.device, placement)
    if placement is None:  # otherwise every block is checked when it is fetched
        check_finite(runner)
    runner.verify()
    size = pretrained.footprint(model)
    return LoadedModel(
        model, blocks, runner, room.state_device, size, room.checkpointed, room.cache_inputs
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
        lambda: skeleton(job.config, args.trust_remote_code),
        job.device,
        sharing,
        folder,
        saved_dtype(args.dtype, job.config),
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
    with job.timed("load teacher"), _told_of_teacher():
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


def _see_memory(job: Job, shared: bool) -> Room:
    """Tell how much memory the run will take, and where."""
    from lib.model.pretrained import checkpoint_dtype, pick_dtype, saved_dtype
    from lib.model.quantised import packed_linears, stored_bits
    from lib.pruning.allocation import WINDOWS
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
    )
    room = check_memory(plan, job.device, lambda fetched: any(dist.all_gather_object(fetched)))
    if dist.is_main:
        print(room.line, flush=True)
    return room


def _training(job: Job) -> Training | None:
    """What the recovery means for memory."""
    from lib.run.memory import Training

    if not job.schedule:
        return None
    share = -(-job.schedule.windows // job.dist.size)  # of a step's windows
    return Training(job.schedule.rank, min(job.batch_size, share), bool(job.args.teacher))


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


def _read_model(job: Job, where: dict[str, Any], folder: str | None = None) -> nn.Module:
    """The dense model, each part on the device that `where` says."""
    from lib.model.pretrained import load_model, pick_dtype

    args = job.args

    def read() -> nn.Module:
        return load_model(
            args.model,
            job.config,
            dtype=pick_dtype(args.dtype, job.config, job.device),
            device_map=where,
            offload=folder,
            load_bit=args.load_bit,
            cache_dir=args.cache_dir,
            trust_remote_code=args.trust_remote_code,
        )

    quantised = args.load_bit or getattr(job.config, "quantization_config", None)
    if len(where) > 1 or quantised or job.dist.size > 1:
        return read()
    return job.cache.model((args.model, args.dtype, args.cache_dir), job.device, read)


def resolve_bos(job: Job, loaded: LoadedModel) -> None:
    """Under `--bos auto`, see whether the dense model needs windows that begin with BOS."""
    from lib.eval import needs_bos
    from lib.model.pretrained import default_bos_id

    bos = default_bos_id(job.tokenizer) if job.args.bos == "auto" else None
    if bos is not None and needs_bos(loaded.runner, job.texts.tests[0].windows, bos):
        if job.dist.is_main:
            print("the model collapses without its BOS token: every window begins with it")
        job.texts = read_texts(job, bos)
    job.dist.check_equal({"BOS": job.texts.bos})  # each has decided for itself
