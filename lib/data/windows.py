"""Texts to windows of token ids: what a model is calibrated on, and what it is measured on.

`calibration_windows`: random windows of one source or of a mixture, each drawn by its source's
rule; the rules are the published loops. `training_windows`: documents cut into windows, to recover
on. `test_set`: a whole text, cut. What a source is stands in lib/data/sources.py, how its texts are
read in lib/data/documents.py.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.data import hub
from lib.data.documents import open_documents
from lib.data.sources import AGAIN, JOINED, Source, mixture_name

BUFFER = 1_000  # documents among which a stream is shuffled
STREAM_LIMIT = 200_000  # documents of a stream that are tried before giving up
TEST_CHARACTERS = 4_000_000  # of a large set's test text, enough for 256 windows of 4,096 tokens
TEST_WINDOWS = 256  # of a large set
HELD_OUT = (4, 16)  # at least and at most so many windows of the training text
HELD_OUT_SHARE = 0.05  # of the training text, in between
PROMPT_TOKENS = 16  # of a document, for a model to continue
PROMPT_CHARACTERS = 50 * PROMPT_TOKENS  # of a document among which these are
SPAN = 32  # tokens in a row by which a window is seen to stand in a test text
log = logging.getLogger(__name__)


def calibration_windows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: int | None = None,
) -> tuple[Tensor, dict]:
    """Windows (nsamples, seqlen), int64, and the facts of them: sources, and where each was found.

    Several sources are mixed by weight: apportioned by largest remainder and interleaved; every
    source gives the first windows that it would give alone. With `bos` every window begins with
    that token, in place of its last one, unless it does so already. Raises UserError where the
    texts can't give so many windows.
    """
    assert nsamples > 0 and seqlen > 1
    counts = apportion([s.weight or 1.0 for s in sources], nsamples)
    windows = torch.empty(nsamples, seqlen, dtype=torch.long)
    order = torch.tensor(_interleaved(counts))
    drawn = []
    for index, (source, count) in enumerate(zip(sources, counts, strict=True)):
        if count == 0:
            log.warning("%s %s: its weight gives it no window", source.flag, source.text)
        draw, revision = draw_windows(source, tokenizer, count, seqlen, seed)
        windows[order == index] = draw.windows
        drawn.append(
            {"name": source.name, "source": source.text, "revision": revision}
            | {"windows": count, "share": count / nsamples}
            | {"rows": draw.rows, "starts": draw.starts}
        )
    if bos is not None:
        begun = windows[:, :1] == bos
        windows = torch.where(begun, windows, _begin(windows[:, :-1], bos))
    facts = {"name": mixture_name(sources), "sources": drawn, "windows": nsamples}
    facts |= {"seqlen": seqlen, "tokens": windows.numel(), "bos": bos, "digest": digest(windows)}
    return windows, facts


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to the weights, by largest remainder."""
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _interleaved(counts: Sequence[int]) -> list[int]:
    """Source of each window, every source spread evenly over the whole."""
    places = [((2 * j + 1) / n, i) for i, n in enumerate(counts) for j in range(n)]
    return [i for _, i in sorted(places)]


@dataclass
class Draw:
    """What was drawn from one source."""

    windows: Tensor  # (windows, seqlen)
    rows: list[int]
    starts: list[int]  # the window's first token, counted in its document
    longest: int = 0  # tokens of the longest document that was too short

    def add(self, ids: Tensor, row: int, rng: random.Random) -> None:
        seqlen = self.windows.shape[1]
        start = rng.randint(0, len(ids) - seqlen - 1)
        self.windows[len(self.rows)] = ids[start : start + seqlen]
        self.rows.append(row)
        self.starts.append(start)

    @property
    def full(self) -> bool:
        return len(self.rows) == len(self.windows)


