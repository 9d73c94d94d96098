"""The cost and the proof of a trimmed GGUF file, by llama.cpp, each file in a child process.

The cost is measured on IN alone, and OUT must then have IN's log-probabilities. An embedder has
none: its vectors must be equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..util.errors import UserError
from ..util.host import available, gib
from ..vocabulary.cost import excluded_line, pieces_of, places_in, record_cost, record_excluded
from .conversion import Aborted, run_child
from .file import GgufFile
from .llama import Llama, losses, normalizers

NOT_CAUSAL = ("t5", "bert")  # kinds of vocabulary whose models predict no next token
WINDOW = 500  # tokens of a passage at most
ROOM = 12  # positions for the tokens that begin and end a text
# largest difference of log-probabilities, relative to their standard deviation; llama.cpp computes
# a head whose rows are no multiple of STEP by another kernel
LIMIT, ODD_LIMIT, STEP = 1e-6, 1e-4, 8


def embeds(file: GgufFile) -> bool:
    """Return whether a file's model gives vectors in place of predictions."""
    pooled = file.value(f"{file.architecture}.pooling_type", 0) > 0
    return pooled or not file.value(f"{file.architecture}.attention.causal", True)


class Predictions:
    """What llama.cpp computes by both files on passages of `texts`, in the new `folder`.

    `tokenizers` are those of IN and OUT; `kept` (rows,) has the row in IN of each of OUT's.
    """

    def __init__(
        self,
        file: GgufFile,
        tokenizers: tuple[Llama, Llama],
        kept: list[int],
        texts: list[str],
        folder: Path,
    ) -> None:
        self.file, self.kept, self.texts = file, kept, texts
        self.expected, self.found = folder / "expected.npy", folder / "found.npy"
        self.embeds, self.mapped = embeds(file), np.empty(0)  # losses by OUT's tokens
        weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
        context = file.value(f"{file.architecture}.context_length", WINDOW + ROOM)
        window = min(WINDOW, context - ROOM)
        pieces = pieces_of(texts, weights, window, *(each.encode_all for each in tokenizers))
        before, after = tokenizers
        self.pieces = pieces
        self.own = [[before.first, *piece.before] for piece in pieces if texts]  # for the cost
        self.new = [[after.first, *piece.after] for piece in pieces]
        self.places, self.limit = places_in(self.new), ODD_LIMIT if before.rows % STEP else LIMIT
        if self.embeds:  # bit for bit, and begun and ended by the file's fields
            self.own, self.places, self.limit = [], [], 0
            self.new = [after.encode(piece.text, whole=True).tolist() for piece in pieces]

    def measure(self) -> dict[str, Any]:
        """Run IN, and return the record of the cost, or the `reason` why it was not measured."""
        if not self.embeds and self.file.value("tokenizer.ggml.model") in NOT_CAUSAL:
            return {"reason": "it predicts no next token"}
        mapped = [[self.kept[index] for index in ids] for ids in self.new]
        try:
            answer = self._run(self.file.paths[0], self.own, mapped, self.kept, self.expected)
        except UserError as error:
            answer = {"reason": error.problem}
        if self.embeds:
            answer.setdefault("reason", "an embedder predicts no next token")
        elif not self.texts:
            answer.setdefault("reason", "no test text is given")
        if "reason" in answer:
            return {"reason": answer["reason"]}
        self.mapped = np.array(answer["mapped"])
        return record_cost(self.pieces, np.array(answer["own"]), self.mapped)

    def verify(self, out: Path) -> dict[str, Any]:
        """Run OUT if IN could be run, print a line and return a record, {} if nothing was compared.

        Raises UserError if OUT gives other values than IN, or fails where IN did not.
        """
        if not self.expected.is_file():
            return {}
        rows, what, fix = [*range(len(self.kept))], f"OUT {out.name}", "Please report this"
        try:
            answer = self._run(out, [], self.new, rows, self.found)
        except Aborted as error:
            answer = {"reason": error.problem}
        except UserError as error:  # of memory or time, which say nothing on OUT
            return {"unproven": f"{error.problem}; --verify proves OUT later"}
        if "reason" in answer:
            raise UserError(what, f"IN runs, and it does not ({answer['reason']})", fix)
        expected, found = np.load(self.expected), np.load(self.found)
        distance = float(np.abs(found - expected).max() / expected.std())
        if not distance <= self.limit:
            name = "vectors" if self.embeds else "log-probabilities"
            raise UserError(what, f"{name} differ by {distance:.2g} of their spread", fix)
        what = f"log-probabilities after {len(found)} beginnings, {found.size:,} values"
        apart = f"at most {distance:.1g} of their spread apart, after one constant each"
        line = f"proven, probabilities: {what}: {apart}"
        if self.embeds:
            line = f"proven, vectors of {len(self.new)} passages, by OUT's tokens: IN's bit for bit"
        record = {"distance": distance, "beginnings": len(self.places or self.new)}
        if len(self.mapped):
            record |= record_excluded(self.pieces, self.mapped, np.array(answer["mapped"]))
        print(*filter(None, (line, excluded_line(record))), sep="\n")
        return record

    def missing(self, record: Mapping[str, Any]) -> str:
        """Return what a `record` of both methods lacks, "" for nothing."""
        reason = record.get("unproven") or record.get("reason")
        what = ["vectors" if self.embeds else "predictions"] if "distance" not in record else []
        what += ["cost"] if "reason" in record and not self.embeds else []
        return " and ".join(what) + f" ({reason})" * bool(what and reason)

    def _run(
        self, path: Path, own: list[list[int]], windows: list[list[int]], rows: list[int], to: Path
    ) -> dict[str, Any]:
        """Call `values_of` in a child process. Raises UserError if it fails, or memory is short."""
        what, size = f"predictions of {path.name}", self.file.size
        if 1.5 * size > available():  # llama.cpp maps the file, and may repack its weights
            raise UserError(what, f"memory for {gib(size)} is short", "Free some")
        given = dict(path=str(path), own=own, windows=windows, places=self.places, rows=rows)
        # the time limit allows for a reading
        return run_child(what, values_of, size=10 * size, **given, values=str(to))


def values_of(
    path: str,
    own: list[list[int]],
    windows: list[list[int]],
    places: list[list[int]],
    rows: list[int],
    values: str,
) -> dict[str, Any]:
    """Return the losses in nats of windows by IN's `own` tokens, and by OUT's, or a `reason`.

    Writes the log-probabilities among the `rows` at `places` of the latter to the file `values`;
    without places, the vectors of the windows.
    """
    every, sums = [*own, *windows], [0.0] * (len(own) + len(windows))
    found = [np.empty(0)] * len(places)
    try:
        with closing(Llama(path)) as model:
            for number, begin, logits in model.logits(every, vectors=not places):
                if not places:
                    found.extend(logits.copy())
                    continue
                targets = every[number][begin + 1 : begin + 1 + len(logits)]
                sums[number] += float(losses(logits, targets).sum())
                for index, (of, place) in enumerate(places):
                    if len(own) + of == number and begin <= place < begin + len(logits):
                        some = logits[place - begin, rows].astype(np.float64)
                        found[index] = some - normalizers(some[None])
    except ValueError as error:
        return {"reason": str(error)}
    if not np.isfinite(sums).all() or not np.ptp(found) > 0:
        return {"reason": "llama.cpp computes no finite values for it, or always the same"}
    np.save(values, found)
    return {"own": sums[: len(own)], "mapped": sums[len(own) :]}
