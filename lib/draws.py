"""Draws of calibration windows from one source, by the published rules.

Language-Specific Pruning (UNLP 2024) and Wanda (ICLR 2024): with the same seed and rows,
`random.Random(seed)` gives the windows that their loops draw from Python's seeded global generator.
A streamed set has no published rule: its documents come in their own order through a shuffling
buffer, and each that is long enough gives one window.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.documents import open_documents
from lib.sources import AGAIN, JOINED, Source
from lib.tokens import tokenise

BUFFER = 1_000  # documents among which a stream is shuffled
STREAM_LIMIT = 200_000  # documents of a stream that are tried before giving up
Tokens = Callable[[str], Tensor]


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
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    seed: int,
    cache_dir: str | None = None,
) -> tuple[Draw, str | None]:
    """`count` windows of `seqlen` tokens and the revision of what they were drawn from.

    Raises UserError, in place of the published loops' endless search, once every text was tried:
    with the number of windows that there are, or the length of the longest text.
    """
    draw = Draw(torch.empty(count, seqlen, dtype=torch.long), [], [])
    rng = random.Random(seed)

    def tokens(text: str) -> Tensor:
        return tokenise(tokenizer, text)

    with open_documents(source, "train", cache_dir) as (documents, revision):
        if source.stream:
            tried = _draw_from_stream(draw, documents, tokens, rng)
        elif source.draw == JOINED:
            tried = _draw_from_joined(draw, documents, tokens, rng)
        else:
            tried = _draw_from_rows(draw, documents, tokens, rng, source.draw == AGAIN)
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
    draw: Draw, texts: Sequence[str], tokens: Tokens, rng: random.Random, again: bool
) -> int:
    """UberText's loop, or C4's where a document may be used `again`. Returns the texts tried."""
    seqlen = draw.windows.shape[1]
    short, used = set(), set()
    while not draw.full and len(short) + len(used) < len(texts):
        row = rng.randint(0, len(texts) - 1)
        if row in short or row in used:
            continue
        ids = tokens(texts[row])
        if len(ids) <= seqlen:
            short.add(row)
            draw.longest = max(draw.longest, len(ids))
            continue
        draw.add(ids, row, rng)
        if not again:
            used.add(row)
    return len(texts)


def _draw_from_joined(draw: Draw, texts: Sequence[str], tokens: Tokens, rng: random.Random) -> int:
    """WikiText-2's loop: windows start anywhere in the one long text. Returns the texts tried."""
    ids = tokens(" ".join(texts))
    draw.longest = len(ids)
    while len(ids) > draw.windows.shape[1] and not draw.full:
        draw.add(ids, 0, rng)
    return 1


def _draw_from_stream(
    draw: Draw, texts: Iterable[tuple[int, str]], tokens: Tokens, rng: random.Random
) -> int:
    """One window from each document that is long enough, as they come. Returns the texts tried."""
    tried = 0
    for row, text in _shuffled(islice(texts, STREAM_LIMIT), rng):
        if draw.full:
            break
        ids = tokens(text)
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
