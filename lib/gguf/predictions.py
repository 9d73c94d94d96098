"""The cost and the proof of a trimmed GGUF file: llama.cpp's logits, each file in a child process.

The cost is measured on IN alone, and OUT must then have IN's log-probabilities.
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..util.errors import UserError
from ..util.host import available, gib
from ..vocabulary.cost import PLACES, pieces_of, places_in, record_cost
from .conversion import run_child
from .file import GgufFile
from .llama import Llama, normalizers

WINDOW = 500  # tokens of a passage at most
LIMIT = 1e-5  # largest difference of log-probabilities


class Predictions:
    """The predictions of both files on passages of `texts`.

    `tokenizers` are those of IN and OUT; `kept` (rows,) has the row in IN of each of OUT's.
    """

    def __init__(
        self, file: GgufFile, tokenizers: tuple[Llama, Llama], kept: list[int], texts: list[str]
    ) -> None:
        self.file, self.kept = file, kept
        weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
        encode = [each.encode_all for each in tokenizers]
        self.pieces = pieces_of(texts, weights, WINDOW, *encode)
        before, after = (each.first for each in tokenizers)
        self.own = [[before, *piece.before] for piece in self.pieces]
        self.new = [[after, *piece.after] for piece in self.pieces]
        self.places = places_in(self.new)

    def measure(self, expected: Path) -> dict[str, Any]:
        """Return the record of the cost, or the `reason` why it was not measured.

        Writes the values that OUT must have to `expected`.
        """
        file = self.file
        if 1.5 * file.size > available():  # llama.cpp maps the file, and may repack its weights
            return {"reason": f"memory for {gib(file.size)} is short"}
        mapped = [[self.kept[index] for index in ids] for ids in self.new]
        given = dict(path=str(file.paths[0]), own=self.own, mapped=mapped, places=self.places)
        given |= dict(kept=self.kept, expected=str(expected))
        # the time limit allows for a reading
        answer = run_child("predictions of IN", losses_of, size=10 * file.size, **given)
        if "reason" in answer:
            return answer
        losses = [np.array(answer[name]) for name in ("own", "mapped")]
        return record_cost(self.pieces, *losses)

    def verify(self, partial: Path, expected: Path) -> dict[str, Any]:
        """Return the largest difference of log-probabilities, after the constant that the removed
        tokens held. Raises UserError if it is not tiny."""
        given = dict(path=str(partial), windows=self.new, places=self.places)
        given["expected"] = str(expected)
        size = 10 * self.file.size
        distance = run_child("predictions of OUT", distance_of, size=size, **given)
        if not distance <= LIMIT:
            problem = f"log-probabilities differ by {distance:.2g}"
            raise UserError(f"OUT {partial.name}", problem, "Please report this")
        print(
            f"log-probabilities after {PLACES} beginnings, {PLACES * len(self.kept):,} values: "
            f"equal to {distance:.1g} after one constant each"
        )
        return {"distance": distance, "beginnings": PLACES}


def losses_of(
    path: str,
    own: list[list[int]],
    mapped: list[list[int]],
    places: list[list[int]],
    kept: list[int],
    expected: str,
) -> dict[str, Any]:
    """Return the losses in nats of windows by IN's own tokens, and by OUT's in IN's rows.

    Writes the log-probabilities of the rows `kept` at `places` of the latter to `expected`.
    """
    windows, losses = [*own, *mapped], [0.0] * (len(own) + len(mapped))
    values = _Values(places, kept)
    try:
        with closing(Llama(path)) as model:
            for number, begin, logits in model.logits(windows):
                targets = windows[number][begin + 1 : begin + 1 + len(logits)]
                found = logits[np.arange(len(targets)), targets]
                losses[number] += float((normalizers(logits)[: len(targets)] - found).sum())
                values.add(number - len(own), begin, logits)
    except ValueError as error:
        return {"reason": str(error)}
    if not np.isfinite(losses).all():
        return {"reason": "its log-probabilities are not finite"}
    np.save(expected, values.found)
    return {"own": losses[: len(own)], "mapped": losses[len(own) :]}


def distance_of(
    path: str, windows: list[list[int]], places: list[list[int]], expected: str
) -> float:
    """Return the largest difference of log-probabilities from `expected`."""
    values, which = _Values(places), sorted({number for number, _ in places})
    with closing(Llama(path)) as model:
        for number, begin, logits in model.logits([windows[number] for number in which]):
            values.add(which[number], begin, logits)
    return float(np.abs(np.array(values.found) - np.load(expected)).max())


class _Values:
    """Log-probabilities among the `rows` after beginnings, as they come: (places, rows)."""

    def __init__(self, places: list[list[int]], rows: list[int] | slice = slice(None)) -> None:
        self.places, self.rows = places, rows
        self.found: list[np.ndarray] = [np.empty(0)] * len(places)

    def add(self, number: int, begin: int, logits: np.ndarray) -> None:
        """Add those of the logits (tokens, rows) from a position of a window on."""
        for index, (of, place) in enumerate(self.places):
            if of == number and begin <= place < begin + len(logits):
                values = logits[place - begin, self.rows].astype(np.float64)
                self.found[index] = values - normalizers(values[None])
