"""The texts of a run: the sources that the flags name, and the windows drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..data.documents import Corpus, locations
from ..data.samples import Windows
from ..data.sources import PART, Source, has_test, is_parted, parse_sources
from ..data.training import TrainingText, training_windows
from ..data.windows import TestSet, WindowSpec, calibration_windows, fitting_windows, test_set
from ..stages.recover import TrainSchedule
from ..util.errors import spelled
from ..util.ranks import DistContext
from .plan import Flags

PUBLISHED = ("ubertext", "c4")  # evaluated on UberText


@dataclass(frozen=True)
class Corpora:
    """The texts that the flags name. Corpora of equal sources are one object."""

    calibration: list[Corpus]
    tests: list[Corpus]

    def read_by(self, flags: Flags) -> list[tuple[Corpus, str]]:
        """Return the corpora that a run reads, and the split of each, in order."""
        read = dict.fromkeys(self.calibration if flags.reads_train else ())
        train = [(corpus, "train") for corpus in read]
        return train + [(corpus, "test") for corpus in self.tests]

    def free(self) -> None:
        """Free the memory of all documents."""
        for corpus in (*self.calibration, *self.tests):
            corpus.free()


@dataclass(frozen=True)
class RunWindows:
    """All windows of a run; `bos` is the id at the start of each of them, or None."""

    seqlen: int  # tokens of a window
    bos: int | None = None
    calibration: Windows | None = None
    record: dict[str, Any] | None = None  # of the calibration windows
    tests: list[TestSet] = field(default_factory=list)
    training: TrainingText | None = None  # for recovery
    schedule: TrainSchedule | None = None  # of the training


def named_corpora(flags: Flags) -> Corpora:
    """Return the texts for calibration and for evaluation."""
    as_named = dict(column=flags.column, as_text=flags.no_chat_template)
    names = flags.calibration_data or ["c4" if flags.prune_on_c4 else "ubertext"]
    flag = "--prune_on_c4" if flags.prune_on_c4 else "{--calibration_data}"
    flag += " (default)" if names == ["ubertext"] and not flags.calibration_data else ""
    sources = parse_sources(names, flag, mixture=True, **as_named)
    names = flags.eval_data or default_tests(sources)
    flag = "--eval_data" if flags.eval_data else "--eval_data (default)"
    tests = parse_sources(names, flag, **as_named)
    parted = {test.path.resolve() for test in tests if is_parted(test, "test")}
    measured = [Corpus(test) for test in tests]
    local = [corpus for corpus in measured if corpus.source.path]

    def corpus_of(source: Source) -> Corpus:
        if not source.path:
            return Corpus(source)
        return Corpus(source, source.path.resolve() in parted, local)

    corpora = {source: corpus_of(source) for source in sources}
    return Corpora([corpora[source] for source in sources], measured)


def default_tests(sources: Sequence[Source]) -> list[str]:
    """Return the test texts that are used without `--eval_data`: those of the sources.

    If no folder has a test text, a tenth of each local source is held out, and Hub datasets bring
    their own. UberText and C4 are evaluated on UberText, as published. Raises UserError for a split
    of a Hub dataset: it may be the only one.
    """
    names = [source.text for source in sources if has_test(source)]
    for source in sources if not names else ():
        if source.split:
            raise source.error("it has no test text", "Name one with {--eval_data}")
        if source.text not in PUBLISHED:
            names.append(PART.sub("", source.text) + ":test" if source.path else source.text)
    return list(dict.fromkeys(names)) or ["ubertext"]


def same_texts(train: Sequence[Corpus], tests: Sequence[Corpus]) -> list[str]:
    """Return a warning for each test set that overlaps the calibration or training text."""
    pairs = product(tests, [(corpus.source, locations(corpus, "train")) for corpus in train])
    return [
        f"--eval_data {test.source.text}: {source} reads this text too, so its figures are better "
        "than those of unseen text"
        for test, (source, read) in pairs
        if not read.isdisjoint(locations(test, "test"))
    ]


def draw_windows(
    flags: Flags,
    corpora: Corpora,
    spec: WindowSpec,
    schedule_of: Callable[..., TrainSchedule] | None,
    dist: DistContext,
) -> RunWindows:
    """Draw the windows for calibration, evaluation and, with a schedule for its size, training."""
    sources, texts = corpora.calibration, corpora.tests

    def draw(spec: WindowSpec) -> RunWindows:
        windows = record = training = schedule = None
        if flags.calibrated:
            windows, record = calibration_windows(sources, spec, flags.nsamples)
        tests = [test_set(each, spec, flags.completions, flags.eval_windows) for each in texts]
        if schedule_of:
            schedule = schedule_of(seqlen=spec.seqlen)
            count = max(1, schedule.steps * schedule.windows)
            measured = [test.windows for test in tests]
            training = training_windows(sources, spec, count, measured, windows)
        return RunWindows(spec.seqlen, spec.bos, windows, record, tests, training, schedule)

    return fitting_windows(
        draw, sources, spec, not flags.seqlen, lambda line: dist.print(spelled(line))
    )


def may_need_bos(flags: Flags, tokenizer: Any) -> bool:
    """Return whether `--bos auto` has to try it: the tokenizer begins texts with BOS."""
    bos = tokenizer.bos_token_id
    return flags.bos == "auto" and bos is not None and tokenizer("a").input_ids[:1] == [bos]
