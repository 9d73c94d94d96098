"""The texts of a run: the sources that the flags name, and the windows drawn from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from ..data.documents import locations
from ..data.sources import JOINED, PART, Source, has_test, is_parted, parse_sources
from ..data.training import training_windows
from ..data.windows import TextTooShort, WindowSpec, calibration_windows, test_set
from ..eval import needs_bos
from ..model.blocks import BlockRunner
from .job import Job, Texts
from .plan import Plan

PUBLISHED = ("ubertext", "c4")  # evaluated on UberText
SHORTEST = 128  # tokens; shorter windows require --seqlen


def named_sources(
    args: argparse.Namespace, plan: Plan
) -> tuple[list[Source], list[Source], list[Source]]:
    """Return the sources for calibration, for the trimmed vocabulary, and for evaluation."""
    names = args.calibration_data or ["c4" if args.prune_on_c4 else "ubertext"]
    flag = "--prune_on_c4" if args.prune_on_c4 else "--calibration_data"
    flag += " (default)" if names == ["ubertext"] and not args.calibration_data else ""
    sources = parse_sources(names, flag, mixture=True, column=args.column)
    more = parse_sources(args.vocabulary_data or [], "--vocabulary_data", column=args.column)
    uses_sources = plan.names_text or not more or plan.reads_train
    kept = [*sources, *more] if uses_sources else more
    vocabulary_sources = list({s.text: s for s in kept}.values()) if plan.trims else []
    names = args.eval_data or default_tests([*sources, *vocabulary_sources])
    flag = "--eval_data" if args.eval_data else "--eval_data (default)"
    tests = parse_sources(names, flag, column=args.column)
    parted = {test.path.resolve() for test in tests if is_parted(test, "test")}
    tests = [replace(test, as_text=args.no_chat_template) for test in tests]
    local = tuple(test for test in tests if test.path)

    def as_measured(group: list[Source]) -> list[Source]:
        group = [replace(source, as_text=args.no_chat_template) for source in group]
        return [
            replace(s, parted=s.parted or s.path.resolve() in parted, tests=local) if s.path else s
            for s in group
        ]

    return as_measured(sources), as_measured(vocabulary_sources), tests


def default_tests(sources: Sequence[Source]) -> list[str]:
    """Return the test texts that are used without `--eval_data`: those of the sources.

    If no folder has a test text, a tenth of each local source is held out, and Hub datasets bring
    their own. UberText and C4 are evaluated on UberText, as published. Raises UserError for a split
    of a Hub dataset: it may be the only one.
    """
    names = [source.text for source in sources if has_test(source)]
    for source in sources if not names else ():
        if source.split:
            raise source.error("it has no test text. Name one with --eval_data.")
        if source.text not in PUBLISHED:
            names.append(PART.sub("", source.text) + ":test" if source.path else source.text)
    return list(dict.fromkeys(names)) or ["ubertext"]


def same_texts(sources: Sequence[Source], tests: Sequence[Source]) -> list[str]:
    """Return a warning for each test set that overlaps the calibration or training text."""
    pairs = product(tests, [(source, locations(source, "train")) for source in sources])
    return [
        f"--eval_data {test.text}: {source.flag} {source.text} reads this text too, so its "
        "figures are better than those of unseen text"
        for test, (source, read) in pairs
        if not read.isdisjoint(locations(test, "test"))
    ]


def read_texts(job: Job, bos: int | None) -> Job:
    """Return the job with windows for calibration, evaluation and recovery, after `bos` if given.

    If the texts are too short for the model's window, and `--seqlen` is not given, the window
    becomes the largest power of two for which they suffice. If that is too short, or `--seqlen` is
    given, the documents of a local source are joined into one text.
    """
    texts, models_window = None, job.seqlen
    while texts is None:
        try:
            texts = _windows(job, bos)
        except TextTooShort as error:
            short = error.source
            if error.fits >= SHORTEST and not job.args.seqlen:
                seqlen = 2 ** (error.fits.bit_length() - 1)
                schedule = job.schedule and replace(job.schedule, seqlen=seqlen)
                job = replace(job, seqlen=seqlen, schedule=schedule)
                continue
            if short not in job.sources or not short.path or short.draw == JOINED:
                raise
            joined = replace(short, draw=JOINED, read={})
            sources = [joined if source == short else source for source in job.sources]
            job = replace(job, sources=sources)
            job.print(f"{short.text}: documents are shorter than a window, so they are joined")
    if job.seqlen < models_window:
        job.print(
            f"window: {job.seqlen} tokens, the largest power of two for which the texts are long "
            f"enough (model: {models_window}); --seqlen sets another"
        )
    for source in (*job.sources, *job.vocabulary_sources, *job.tests):
        source.read.clear()  # free the memory for the model
    return replace(job, texts=texts)


def _windows(job: Job, bos: int | None) -> Texts:
    args, texts = job.args, Texts(bos)
    spec = WindowSpec(job.tokenizer, job.seqlen, bos, args.seed)
    if job.plan.calibrated:
        texts.windows, texts.calibration = calibration_windows(job.sources, spec, args.nsamples)
    texts.tests = [test_set(test, spec, args.completions, args.eval_windows) for test in job.tests]
    if job.schedule:
        count = max(1, job.schedule.steps * job.schedule.windows)
        tests = [test.windows for test in texts.tests]
        texts.training = training_windows(job.sources, spec, count, tests, texts.windows)
    return texts


def resolve_bos(job: Job, runner: BlockRunner) -> Job:
    """Return the job, with BOS in all windows if `--bos auto` finds that the dense model needs it.

    A continued run keeps the windows that it was begun with, whatever it is evaluated on.
    """
    bos, folder = job.tokenizer.bos_token_id, job.outcome.folder
    begins = bos is not None and job.tokenizer("a").input_ids[:1] == [bos]
    if job.args.bos == "auto" and begins:  # the tokenizer adds BOS by default
        needs = job.dist.all_gather_object(folder and folder.decided.get("bos"))[0]
        if needs is None:
            needs = needs_bos(runner, job.texts.tests[0].ids, bos)
        if folder:
            folder.begin(job.fingerprint["pruning"], bos=needs)
        if needs:
            job.print("the model collapses without its BOS token: every window begins with it")
            job = read_texts(job, bos)
    job.dist.check_equal({"BOS": job.texts.bos})  # each rank decides by itself
    return job