def draw_windows(
    source: Source, tokenizer: PreTrainedTokenizerBase, count: int, seqlen: int, seed: int
) -> tuple[Draw, str | None]:
    """`count` windows of `seqlen` tokens and the revision of what they were drawn from.

    Raises UserError, in place of the published loops' endless search, once every text was tried:
    with the number of windows that there are, or the length of the longest text.
    """
    draw = Draw(torch.empty(count, seqlen, dtype=torch.long), [], [])
    rng = random.Random(seed)
    with open_documents(source, "train") as (documents, revision):
        if source.stream:
            tried = _draw_from_stream(draw, documents, tokenizer, rng)
        elif source.draw == JOINED:
            tried = _draw_from_joined(draw, documents, tokenizer, rng)
        else:
            tried = _draw_from_rows(draw, documents, tokenizer, rng, source.draw == AGAIN)
    if draw.full:
        return draw, revision
    if not draw.rows:
        raise source.error(
            f"all {tried} texts are too short for a window of {seqlen} tokens, the longest has "
            f"{draw.longest}; use --seqlen {max(draw.longest - 1, 1)} or less"
        )
    raise source.error(
        f"its {tried} texts can give only {len(draw.rows)} windows of {seqlen} tokens, {count} "
        f"are wanted; use a smaller --nsamples or --seqlen"
    )


def _draw_from_rows(
    draw: Draw,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    again: bool,
) -> int:
    """UberText's loop, or C4's where a document may be used `again`. Returns the texts tried."""
    seqlen = draw.windows.shape[1]
    short, used = set(), set()
    while not draw.full and len(short) + len(used) < len(texts):
        row = rng.randint(0, len(texts) - 1)
        if row in short or row in used:
            continue
        ids = tokenise(tokenizer, texts[row])
        if len(ids) <= seqlen:
            short.add(row)
            draw.longest = max(draw.longest, len(ids))
            continue
        draw.add(ids, row, rng)
        if not again:
            used.add(row)
    return len(texts)


def _draw_from_joined(
    draw: Draw, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> int:
    """WikiText-2's loop: windows start anywhere in the one long text. Returns the texts tried."""
    ids = tokenise(tokenizer, " ".join(texts))
    draw.longest = len(ids)
    while len(ids) > draw.windows.shape[1] and not draw.full:
        draw.add(ids, 0, rng)
    return 1


def _draw_from_stream(
    draw: Draw,
    texts: Iterable[tuple[int, str]],
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
) -> int:
    """One window from each document that is long enough, as they come. Returns the texts tried."""
    tried = 0
    for row, text in _shuffled(islice(texts, STREAM_LIMIT), rng):
        if draw.full:
            break
        ids = tokenise(tokenizer, text)
        tried += 1
        if len(ids) > draw.windows.shape[1]:
            draw.add(ids, row, rng)
        else:
            draw.longest = max(draw.longest, len(ids))
    return tried


def _shuffled(items: Iterable, rng: random.Random) -> Iterator:
    buffer = []
    for item in items:
        if len(buffer) < BUFFER:
            buffer.append(item)
            continue
        place = rng.randrange(BUFFER)
        item, buffer[place] = buffer[place], item
        yield item
    rng.shuffle(buffer)
    yield from buffer


@dataclass(frozen=True, eq=False)
class TrainingText:
    """What a model is recovered on. `facts`: what a result says of it."""

    windows: Tensor  # (windows, seqlen), int64; each once
    order: Tensor  # (windows trained on,): which one; more passes where the text is short
    held_out: Tensor  # (windows, seqlen): to measure on
    facts: dict


def training_windows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    seed: int,
    bos: int | None = None,
    tests: Sequence[Tensor] = (),
) -> TrainingText:
    """`count` windows of `seqlen` tokens, and some held out, from the train text of all sources.

    Documents are taken in an order drawn by `seed` and cut into windows one after another; what is
    left of a document is dropped, and so is every window in which a passage of `tests`, windows
    (n, seqlen), stands. A source that has too few windows gives them again, in another order. The
    sources are mixed by weight, and `bos` is put in place, as for `calibration_windows`. UserError
    where a source has less than two windows.
    """
    weights = [source.weight or 1.0 for source in sources]
    held = min(max(HELD_OUT[0], int(HELD_OUT_SHARE * count)), HELD_OUT[1])
    shares, kept = apportion(weights, count), apportion(weights, held)
    tested = _Passages(tests, seqlen, bos)
    windows, orders, held_out, told = [], [], [], []
    before = 0
    for source, share, aside in zip(sources, shares, kept, strict=True):
        if not share:
            log.warning("%s %s: its weight gives it no window", source.flag, source.text)
            continue
        found, dropped, revision = _cut_windows(
            source, tokenizer, share + aside, seqlen, seed, tested
        )
        if len(found) < share + aside:
            aside = min(aside, max(1, int(HELD_OUT_SHARE * len(found))))
        held_out.append(found[:aside])
        windows.append(found[aside:])
        size = len(found) - aside
        passes = -(-share // size)
        draw = torch.Generator().manual_seed(seed)
        again = [torch.randperm(size, generator=draw) for _ in range(passes)]
        orders.append(torch.cat(again)[:share] + before)
        before += size
        told.append(
            {"name": source.name, "source": source.text, "revision": revision, "windows": size}
            | {"held_out": aside, "passes": passes, "dropped": dropped, "share": share / count}
        )
    place = torch.tensor(_interleaved([len(order) for order in orders]))
    order = torch.empty(len(place), dtype=torch.long)
    for index, its in enumerate(orders):
        order[place == index] = its
    both = [torch.cat(windows), torch.cat(held_out)]
    if bos is not None:
        both = [torch.where(w[:, :1] == bos, w, _begin(w[:, :-1], bos)) for w in both]
    facts = {"name": mixture_name(sources), "sources": told, "windows": len(order)}
    facts |= {"held_out": len(both[1]), "seqlen": seqlen, "bos": bos}
    facts["digest"] = digest(torch.cat([both[0][order], both[1]]))
    return TrainingText(both[0], order, both[1], facts)


def _cut_windows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    seqlen: int,
    seed: int,
    tested: _Passages,
) -> tuple[Tensor, int, str | None]:
    """At most `wanted` windows (n, seqlen) in a drawn order, how many were dropped, revision."""
    rng = random.Random(seed)
    found: list[Tensor] = []
    tried = dropped = longest = 0
    with open_documents(source, "train") as (documents, revision):
        for text in _drawn_documents(source, documents, rng):
            ids = tokenise(tokenizer, text)
            tried, longest = tried + 1, max(longest, len(ids))
            cut = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
            clean = cut[~tested.within(cut)]
            dropped += len(cut) - len(clean)
            found += clean
            if len(found) >= wanted:
                break
    if len(found) < 2:
        if dropped:
            raise source.error("its train text stands in the test text; recover on other texts")
        raise source.error(
            f"its {tried} texts give {len(found)} windows of {seqlen} tokens to recover on, two "
            f"are needed; the longest text has {longest}; use a smaller --seqlen or longer texts"
        )
    del found[wanted:]
    rng.shuffle(found)
    return torch.stack(found), dropped, revision


