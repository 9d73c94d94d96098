"""The cost and the proof of a trimmed GGUF file: llama.cpp's logits, each file in a child process.

The cost is measured on IN alone, and OUT must then have IN's log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.gguf_file import GgufFile
from ...data.trimming_cost import PLACES, pieces_of, places_in, record_cost
from ...util.errors import UserError
from ...util.host import available, gib
from ..gguf.llama_cpp import run_child
from .llama import Llama

WINDOW = 500  # tokens of a passage at most, less than a context of llama.cpp
LIMIT = 1e-5  # largest difference of log-probabilities
CHUNK = 64  # positions whose logits are in memory as float64


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
    try:
        model = Llama(Path(path))
        windows = [*own, *mapped]
        losses = [*map(_loss, model.logits(windows), windows)]
        np.save(expected, _values_at(model, mapped, places, kept))
        model.free()
    except ValueError as error:
        return {"reason": str(error)}
    if not np.isfinite(losses).all():
        return {"reason": "its log-probabilities are not finite"}
    return {"own": losses[: len(own)], "mapped": losses[len(own) :]}


def distance_of(
    path: str, windows: list[list[int]], places: list[list[int]], expected: str
) -> float:
    """Return the largest difference of log-probabilities from `expected`."""
    model = Llama(Path(path))
    values = _values_at(model, windows, places)
    model.free()
    return float(np.abs(values - np.load(expected)).max())


def _values_at(
    model: Llama,
    windows: Sequence[Sequence[int]],
    places: list[list[int]],
    rows: list[int] | slice = slice(None),
) -> np.ndarray:
    """Return log-probabilities among the `rows` after the beginnings `places`: (places, rows)."""
    which = sorted({number for number, _ in places})
    found = {}
    for number, logits in zip(which, model.logits([windows[n] for n in which]), strict=True):
        for of, place in places:
            if of == number:
                values = logits[place, rows].astype(np.float64)
                found[of, place] = values - _normalizers(values[None])
    return np.stack([found[of, place] for of, place in places])


def _loss(logits: np.ndarray, ids: Sequence[int]) -> float:
    """Return the summed loss of the tokens after the first by logits (tokens, rows)."""
    loss, targets = 0.0, np.array(ids)[1:]
    for start in range(0, len(targets), CHUNK):
        some = targets[start : start + CHUNK]
        part = logits[start : start + len(some)].astype(np.float64)
        loss += float((_normalizers(part) - part[np.arange(len(some)), some]).sum())
    return loss


def _normalizers(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the sums of exp(logits), (tokens,)."""
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[:, None]).sum(-1))
