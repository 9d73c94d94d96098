"""The texts of a run: which are named, which can be read, and the windows drawn from them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lib.methods.registry import MethodSpec
from lib.run.job import Job, LoadedModel, Texts

if TYPE_CHECKING:
    from lib.data.sources import Source


def method_of(args: argparse.Namespace) -> MethodSpec | None:
    """The pruning method that the flags name, with its options; None where nothing is pruned."""
    options: dict[str, Any] = {"variant": True} if args.use_variant else {}
    options |= {} if args.blend is None else {"blend": args.blend}
    return MethodSpec(args.prune_method, options) if args.prune_method else None


def reads_train(args: argparse.Namespace) -> bool:
    """Whether the train text of the calibration sources is looked at."""
    method_spec = method_of(args)
    observes = method_spec and (method_spec.cls.observes or args.allocation != "uniform")
    return bool(args.recover or observes)


def named_sources(
    args: argparse.Namespace,
) -> tuple[list[Source], list[Source], list[Source]]:
    """To calibrate on, whose tokens stay where the vocabulary is trimmed, and to measure on."""
    from lib.data.sources import has_test, parse_sources

    names = args.calibration_data or ["c4" if args.prune_on_c4 else "ubertext"]
    sources = parse_sources(names, "--calibration_data", mixture=True)
    more = parse_sources(args.vocabulary_data or [], "--vocabulary_data")
    read = args.calibration_data or args.prune_on_c4 or not more or reads_train(args)
    known = [source.text for source in sources] if read else []
    vocabulary_sources = (sources if read else []) + [one for one in more if one.text not in known]
    if not args.trim_vocabulary:
        vocabulary_sources = []
    with_test = dict.fromkeys(one.text for one in [*sources, *vocabulary_sources] if has_test(one))
    tests = args.eval_data or list(with_test) or ["ubertext"]
    return sources, vocabulary_sources, parse_sources(tests, "--eval_data")


def check_readable(sources: list[tuple[Source, str]]) -> None:
    from lib.data.documents import check_source

    for source, split in sources:
        check_source(source, split)


def read_texts(job: Job, bos: int | None) -> Texts:
    """The windows to calibrate on and to measure on, each begun with `bos` where given."""
    from lib.data.training import training_windows
    from lib.data.windows import calibration_windows, test_set

    args, schedule = job.args, job.schedule

    def read() -> Texts:
        texts = Texts(bos, None, None, [])
        if job.calibrated:
            texts.windows, texts.calibration = calibration_windows(
                job.sources, job.tokenizer, args.nsamples, job.seqlen, args.seed, bos
            )
        known = job.tokenizer, job.seqlen, bos, args.prompts
        texts.tests = [test_set(one, *known) for one in job.tests]
        if schedule:
            rest = schedule.steps * schedule.windows, job.seqlen, args.seed, bos
            tests = [test.windows for test in texts.tests]
            texts.training = training_windows(job.sources, job.tokenizer, *rest, tests)
        return texts

    drawn = (args.calibration_data, args.prune_on_c4, args.nsamples, args.seed)
    key = (args.model, args.eval_data, job.seqlen, bos, drawn if job.calibrated else None)
    key += (args.prompts,)
    key += (job.vocabulary.digest,) if job.vocabulary else ()
    key += (drawn, args.recover) if schedule else ()
    return job.cache.texts(key, read)


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
