"""Windows of token ids: what a model is calibrated on, and what it is measured on.

`calibration_windows` draws random windows from one source or from a mixture, by each source's
published loop. `test_set` cuts a whole text into windows. lib/data/training.py cuts the windows
that a pruned model is recovered on. lib/data/sources.py says what a source is, and
lib/data/documents.py reads its texts.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
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

BUFFER = 1_000  # documents of a stream that are shuffled among each other
STREAM_LIMIT = 200_000  # documents of a stream that are tried before giving up
TEST_CHARACTERS = 4_000_000  # read of a large set's test text: 256 windows of 4,096 tokens
TEST_WINDOWS = 256  # measured of a large set
PROMPT = 16  # tokens of a prompt
PROMPT_CHARACTERS = 50 * PROMPT  # of a document that are tokenised for its prompt
LONG_TEXT = 2_000_000  # characters; a longer text is tokenised in parts of at least half of it
CONTEXT = 1_000  # characters on each side of a cut that show whether it changes a token
LINE_BREAK = re.compile(r"\n(?=\S)")  # most tokenizers join no letter to the line before
log = logging.getLogger(__name__)


def calibration_windows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: int | None = None,
) -> tuple[Tensor, dict]:
    """Draw windows (nsamples, seqlen), int64, and record where each was drawn from.

    Several sources are mixed by weight: apportioned by largest remainder and interleaved; every
    source gives the first windows that it would give alone. With `bos` every window begins with
    that token, in place of its last one, unless it does so already. Raises UserError if the texts
    have fewer windows.
    """
    assert nsamples > 0 and seqlen > 1
    counts = apportion([s.weight or 1.0 for s in sources], nsamples)
    windows = torch.empty(nsamples, seqlen, dtype=torch.long)
    order = torch.tensor(interleave(counts))
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
        windows = with_bos(windows, bos)
    facts = {"name": mixture_name(sources), "sources": drawn, "windows": nsamples}
    facts |= {"seqlen": seqlen, "tokens": windows.numel(), "bos": bos, "digest": digest(windows)}
    return windows, facts


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole numbers in proportion to the weights, by largest remainder."""
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleave(counts: Sequence[int]) -> list[int]:
    """Return the source index of each window, every source spread evenly over the whole."""
    positions = [((2 * j + 1) / n, i) for i, n in enumerate(counts) for j in range(n)]
    return [i for _, i in sorted(positions)]


@dataclass
class Draw:
    """The windows drawn from one source."""

    windows: Tensor  # (windows, seqlen)
    rows: list[int]
    starts: list[int]  # index of the window's first token in its document
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
    """Draw `count` windows of `seqlen` tokens; also returns the source's revision.

    The published loops search endlessly where too few texts are long enough. This one raises
    UserError once every text was tried, with the number of windows that the texts can give or the
    length of the longest text.
    """
    draw = Draw(torch.empty(count, seqlen, dtype=torch.long), [], [])
    rng = random.Random(seed)
    with open_documents(source, "train") as (documents, revision):
        if source.stream:
            n_tried = _draw_from_stream(draw, documents, tokenizer, rng)
        elif source.draw == JOINED:
            n_tried = _draw_from_joined(draw, documents, tokenizer, rng)
        else:
            n_tried = _draw_from_rows(draw, documents, tokenizer, rng, source.draw == AGAIN)
    if draw.full:
        return draw, revision
    if not draw.rows:
        raise source.error(
            f"all {n_tried} texts are too short for a window of {seqlen} tokens, the longest has "
            f"{draw.longest}; use --seqlen {max(draw.longest - 1, 1)} or less"
        )
    raise source.error(
        f"its {n_tried} texts can give only {len(draw.rows)} windows of {seqlen} tokens, {count} "
        f"are needed; use a smaller --nsamples or --seqlen"
    )


def _draw_from_rows(
    draw: Draw,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    again: bool,
) -> int:
    """Draw by UberText's loop, or by C4's if a document may be used `again`.

    Returns the number of texts that were tried.
    """
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
    """Draw by WikiText-2's loop: windows start anywhere in the one long text. Returns 1."""
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
    """Draw one window from each document that is long enough, as they come.

    Returns the number of texts that were tried.
    """
    n_tried = 0
    for row, text in shuffle_stream(islice(texts, STREAM_LIMIT), rng):
        if draw.full:
            break
        ids = tokenise(tokenizer, text)
        n_tried += 1
        if len(ids) > draw.windows.shape[1]:
            draw.add(ids, row, rng)
        else:
            draw.longest = max(draw.longest, len(ids))
    return n_tried


def shuffle_stream(items: Iterable, rng: random.Random) -> Iterator:
    """Yield the items in an order drawn by `rng`, each within a buffer of BUFFER items."""
    buffer = []
    for item in items:
        if len(buffer) < BUFFER:
            buffer.append(item)
            continue
        index = rng.randrange(BUFFER)
        item, buffer[index] = buffer[index], item
        yield item
    rng.shuffle(buffer)
    yield from buffer