def _drawn_documents(source: Source, documents: Iterable, rng: random.Random) -> Iterator[str]:
    """The texts of a source in an order drawn by `rng`."""
    if source.stream:
        yield from (text for _, text in _shuffled(islice(documents, STREAM_LIMIT), rng))
    elif source.draw == JOINED:
        yield " ".join(documents)
    else:
        rows = rng.sample(range(len(documents)), len(documents))
        yield from (documents[row] for row in rows[:STREAM_LIMIT])


class _Passages:
    """Passages of test windows, to be found again wherever they stand in other windows."""

    def __init__(self, tests: Sequence[Tensor], seqlen: int, bos: int | None) -> None:
        self.length = min(SPAN, seqlen // 2)
        draw = torch.Generator().manual_seed(0)
        self.factors = torch.randint(1, 2**62, (self.length,), generator=draw)
        known = [self._sums(test[:, 0 if bos is None else 1 :], self.length) for test in tests]
        self.known = torch.cat([sums.flatten() for sums in known]) if known else torch.empty(0)

    def _sums(self, windows: Tensor, step: int) -> Tensor:
        """(n, passages): a number for each passage, the same for the same tokens."""
        passages = windows.unfold(1, self.length, step)  # (n, passages, length)
        return (passages * self.factors).sum(2)  # overflow wraps around

    def within(self, windows: Tensor) -> Tensor:
        """(n,): whether a known passage stands anywhere in each of windows (n, seqlen)."""
        return torch.isin(self._sums(windows, 1), self.known).any(1)


@dataclass(frozen=True, eq=False)
class TestSet:
    """Test windows and what they cover.

    `tokens`: those in the windows. `bytes`: UTF-8 bytes of the text behind the tokens that are
    predicted, all but the first of each window. It is the text's length times the share of its
    tokens that are predicted, so that bits per byte = summed loss / ln 2 / bytes whatever the
    tokenizer does inside a word, and is the exact figure where the rest of the text is like it.
    `facts`: what a result says of its test text. `prompts`: beginnings of some of its documents.
    """

    __test__ = False  # not a class of tests, whatever pytest makes of its name
    name: str
    windows: Tensor  # (windows, seqlen), int64
    tokens: int
    bytes: int
    facts: dict
    prompts: Tensor  # (prompts, tokens), int64


def test_set(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    bos: int | None = None,
    prompts: int = 0,
) -> TestSet:
    """The test text as windows: documents joined, tokenised as one text, cut, the rest dropped.

    Of a large set only the first documents (`hub.TEST_DOCUMENTS`) and `TEST_WINDOWS` windows.
    With `bos` each window is that token and seqlen - 1 tokens of the text. The first tokens of
    `prompts` documents are kept beside them. Raises UserError where the text is shorter than one window.
    """
    length = min(PROMPT_TOKENS, seqlen // 2)
    with open_documents(source, "test") as (documents, revision):
        texts = test_documents(source, documents)
        text = source.separator.join(texts)
        begun = _prompts(texts, tokenizer, prompts, length, bos)
    ids = tokenise(tokenizer, text)
    if bos is not None and len(ids) and ids[0] == bos:
        ids = ids[1:]
    step = seqlen if bos is None else seqlen - 1  # tokens of the text in each window
    count = len(ids) // step
    if not count:
        problem = f"the test text has {len(ids)} tokens, less than one window of {step}"
        way_out = f"use --seqlen {len(ids)} or less" if len(ids) > 1 else "give a longer text"
        raise source.error(f"{problem}; {way_out}")
    count = min(count, TEST_WINDOWS) if source.sampled else count
    windows = ids[: count * step].view(count, step)
    if bos is not None:
        windows = _begin(windows, bos)
    covered = round(len(text.encode()) * count * (seqlen - 1) / len(ids))
    facts = {"name": source.name, "source": source.text, "revision": revision, "windows": count}
    facts |= {"seqlen": seqlen, "tokens": windows.numel(), "bytes": covered, "bos": bos}
    facts["digest"] = digest(windows)
    if prompts and len(begun) < prompts:  # few documents, such as one long one
        more = windows[:: max(1, count // prompts), :length]
        begun += [ids for ids in more if not any(ids.equal(one) for one in begun)]
    begun = torch.stack(begun[:prompts]) if prompts else windows[:0, :length]
    return TestSet(source.name, windows, windows.numel(), covered, facts, begun)


def test_documents(source: Source, documents: Iterable) -> Sequence[str]:
    """What of an open test split is measured on: all, or the first of a large set."""
    if not source.sampled:
        return documents
    found, length = [], 0
    texts = (item[1] if source.stream else item for item in documents)
    for text in islice(texts, hub.TEST_DOCUMENTS):
        found.append(text)
        length += len(text)
        if length > TEST_CHARACTERS:
            break
    return found


def _prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    bos: int | None,
) -> list[Tensor]:
    """The first `tokens` ids (tokens,) of at most `count` documents that have more.

    Documents are taken in an order that is the same whatever `count` is. They begin as the
    tokenizer begins a text, and with `bos` where given.
    """
    found: list[Tensor] = []
    for row in random.Random(0).sample(range(len(texts)), len(texts)):
        if len(found) >= count:
            break
        ids = tokenise(tokenizer, texts[row][:PROMPT_CHARACTERS])
        if bos is not None and len(ids) and ids[0] != bos:
            ids = _begin(ids[None], bos)[0]
        if len(ids) > tokens:
            found.append(ids[:tokens])
    return found


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (tokens,) of one text, int64, with the tokenizer's own special tokens.

    The same as `tokenizer(text, return_tensors="pt").input_ids[0]`, without its warning about
    texts longer than the model's window, which here are cut into windows afterwards.
    """
    encoding = tokenizer(text, return_tensors="pt", return_attention_mask=False, verbose=False)
    return encoding.input_ids[0].long()  # an empty text comes as float


def _begin(windows: Tensor, bos: int) -> Tensor:
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def digest(windows: Tensor) -> str:
    """SHA-256 of the windows' bytes (int64, row by row)."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
