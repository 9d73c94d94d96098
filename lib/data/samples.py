"""Samples, made from documents, and the windows that samples are cut into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of a document; tokens in the `mask` count as prediction targets."""

    ids: Tensor  # (tokens,), int64
    mask: Tensor  # (tokens,), bool
    empty: int = 0  # answers that do not count, as they have no text


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of token ids; by default all tokens count, and each window has one document."""

    ids: Tensor  # (windows, tokens), int64
    mask: Tensor | None = None  # (windows, tokens), bool: prediction targets
    positions: Tensor | None = None  # (windows, tokens), int64: from 0 in each document
    documents: Tensor | None = None  # (windows,), int64: the dialogue that each begins with

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        return Windows(*(each if each is None else each[rows] for each in vars(self).values()))

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape

    @property
    def counted(self) -> Tensor:
        """Return whether each position's prediction counts; the last has its own token's value."""
        mask = torch.ones_like(self.ids).bool() if self.mask is None else self.mask
        return torch.cat([mask[:, 1:], mask[:, -1:]], 1)


def spread(count: int, most: int | None) -> list[int]:
    """Return the indices of at most `most` (None: all) of `count` windows, evenly spaced."""
    chosen = count if most is None else min(count, most)
    return [index * count // chosen for index in range(chosen)]


def as_windows(windows: Tensor | Windows) -> Windows:
    """Return Windows for windows, or for ids alone (n, tokens)."""
    return windows if isinstance(windows, Windows) else Windows(windows)


def join(parts: Sequence[Windows]) -> Windows:
    """Join windows; only if all have a mask, positions or documents, the whole has them."""
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Windows(*(None if any(one is None for one in f) else torch.cat(f) for f in fields))


def join_rows(first: Windows, more: Windows) -> Windows:
    """Join windows; the second have a mask, and also positions if the first do."""
    mask = torch.ones_like(first.ids).bool() if first.mask is None else first.mask
    positions = first.positions
    if positions is not None:
        positions = torch.cat([positions, more.positions])
    return Windows(torch.cat([first.ids, more.ids]), torch.cat([mask, more.mask]), positions)


def windows_of(samples: Sequence[Sample], seqlen: int, bos: int | None = None) -> Windows:
    """Join samples and cut them into whole windows; the remainder is dropped.

    Several samples make one window. With `bos` each window begins with that token, which replaces
    its last one if necessary.
    """
    rows = ((s.ids, s.mask, torch.arange(len(s.ids))) for s in samples)
    joined = map(torch.cat, zip(*rows, strict=True))
    ids, mask, places = (each[: len(each) // seqlen * seqlen].view(-1, seqlen) for each in joined)
    if bos is not None:
        begun = ids[:, :1] == bos
        mask = torch.where(begun, mask, mask.roll(1, 1))
        ids = torch.where(begun, ids, prepend(ids[:, :-1], bos))
    positions = places - places[:, :1]
    return Windows(ids, mask & (positions > 0), positions)  # first tokens are no targets


def packed(samples: Iterable[Sample], seqlen: int, prompted: bool = False) -> Iterator[Windows]:
    """Yield windows of whole samples, and of long ones cut, that have prediction targets.

    The next sample fills up a window; its tokens count only in the window after it. `prompted`: in
    the rest of a dialogue that was cut, the first answer does not count, as its prompt was cut off;
    a rest without another answer is left out.
    """
    begun: list[Sample] = []
    first, begins = None, 0  # a sample to fill up the last window; number of the first in `begun`
    for number, sample in enumerate(samples):
        is_text = bool(sample.mask.all())
        pieces = map(Sample, sample.ids.split(seqlen), sample.mask.split(seqlen))
        for place, piece in enumerate(pieces):
            if prompted and place and not is_text:
                answers = (piece.mask & ~F.pad(piece.mask, (1, -1))).cumsum(0)
                piece = Sample(piece.ids, piece.mask & (answers > 1))
                if not piece.mask.any():
                    continue
            first = first or piece
            length = sum(len(each.ids) for each in begun)
            if begun and length + len(piece.ids) > seqlen:
                yield from _filled(begun, piece, seqlen, begins)
                begun = []
            begins = begins if begun else number
            begun.append(piece)
    if begun:
        yield from _filled(begun, first, seqlen, begins)


def _filled(begun: list[Sample], more: Sample, seqlen: int, number: int) -> Iterator[Windows]:
    missing = seqlen - sum(len(sample.ids) for sample in begun)
    uncounted = Sample(more.ids, torch.zeros_like(more.ids).bool())
    fillers = [uncounted] * -(-missing // len(more.ids))
    window = windows_of([*begun, *fillers], seqlen)[:1]
    if window.counted[:, :-1].any():
        yield replace(window, documents=torch.tensor([number]))


def prepend(windows: Tensor, bos: int) -> Tensor:
    """Put `bos` before each of the windows (n, tokens): (n, tokens + 1)."""
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)