@dataclass(frozen=True, eq=False)
class TestSet:
    """Test windows and the text that they cover.

    `tokens` counts the tokens of the windows. `bytes` counts the UTF-8 bytes of the tokens that
    are predicted, all but the first of each window: the text's length times the share of its
    tokens that are predicted. So bits per byte = summed loss / ln 2 / bytes, whatever the
    tokenizer does inside a word. `facts` is the record for results.json. `prompts` are beginnings
    of documents.
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
    n_prompts: int = 0,
) -> TestSet:
    """Cut the test text into windows: its documents are joined and tokenised as one text.

    What is left after the last whole window is dropped. Of a large set only the first documents
    (`hub.TEST_DOCUMENTS`) and `TEST_WINDOWS` windows are used. With `bos` each window is that
    token and seqlen - 1 tokens of the text. Raises UserError if the text is shorter than one
    window.
    """
    length = min(PROMPT, seqlen // 2)
    with open_documents(source, "test") as (documents, revision):
        texts = test_documents(source, documents)
        text = source.separator.join(texts)
        prompts = _prompts(texts, tokenizer, n_prompts, length, bos)
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
        windows = prepend(windows, bos)
    covered = round(len(text.encode()) * count * (seqlen - 1) / len(ids))
    facts = {"name": source.name, "source": source.text, "revision": revision, "windows": count}
    facts |= {"seqlen": seqlen, "tokens": windows.numel(), "bytes": covered, "bos": bos}
    facts["digest"] = digest(windows)
    if n_prompts and len(prompts) < n_prompts:  # few documents, such as one long one
        starts = windows[:: max(1, count // n_prompts), :length]
        prompts += [ids for ids in starts if not any(ids.equal(prompt) for prompt in prompts)]
    shown = torch.stack(prompts[:n_prompts]) if n_prompts else windows[:0, :length]
    return TestSet(
        name=source.name,
        windows=windows,
        tokens=windows.numel(),
        bytes=covered,
        facts=facts,
        prompts=shown,
    )


def test_documents(source: Source, documents: Iterable) -> Sequence[str]:
    """Return the documents of an open test split to measure on: the first ones of a large set."""
    if not source.sampled:
        return documents
    selected, length = [], 0
    texts = (item[1] if source.stream else item for item in documents)
    for text in islice(texts, hub.TEST_DOCUMENTS):
        selected.append(text)
        length += len(text)
        if length > TEST_CHARACTERS:
            break
    return selected


def _prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    bos: int | None,
) -> list[Tensor]:
    """Return the first `tokens` ids (tokens,) of at most `count` documents that have more.

    The order of the documents does not depend on `count`. A prompt begins as the tokenizer begins
    a text, and with `bos` where given.
    """
    prompts: list[Tensor] = []
    for row in random.Random(0).sample(range(len(texts)), len(texts)):
        if len(prompts) >= count:
            break
        ids = tokenise(tokenizer, texts[row][:PROMPT_CHARACTERS])
        if bos is not None and len(ids) and ids[0] != bos:
            ids = prepend(ids[None], bos)[0]
        if len(ids) > tokens:
            prompts.append(ids[:tokens])
    return prompts


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    long_text: int = LONG_TEXT,
    context: int = CONTEXT,
) -> Tensor:
    """Return the token ids (tokens,) of one text, int64, with the tokenizer's special tokens.

    They equal `tokenizer(text, return_tensors="pt").input_ids[0]`. Its warning about texts longer
    than the model's window is left out, since the text is cut into windows afterwards. A text of
    more than `long_text` characters is tokenised in parts, because a tokenizer takes several
    hundred bytes for each token; `context` characters beside a cut show whether it changes one.
    """
    parts = _parts(tokenizer, text, long_text, context)
    if len(parts) == 1:
        return _encode(tokenizer, text)
    sample = parts[0][:context]
    ids, bare = _encode(tokenizer, sample), _encode(tokenizer, sample, special=False)
    for start in range(len(ids) - len(bare) + 1):  # special tokens stand before and after
        end = start + len(bare)
        if ids[start:end].equal(bare):
            encoded = [_encode(tokenizer, part, special=False) for part in parts]
            return torch.cat([ids[:start], *encoded, ids[end:]])
    return _encode(tokenizer, text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> Tensor:
    options = {} if special else {"add_special_tokens": False}
    encoding = tokenizer(
        text, return_tensors="pt", return_attention_mask=False, verbose=False, **options
    )
    return encoding.input_ids[0].long()  # an empty text comes as float


def _parts(
    tokenizer: PreTrainedTokenizerBase, text: str, long_text: int, context: int
) -> list[str]:
    """Split a text longer than `long_text` between lines, where that changes no token.

    A cut is checked with the text around it. A tokenizer that begins every text with a blank
    fails the check, and the text stays whole.
    """
    parts, start = [], 0
    while len(text) - start > long_text:
        line = LINE_BREAK.search(text, start + long_text // 2)
        if not line:
            break
        end = line.end()
        left, right = text[max(start, end - context) : end], text[end : end + context]
        both, *sides = (_encode(tokenizer, t, special=False) for t in (left + right, left, right))
        if not torch.cat(sides).equal(both):
            return [text]
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def prepend(windows: Tensor, bos: int) -> Tensor:
    """Put `bos` before each of windows (n, tokens): (n, tokens + 1)."""
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def with_bos(windows: Tensor, bos: int) -> Tensor:
    """Let each of windows (n, seqlen) begin with `bos`, in place of its last token if need be."""
    return torch.where(windows[:, :1] == bos, windows, prepend(windows[:, :-1], bos))


def digest(windows: Tensor) -> str:
    """Return the SHA-256 of the windows' bytes (int64, row by row)."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
