"""Windows to recover a pruned model on: whole documents, cut, without any test text.

Documents are taken in a seeded random order and cut into windows. Documents shorter than a window
share one, each with its own positions. Most models with attention, whose masks transformers derives
from positions, read each document alone. Other models and recurrent layers read across documents. A
window with a passage of the test windows, at any offset, is dropped. Whole documents are held out.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .documents import Corpus, are_dialogues
from .samples import Sample, Windows, join, windows_of
from .sources import JOINED, mixture_name
from .windows import (
    TextTooShort,
    WindowSpec,
    apportion,
    digest,
    interleave,
    packed_dialogues,
    sample_of,
    shuffled,
)

HELD_OUT = (4, 16)  # minimum and maximum number of held-out windows
HELD_OUT_SHARE = 0.05  # held-out share of the training text, within these limits
PASSAGE = 32  # consecutive tokens that identify a test text in a training window
CHUNK = 2**20  # tokens compared with the test text at a time
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingText:
    """The windows that a model is recovered on. `record` goes into results.json."""

    windows: Windows  # distinct windows
    order: Tensor  # (windows trained on,): rows of `windows`, in several passes if necessary
    held_out: Windows  # for measuring the loss
    record: dict


def training_windows(
    corpora: Sequence[Corpus],
    spec: WindowSpec,
    count: int,
    tests: Sequence[Windows] = (),
    calibration: Windows | None = None,
) -> TrainingText:
    """Cut `count` training windows, and some held-out ones, from the sources' train text.

    Remainders of documents after their last whole window are dropped, and so are windows with a
    passage of `tests`. Whole documents are held out, first short ones and ones
    not in `calibration`; from a single document, a span. A source with too few windows repeats
    them in another order. The sources are mixed by weight, and `bos` begins each window, as for
    `calibration_windows`. Raises UserError if a source has fewer than two windows.
    """
    sources = [corpus.source for corpus in corpora]
    weights = [source.weight or 1.0 for source in sources]
    held_out = min(max(HELD_OUT[0], int(HELD_OUT_SHARE * count)), HELD_OUT[1])
    shares, held_out_shares = apportion(weights, count), apportion(weights, held_out)
    overlap = OverlapFilter(tests, spec)
    seen = OverlapFilter([] if calibration is None else [calibration], spec)
    # per source: windows, held-out windows, (share,) rows of the first in order, and the record
    drawn: list[tuple[Windows, Windows, Tensor, dict]] = []
    for corpus, share, n_held in zip(corpora, shares, held_out_shares, strict=True):
        source = corpus.source
        if not share:
            log.warning("%s: its weight is too small for a window", source)
            continue
        cut, out, n_dropped = _cut_windows(corpus, spec, share, n_held, overlap=overlap, seen=seen)
        size = len(cut)
        n_passes = -(-share // size)
        generator = torch.Generator().manual_seed(spec.seed)
        passes = [torch.randperm(size, generator=generator) for _ in range(n_passes)]
        record = {"name": source.name, "source": source.text}
        record |= {"revision": corpus.revision("train")}
        record |= {"windows": size, "held_out": len(out), "passes": n_passes}
        record |= {"dropped": n_dropped, "share": share / count}
        drawn.append((cut, out, torch.cat(passes)[:share], record))
    windows, held, orders, records = map(list, zip(*drawn, strict=True))
    starts = accumulate(map(len, windows[:-1]), initial=0)
    rows = torch.cat([order + start for order, start in zip(orders, starts, strict=True)])
    order = rows[interleave([len(order) for order in orders])]
    trained, out = join(windows), join(held)
    record = {
        "name": mixture_name(sources),
        "sources": records,
        "windows": len(order),
        "held_out": len(out),
        "seqlen": spec.seqlen,
        "bos": spec.bos,
        "digest": digest(torch.cat([trained.ids[order], out.ids])),
    }
    return TrainingText(trained, order, out, record)


def _cut_windows(
    corpus: Corpus,
    spec: WindowSpec,
    share: int,
    n_held: int,
    *,
    overlap: OverlapFilter,
    seen: OverlapFilter,
) -> tuple[Windows, Windows, int]:
    """Return about `share` windows, held-out ones, and the number dropped."""
    rng, groups = random.Random(spec.seed), []  # windows of one document, or of several short ones
    lengths: list[int] = []  # text lengths in tokens
    n_dropped = n_windows = 0
    source, documents = corpus.source, corpus.documents("train")
    joined, chat = source.draw == JOINED, are_dialogues(documents)
    texts = [" ".join(documents)] if joined else shuffled(source, documents, rng)
    for cut in packed_dialogues(source, spec, texts) if chat else _cut_texts(spec, texts, lengths):
        group = cut[~overlap.found_in(cut.ids)]
        n_dropped += len(cut) - len(group)
        n_windows += len(group)
        groups += [group] * bool(len(group))
        if n_windows >= share + 2 * n_held:
            break
    if n_windows < 2:
        if n_dropped:
            raise source.error("its training text is part of the test text", "Give other texts")
        if chat:
            problem = f"its dialogues fill {n_windows} of 2 training windows"
            raise source.error(problem, "Give more")
        longest = max(lengths)
        problem = f"its text fills {n_windows} of 2 training windows of {spec.seqlen} tokens, and "
        problem += f"the longest document has {longest}"
        fits = max(longest // 2, sum(lengths) // 6)
        raise TextTooShort.of(corpus, problem, "Use a smaller {--seqlen}, or give more text", fits)
    wanted = n_held
    if n_windows < share + n_held:
        wanted = min(n_held, max(1, int(HELD_OUT_SHARE * n_windows)))
    if len(groups) == 1:  # one long text: a span of it is held out
        (whole,), start = groups, rng.randrange(n_windows - wanted + 1)
        groups = [whole[start : start + wanted], whole[:start], whole[start + wanted :]]
    else:  # in the drawn order, with groups larger than wanted last

        def place(group: Windows) -> tuple[int, bool]:
            overlaps = seen.found_in(group.ids, group.mask if chat else None)
            return len(group) * (len(group) > wanted), bool(overlaps.any())

        groups.sort(key=place)
    sums = [*accumulate(map(len, groups[:-1]), initial=0)]
    n_out = next((total for total in sums if total >= wanted), sums[-1])
    windows = join(groups)
    return windows[n_out:][:share], windows[:n_out][:n_held], n_dropped


def _cut_texts(spec: WindowSpec, texts: Iterable[str], lengths: list[int]) -> Iterator[Windows]:
    """Yield the windows of each long text, or of several short ones; append the lengths."""
    short: list[Sample] = []  # texts of the next window
    for text in texts:
        short.append(sample_of(spec.tokenizer, text, spec.bos))
        lengths.append(len(short[-1].ids))
        if lengths[-1] >= spec.seqlen:
            yield windows_of([short.pop()], spec.seqlen, spec.bos)
        elif sum(len(sample.ids) for sample in short) >= spec.seqlen:
            yield windows_of(short, spec.seqlen, spec.bos)
            short.clear()


class OverlapFilter:
    """Finds passages of test windows, at any offset in other windows.

    A passage is identified by a sum of its tokens times fixed random factors, modulo 2^64.
    """

    def __init__(self, tests: Sequence[Windows], spec: WindowSpec) -> None:
        self.length = min(PASSAGE, spec.seqlen // 2)
        generator = torch.Generator().manual_seed(0)
        self.factors = torch.randint(1, 2**62, (self.length,), generator=generator).tolist()
        first = 0 if spec.bos is None else 1
        sums = []
        for test in tests:
            passages = self._sums(test.ids[:, first:])
            if test.mask is None:
                sums.append(passages[:, :: self.length].flatten())
            else:  # beginnings shared by all dialogues are not passages of the test
                sums.append(passages[test.mask[:, first:].unfold(1, self.length, 1).all(-1)])
        # an end mark for every search; no passage has the largest int64 by chance
        end = torch.tensor([torch.iinfo(torch.long).max])
        self.sums = torch.cat([*sums, end]).unique()  # sorted

    def _sums(self, windows: Tensor) -> Tensor:
        """Return the sum of each passage of windows (n, tokens): (n, passages)."""
        n_passages = max(0, windows.shape[1] - self.length + 1)
        sums = windows.new_zeros(len(windows), n_passages)
        for offset, factor in enumerate(self.factors):  # overflow wraps around
            sums += windows[:, offset : offset + n_passages] * factor
        return sums

    def found_in(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return for each of windows (n, seqlen) whether it contains a passage: (n,) bool.

        With a `mask` of the windows' shape only passages whose last token is in the mask count.
        """
        parts = map(self._sums, windows.split(max(1, CHUNK // windows.shape[1])))
        places = ((sums, torch.searchsorted(self.sums, sums)) for sums in parts)
        matches = torch.cat([self.sums[place] == sums for sums, place in places])
        return (matches if mask is None else matches & mask[:, self.length - 1 :]).any(1)
