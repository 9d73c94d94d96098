"""Run GGUF files window by window in llama.cpp: their losses, and how far apart two predict.

Files advance together, so that no logits are stored. Where two vocabularies differ, tokens are
matched by text, and predictions are compared among the tokens of both, each renormalized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from ..vocabulary.tokenizer_model import NORMAL, UNUSED
from .file import GgufFile
from .llama import Llama, losses, normalizers
from .vocabulary import TOKENIZER, TOKENS, TYPES

Window = Sequence[int]


class Step(NamedTuple):
    """How two files predict the tokens of a window after its first; each (tokens - 1,).

    `losses` (2, tokens - 1) are in nats, of each file among all of its own tokens. `kl` is the
    divergence of the second from the first among the tokens of both, and `equal` whether their most
    likely token is the same. `left_out` (2, tokens - 1): the mass of tokens of one file alone.
    """

    losses: np.ndarray
    kl: np.ndarray
    equal: np.ndarray
    left_out: np.ndarray


class Match(NamedTuple):
    """Which tokens two files have in common: their `rows` (2, tokens), or None if all are the same.

    `smaller` is the number of a file whose tokens the other has all, None if there is none.
    """

    rows: np.ndarray | None
    smaller: int | None

    def pair(self, windows: Sequence[Window]) -> list[Window] | None:
        """Return windows of the same tokens, by those of each file on its own tokens.

        They are the tokens of the smaller vocabulary. Without one, None is for other tokens.
        """
        pair, side = [*windows], self.smaller or 0
        if self.rows is not None:
            to_other = np.full(max(self.rows[side].max(initial=0), *pair[side]) + 1, -1)
            to_other[self.rows[side]] = self.rows[1 - side]
            pair[1 - side] = to_other[pair[side]].tolist()
        same = self.smaller is not None or pair[1] == windows[1]
        return pair if same and min(pair[1 - side]) >= 0 else None


def match(one: GgufFile, other: GgufFile) -> Match | None:
    """Return which tokens two files have in common; None for tokenizers of other kinds."""
    names = [f"{TOKENIZER}{name}" for name in ("model", "pre")]
    if any(one.value(name) != other.value(name) for name in names):
        return None
    first, second = (file.fields[TOKENS].value for file in (one, other))
    if first == second:
        return Match(None, 0)
    places = {text: row for row, text in reversed([*enumerate(second)])}
    rows = [(row, places[text]) for row, text in enumerate(first) if text in places]
    common = {first[row] for row, _ in rows}
    whole = [number for number, file in enumerate((one, other)) if _texts(file) <= common]
    return Match(np.array(rows, int).reshape(-1, 2).T, whole[0] if whole else None)


def _texts(file: GgufFile) -> set[bytes]:
    """Return the texts of tokens, without those of rows that have none."""
    texts = file.fields[TOKENS].value
    types = file.fields[TYPES].value if TYPES in file.fields else [NORMAL] * len(texts)
    return {text for text, kind in zip(texts, types, strict=False) if kind != UNUSED}


def losses_of(model: Llama, windows: Sequence[Window]) -> Iterator[np.ndarray]:
    """Yield the losses of each window in nats, (tokens - 1,) in float64."""
    for number, parts in groupby(model.logits(windows) if windows else (), itemgetter(0)):
        its = windows[number]
        found = [losses(each, its[begin + 1 : begin + 1 + len(each)]) for _, begin, each in parts]
        yield np.concatenate(found)


def lockstep(
    models: Sequence[Llama], windows: Sequence[Sequence[Window]], rows: np.ndarray | None = None
) -> Iterator[list[Step]]:
    """Yield for each window how each model after the first predicts it, beside the first.

    `windows` (windows, models, tokens) are in tokens of each. `rows` are those of `Match`.
    """
    if not windows:
        return
    of_each = zip(*windows, strict=True)
    runs = [model.logits(its) for model, its in zip(models, of_each, strict=True)]
    for number, parts in groupby(zip(*runs, strict=True), lambda every: every[0][0]):
        nats, found = [], [[] for _ in models[1:]]
        for every in parts:
            begin, logits = every[0][1], [each for *_, each in every]
            targets = [ids[begin + 1 : begin + 1 + len(logits[0])] for ids in windows[number]]
            places = np.arange(len(targets[0]))
            sums = [normalizers(each[: len(places)]) for each in logits]
            each = zip(logits, sums, targets, strict=True)
            nats.append([own - values[places, ids] for values, own, ids in each])
            for place in places:
                first = logits[0][place].astype(np.float64)
                for side, apart in enumerate(found, 1):
                    values = [first, logits[side][place].astype(np.float64)]
                    apart.append(_apart(values, [sums[0][place], sums[side][place]], rows))
        of_each = np.concatenate(nats, 1)
        steps = []
        for side, apart in enumerate(found, 1):
            kl, equal, *left_out = np.array(apart).reshape(-1, 4).T
            steps.append(Step(of_each[[0, side]], kl, equal > 0, np.array(left_out)))
        yield steps


def _apart(
    logits: Sequence[np.ndarray], sums: Sequence[float], rows: np.ndarray | None
) -> tuple[float, float, float, float]:
    """Return KL, whether the first tokens are equal, and the mass left out of each.

    `logits` (2, rows), with the logarithms of the `sums` of their exp.
    """
    left_out = [0.0, 0.0]
    if rows is not None:
        logits = [each[chosen] for each, chosen in zip(logits, rows, strict=True)]
        common = [normalizers(each[None])[0] for each in logits]
        shares = np.exp(np.subtract(common, sums))
        left_out, sums = (1 - shares).clip(min=0).tolist(), common
    one, other = (each - own for each, own in zip(logits, sums, strict=True))
    return float(np.exp(one) @ (one - other)), one.argmax() == other.argmax(), *left_out
