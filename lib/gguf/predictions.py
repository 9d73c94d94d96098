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
from ..vocabulary.cost import pieces_of, places_in, record_cost
from .conversion import Aborted, run_child
from .file import GgufFile
from .llama import Llama, normalizers

WINDOW = 500  # tokens of a passage at most
ROOM = 12  # positions for the tokens that begin and end a text
# largest difference of log-probabilities, relative to their standard deviation; llama.cpp computes
# a head whose rows are no multiple of STEP by another kernel
LIMIT, ODD_LIMIT, STEP = 1e-6, 1e-4, 8


class Predictions:
    """What llama.cpp computes by both files on passages of `texts`, in the new `folder`.

    `tokenizers` are those of IN and OUT; `kept` (rows,) has the row in IN of each of OUT's. A model
    that neither `predicts` a next token nor embeds texts is not run.
    """

    def __init__(
        self,
        file: GgufFile,
        tokenizers: tuple[Llama, Llama],
        kept: list[int],
        texts: list[str],
        folder: Path,
        predicts: bool,
    ) -> None:
        self.file, self.kept, self.has_text = file, kept, bool(texts)
        self.limit = ODD_LIMIT if tokenizers[0].rows % STEP else LIMIT
        self.expected, self.found = folder / "expected.npy", folder / "found.npy"
        name = file.value("general.architecture", "")
        pooled = file.value(f"{name}.pooling_type", 0) > 0
        self.embeds = pooled or not file.value(f"{name}.attention.causal", True)
        self.runs = predicts or self.embeds
        weights = sum(math.prod(tensor.shape) for tensor in file.tensors)
        encode = [each.encode_all for each in tokenizers]
        window = min(WINDOW, file.value(f"{name}.context_length", WINDOW + ROOM) - ROOM)
        self.pieces = pieces_of(texts, weights, window, *encode)
        before, after = tokenizers
        self.own = [[before.first, *piece.before] for piece in self.pieces]
        self.new = [[after.first, *piece.after] for piece in self.pieces]
        if self.embeds:  # which begins and ends a text by the file's fields
            self.own, self.new = (
                [each.encode(piece.text, whole=True).tolist() for piece in self.pieces]
                for each in tokenizers
            )
        self.mapped = [[kept[index] for index in ids] for ids in self.new]
        self.places = places_in(self.new)

    def measure(self) -> dict[str, Any]:
        """Run IN, and return the record of the cost, or the `reason` why it was not measured."""
        if not self.runs or not self.pieces:
            return {"reason": "it predicts no next token" if self.pieces else "no text has tokens"}
        try:
            answer = self._run("IN", self.file.paths[0], self.own, self.mapped, self.kept)
        except UserError as error:
            return {"reason": error.problem}
        if "reason" in answer:
            return answer
        if self.embeds:
            return {"reason": "an embedder predicts no next token"}
        if not self.has_text:
            return {"reason": "no test text is given"}
        losses = [np.array(answer[name]) for name in ("own", "mapped")]
        return record_cost(self.pieces, *losses)

    def verify(self, out: Path) -> dict[str, Any]:
        """Run OUT if IN could be run, print a line and return a record, {} if nothing was compared.

        Raises UserError if OUT gives other values than IN, or fails where IN did not.
        """
        if not self.expected.is_file():
            return {}
        try:
            answer = self._run("OUT", out, [], self.new, [*range(len(self.kept))])
        except Aborted as error:
            answer = {"reason": error.problem}
        except UserError as error:  # of memory or time, which say nothing on OUT
            return {"unproven": error.problem}
        what, fix = f"OUT {out.name}", "Please report this"
        if "reason" in answer:
            raise UserError(what, f"IN runs, and it does not ({answer['reason']})", fix)
        expected, found = np.load(self.expected), np.load(self.found)
        if self.embeds:
            if not np.array_equal(expected, found):
                raise UserError(what, "vectors of the same tokens differ", fix)
            alike = sum(map(list.__eq__, self.own, self.mapped))
            print(
                f"vectors of {len(self.pieces)} passages, by OUT's tokens: equal to IN's bit for "
                f"bit; {alike} of the passages have these tokens in IN"
            )
            return {"vectors": len(self.pieces), "alike": alike}
        distance = float((np.abs(found - expected) / expected.std(-1, keepdims=True)).max())
        if not distance <= self.limit:
            problem = f"log-probabilities differ by {distance:.2g} of their spread"
            raise UserError(what, problem, fix)
        print(
            f"log-probabilities after {len(found)} beginnings, {found.size:,} values: at most "
            f"{distance:.1g} of their spread apart, after one constant each"
        )
        return {"distance": distance, "beginnings": len(found)}

    def missing(self, record: Mapping[str, Any]) -> str:
        """Return what a `record` of both methods has not verified."""
        what = "vectors" if self.embeds else "predictions"
        if "unproven" in record:
            return f"{what} of OUT ({record['unproven']}); trim IN OUT --verify proves it"
        if not {"distance", "vectors"} & record.keys():
            return f"{what}{' and cost' * (not self.embeds)} ({record['reason']})"
        longest = f"texts past {max(map(len, self.own))} tokens"
        if self.embeds:
            return longest
        unmeasured = f"cost ({record['reason']}), " if "reason" in record else ""
        return f"{unmeasured}{longest}, answers of the model"

    def _run(
        self, of: str, path: Path, own: list[list[int]], windows: list[list[int]], rows: list[int]
    ) -> dict[str, Any]:
        """Let llama.cpp compute a file's values, and return the losses or a `reason`.

        Raises UserError if memory is short, or the child process fails.
        """
        size, values = self.file.size, self.expected if of == "IN" else self.found
        if 1.5 * size > available():  # llama.cpp maps the file, and may repack its weights
            raise UserError(of, f"memory for {gib(size)} is short", "Free some")
        given = dict(path=str(path), windows=windows, values=str(values))
        given["size"] = 10 * size  # the time limit allows for a reading
        if self.embeds:
            return run_child(f"vectors of {of}", vectors_of, **given)
        given |= dict(own=own, places=self.places, rows=rows)
        return run_child(f"predictions of {of}", losses_of, **given)


