"""The texts of a run: which sources the flags name, and the windows drawn from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lib.data.documents import locations
from lib.data.sources import Source, has_test, parse_sources
from lib.data.training import training_windows
from lib.data.windows import calibration_windows, test_set
from lib.eval import needs_bos
from lib.model.blocks import BlockRunner
from lib.model.pretrained import default_bos_id
from lib.run.flags import reads_train
from lib.run.job import Job, Texts


def named_sources(
    args: argparse.Namespace,
) -> tuple[list[Source], list[Source], list[Source]]:
    """Return the sources for calibration, for the trimmed vocabulary, and for evaluation."""
    names = args.calibration_data or ["c4" if args.prune_on_c4 else "ubertext"]
    sources = parse_sources(names, "--calibration_data", mixture=True)
    more = parse_sources(args.vocabulary_data or [], "--vocabulary_data")
    uses_sources = args.calibration_data or args.prune_on_c4 or not more or reads_train(args)
    vocabulary_sources: list[Source] = []
    if args.trim_vocabulary:
        vocabulary_sources = list(sources) if uses_sources else []
        names = {source.text for source in vocabulary_sources}
        vocabulary_sources += [source for source in more if source.text not in names]
    tests = args.eval_data or default_tests([*sources, *vocabulary_sources])
    return sources, vocabulary_sources, parse_sources(tests, "--eval_data")


def default_tests(sources: Sequence[Source]) -> list[str]:
    """Return the test texts that are used without `--eval_data`: those of the sources.

    UberText and C4 are measured on UberText, as published. Raises UserError if other sources
    have no test text: a model for one language is not measured on another's by default.
    """
    names = list(dict.fromkeys(source.text for source in sources if has_test(source)))
    if names:
        return names
    for source in sources:
        if source.text not in ("ubertext", "c4"):
            raise source.error("has no test text of its own; name some by --eval_data")
    return ["ubertext"]


def same_texts(sources: Sequence[Source], tests: Sequence[Source]) -> list[str]:
    """Return a warning for each test set whose text is also calibrated on."""
    read = {place for source in sources for place in locations(source, "train")}
    return [
        f"--eval_data {test.text}: the model is calibrated on this text too, so it is measured "
        "better than on text that it has not seen"
        for test in tests
        if read.intersection(locations(test, "test"))
    ]


def read_texts(job: Job, bos: int | None) -> Texts:
    """Return the windows for calibration, evaluation and recovery, each after `bos` if given."""
    args, texts = job.args, Texts(bos)
    common = dict(seqlen=job.seqlen, bos=bos)
    if job.calibrated:
        texts.windows, texts.calibration = calibration_windows(
            job.sources, job.tokenizer, nsamples=args.nsamples, seed=args.seed, **common
        )
    texts.tests = [
        test_set(test, job.tokenizer, n_prompts=args.prompts, **common) for test in job.tests
    ]
    if job.schedule:
        texts.training = training_windows(
            job.sources,
            job.tokenizer,
            count=job.schedule.steps * job.schedule.windows,
            seed=args.seed,
            tests=[test.windows for test in texts.tests],
            **common,
        )
    return texts


def resolve_bos(job: Job, runner: BlockRunner) -> None:
    """Under `--bos auto`, check whether the dense model needs BOS before every window."""
    bos = default_bos_id(job.tokenizer) if job.args.bos == "auto" else None
    if bos is not None and needs_bos(runner, job.texts.tests[0].windows, bos):
        job.print("the model collapses without its BOS token: every window begins with it")
        job.texts = read_texts(job, bos)
    job.dist.check_equal({"BOS": job.texts.bos})  # each has decided for itself
