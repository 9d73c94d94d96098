"""What a trimmed vocabulary costs, and what excluding tokens takes away from the loss.

The cost: both passes are of the original model with all its rows, on its own tokens, and on those
of the trimmed tokenizer, mapped to its rows. It is an upper bound: the trimmed model does not lose
the share of the probability that the original gives to the removed tokens. How much that is, its
own loss on the same tokens says. Bits per byte fall by it without being a gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from ..data.documents import passages
from ..data.lines import LINES
from ..util.errors import counted
from ..util.statistics import ratio_interval

COSTS = "bits_per_byte_original", "bits_per_byte_trimmed", "cost_interval"  # in a record
EXCLUDED = "excluded"  # in a record
MOST_COST = 0.02  # rise of bits per byte for which a vocabulary is trimmed
OPERATIONS = 1e12  # weights times tokens: two cores take about two minutes
FEWEST, MOST = 512, 8192  # tokens that are measured
PIECES, SHORTEST, LONGEST = 24, 32, 256  # documents at least, and tokens of each
PLACES = 24  # beginnings after which predictions are compared
TYPICAL = 100  # texts by which the letters of a token are estimated
Encode = Callable[[list[str]], Sequence[np.ndarray]]


class Piece(NamedTuple):
    """A passage of a test document, with its tokens by both vocabularies."""

    document: int
    text: str
    before: list[int]
    after: list[int]


def pieces_of(
    texts: Sequence[str], weights: int, window: int, before: Encode, after: Encode, factor: int = 1
) -> list[Piece]:
    """Return passages of test texts for the measurement of a model with so many `weights`.

    They are spread over the documents, and over their beginnings, middles and ends; a second one of
    a document is taken only if all documents are too few. None has more than `window` tokens.
    `factor`: how many times as many tokens a fast device measures.
    """
    texts = [text for text in texts if text.strip()] or LINES
    wanted = factor * min(MOST, max(FEWEST, OPERATIONS / max(weights, 1)))
    length = min(LONGEST, window, max(SHORTEST, wanted / PIECES))  # tokens
    some = [text[:1000] for text in texts[:: max(1, len(texts) // TYPICAL)]]
    letters = sum(map(len, some)) / max(1, sum(map(len, before(some))))  # of a token
    cut = [passages(text, math.ceil(length * letters)) for text in texts]
    turns = [len(each) * number // len(cut) for number, each in enumerate(cut)]
    cut = [each[turn:] + each[:turn] for each, turn in zip(cut, turns, strict=True)]
    left, chosen = wanted * letters, []
    for level in zip_longest(*cut):
        there = [(number, text) for number, text in enumerate(level) if text]
        mean = sum(len(text) for _, text in there) / len(there)
        count = min(len(there), math.ceil(left / mean))
        chosen += [there[index * len(there) // count] for index in range(count)]
        left -= count * mean
        if left <= 0:
            break
    pieces = []
    for number, text in chosen:
        while True:
            old, new = before([text])[0], after([text])[0]
            if max(len(old), len(new)) <= window:
                break
            text = text[: len(text) // 2]
        pieces.append(Piece(number, text, old.tolist(), new.tolist()))
    return [piece for piece in pieces if piece.before and piece.after]


def places_in(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return beginnings of windows, after which predictions are compared: window, position.

    There are up to PLACES, spread over the windows, and over each window that has several.
    """
    count = max(1, len(windows))
    turns = -(-PLACES // count)
    places = [(number % count, 1 + number // count) for number in range(PLACES)]
    found = ((n, turn * len(windows[n]) // (turns + 1)) for n, turn in places if windows)
    return [*map(list, dict.fromkeys(found))]


def record_cost(pieces: Sequence[Piece], original: np.ndarray, trimmed: np.ndarray) -> dict:
    """Return COSTS by both losses of the pieces, (n,) each, in nats, and what was measured.

    The interval is paired over documents; None for few.
    """
    n_bytes, documents = sum(len(piece.text.encode()) for piece in pieces), _documents(pieces)
    mean, interval = _over(documents, trimmed, original)
    bits = float(np.sum(original)) / math.log(2) / n_bytes
    tokens, n_documents = sum(len(piece.before) for piece in pieces), int(documents.max()) + 1
    counts = {"cost": mean, "bytes": n_bytes, "tokens": tokens, "documents": n_documents}
    costs = zip(COSTS, (bits, bits * (1 + mean), interval), strict=True)
    return dict(costs) | {"measured_on": counts}


def record_excluded(pieces: Sequence[Piece], trimmed: np.ndarray, out: np.ndarray) -> dict:
    """Return by how much the losses of OUT are below IN's on the same tokens, (n,) each."""
    mean, interval = _over(_documents(pieces), out, trimmed)
    return {EXCLUDED: mean, f"{EXCLUDED}_interval": interval}


def _documents(pieces: Sequence[Piece]) -> np.ndarray:
    """Return the number of the document of each piece, (n,), without gaps."""
    return np.unique([piece.document for piece in pieces], return_inverse=True)[1]


def _over(
    documents: np.ndarray, losses: np.ndarray, base: np.ndarray
) -> tuple[float, list[float] | None]:
    """Return by how much losses exceed others, as a share, and an interval over documents."""
    found = ratio_interval(*(np.bincount(documents, weights=each) for each in (losses, base)))
    return found.mean, [found.low, found.high] if documents.max() > 2 else None


def cost_line(record: Mapping[str, Any]) -> str:
    """Return a line on the cost in a record."""
    original, trimmed, interval = (record[name] for name in COSTS)
    measured = record["measured_on"]
    on = "{tokens:,} tokens, {bytes:,} bytes of ".format(**measured)
    on += counted(measured["documents"], "test document")
    cost = f"{trimmed / original - 1:+.2%} bits per byte{_between(interval)}"
    return (
        f"longer tokens cost at most {cost} on {on}: IN with all its rows {original:.4f} on its "
        f"own tokens, {trimmed:.4f} on those of OUT"
    )


def excluded_line(record: Mapping[str, Any]) -> str:
    """Return a line on what excluding tokens takes away from the loss, if it is in a record."""
    if EXCLUDED not in record:
        return ""
    share, interval = record[EXCLUDED], record[f"{EXCLUDED}_interval"]
    return (
        f"beside IN on the same tokens, OUT needs {share:+.2%} bits per byte{_between(interval)}, "
        "as fewer tokens share the probability: by construction, so no gain"
    )


def _between(interval: Sequence[float] | None) -> str:
    return " (95% interval {:+.2%} to {:+.2%})".format(*interval) if interval else ""