def vectors_of(path: str, windows: list[list[int]], values: str) -> dict[str, Any]:
    """Write the vectors of windows to the file `values`, and return {}, or a `reason`."""
    try:
        with closing(Llama(path)) as model:
            found = np.concatenate([*model.vectors(windows)])
    except ValueError as error:
        return {"reason": str(error)}
    if not (np.isfinite(found).all() and found.any()):
        return {"reason": "its vectors are not finite, or 0"}
    np.save(values, found)
    return {}


def losses_of(
    path: str,
    own: list[list[int]],
    windows: list[list[int]],
    places: list[list[int]],
    rows: list[int],
    values: str,
) -> dict[str, Any]:
    """Return the losses in nats of windows by IN's `own` tokens, and by OUT's, or a `reason`.

    Writes the log-probabilities among the `rows` at `places` of the latter to the file `values`.
    """
    every, losses = [*own, *windows], [0.0] * (len(own) + len(windows))
    found = [np.empty(0)] * len(places)
    try:
        with closing(Llama(path)) as model:
            for number, begin, logits in model.logits(every):
                targets = every[number][begin + 1 : begin + 1 + len(logits)]
                aimed = logits[np.arange(len(targets)), targets]
                losses[number] += float((normalizers(logits)[: len(targets)] - aimed).sum())
                for index, (of, place) in enumerate(places):
                    if len(own) + of == number and begin <= place < begin + len(logits):
                        some = logits[place - begin, rows].astype(np.float64)
                        found[index] = some - normalizers(some[None])
    except ValueError as error:
        return {"reason": str(error)}
    if not np.isfinite(losses).all():
        return {"reason": "its log-probabilities are not finite"}
    if not np.ptp(found, -1).all():
        return {"reason": "llama.cpp computes no logits for it"}
    np.save(values, found)
    return {"own": losses[: len(own)], "mapped": losses[len(own) :]}
