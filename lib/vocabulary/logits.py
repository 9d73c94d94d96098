"""The cost and the proof of a trimmed causal model: its losses and logits, block by block.

As in a run of main.py, the model is on the device if it fits, and else its blocks are fetched one
at a time. The cost is measured on IN alone, and OUT must then have IN's logits of the kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.samples import Windows
from ..eval import perplexities
from ..model.blocks import BlockRunner
from ..model.checkpoint import Checkpoint
from ..model.device import checkpoint_dtype, default_batch_size, pick_device, set_current_device
from ..model.pretrained import load_config, load_model, window_length
from ..model.skeleton import build_skeleton, decoder_blocks
from ..model.store import BlockStore
from ..offload.store import FileBlockStore, device_map
from ..util.errors import UserError, first_line
from ..util.files import temporary_folder
from ..util.host import available, gib
from ..util.progress import progress
from .cost import excluded_line, pieces_of, places_in, record_cost, record_excluded

ROOM = 1.3  # times the weights is what a model takes
GPU_TOKENS = 4  # times as many tokens measures a GPU
LIMIT = 1e-5  # largest difference of logits relative to the largest, or 8 steps of the dtype


class MemoryIsShort(UserError):
    """A model cannot be run here, which says nothing about it."""


class Logits:
    """The logits of both folders on passages of held-out texts.

    `tokenizers` are those of IN and OUT; `rows` (rows,) has the row in IN of each of OUT's.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokenizers: Sequence[Any], rows: Tensor, device: str | None
    ) -> None:
        self.checkpoint, self.tokenizers, self.rows = checkpoint, tokenizers, rows
        self.device = pick_device(device)
        set_current_device(self.device)
        self.new: list[list[int]] = []  # windows of OUT's tokens
        self.places: list[list[int]] = []
        self.pieces, self.mapped = [], np.empty(0)  # with their losses by OUT's tokens
        self.expected, self.step = torch.empty(0), 0.0

    def measure(self, texts: list[str]) -> dict[str, Any]:
        """Return the record of the cost, or the `reason` why it was not measured."""
        rows, factor = self.rows.tolist(), 1 if self.device.type == "cpu" else GPU_TOKENS
        encode = [each.encode_all for each in self.tokenizers]
        before, after = (each.first for each in self.tokenizers)
        try:
            with opened(self.checkpoint, self.device) as runner:
                weights, window = (
                    _numbers(runner.model),
                    window_length(runner.model.config, None) - 1,
                )
                pieces = pieces_of(texts, weights, window, *encode, factor)
                own = [[before, *piece.before] for piece in pieces]
                self.new = [[after, *piece.after] for piece in pieces]
                self.places = places_in(self.new)
                mapped = [[rows[index] for index in ids] for ids in self.new]
                if texts:
                    self.pieces = pieces
                    original, self.mapped = _losses(runner, [own, mapped], "predictions of IN")
                self.expected = self._values(runner, mapped, self.rows)
                self.step = torch.finfo(runner.model.dtype).eps
        except Exception as error:  # noqa: BLE001  code of models raises any
            return {"reason": first_line(error)}
        if not texts:
            return {"reason": "no test text is given"}
        return record_cost(pieces, original, self.mapped)

    def verify(self, folder: str) -> dict[str, Any]:
        """Return the difference of OUT's logits, {} if IN was not run, or a `reason`.

        Raises UserError if the difference exceeds rounding.
        """
        if not self.expected.numel():
            return {}
        out = replace(self.checkpoint, name=folder, flag="OUT", revision=None)
        try:
            with opened(out, self.device) as runner:
                values = self._values(runner, self.new, None)
                if self.pieces:
                    (losses,) = _losses(runner, [self.new], "predictions of OUT")
        except (MemoryIsShort, MemoryError, torch.OutOfMemoryError) as error:
            return {"reason": first_line(error)}
        limit = max(8 * self.step, LIMIT)
        ratio = float((values - self.expected).abs().max() / self.expected.abs().max())
        if not ratio <= limit:
            problem = f"logits of kept tokens differ by {ratio:.2g} (rounding explains {limit:.2g})"
            raise UserError("OUT", problem, "Please report this")
        record = {"logits_differ": ratio, "beginnings": len(self.places)}
        return record | (record_excluded(self.pieces, self.mapped, losses) if self.pieces else {})

    def lines(self, record: dict[str, Any]) -> list[str]:
        """Return lines on a record of both methods."""
        if "logits_differ" not in record:
            missing = "logits" if "measured_on" in record else "logits and cost"
            return [f"not verified: {missing} ({record['reason']})"]
        n, ratio = record["beginnings"], record["logits_differ"]
        what = f"logits after {n} beginnings, {self.expected.numel():,} values"
        lines = [f"proven, probabilities: {what}: equal to {ratio:.1g}"]
        lines += filter(None, [excluded_line(record)])
        if "reason" in record:
            lines.append(f"not verified: cost ({record['reason']})")
        return lines

    def _values(self, runner: BlockRunner, windows: list[list[int]], rows: Tensor | None) -> Tensor:
        """Return the logits (places, rows) after the beginnings."""
        which = sorted({number for number, _ in self.places})
        (states,) = runner.run_blocks([_windows([windows[number] for number in which])])
        values = []
        for number, place in self.places:
            at = which.index(number)
            position = torch.tensor([place], device=runner.device)
            logits = runner.logits(states, slice(at, at + 1))(position)[0, 0].float().cpu()
            values.append(logits if rows is None else logits[rows])
        return torch.stack(values)


def _losses(runner: BlockRunner, sets: Sequence[Any], what: str) -> list[np.ndarray]:
    """Return the losses in nats of the windows in each of the `sets`, (windows,) in float64."""
    with progress(sum(map(len, sets)), what, "window") as bar:
        figures = perplexities(runner, [*map(_windows, sets)], bar)
    means = [each["by_window"] for each in figures]
    return [(each["loss"].double() * each["tokens"]).numpy() for each in means]


def _windows(rows: Sequence[Sequence[int]]) -> Windows:
    """Return windows of equal length; what fills them up does not count."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, 1 : len(row)] = True
    return Windows(ids, mask)


@contextmanager
def opened(checkpoint: Checkpoint, device: torch.device) -> Iterator[BlockRunner]:
    """Load a model in the dtype of its checkpoint; blocks are fetched if it does not fit.

    Raises MemoryIsShort if not even one block fits beside the rest.
    """
    config = load_config(checkpoint)
    bare, dtype = build_skeleton(config, checkpoint), checkpoint_dtype(config)
    name, blocks = decoder_blocks(bare)
    free = available() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    whole, inside = (ROOM * dtype.itemsize * _numbers(each) for each in (bare, blocks))
    largest = ROOM * dtype.itemsize * max(map(_numbers, blocks))
    resident = whole < free
    if not resident and whole - inside + largest > free:
        problem = f"memory for {gib(whole - inside + largest)} is short"
        raise MemoryIsShort(str(checkpoint), problem, "Free some")
    where = {"": device} if resident else device_map(bare, name, device)
    with temporary_folder() as converted:
        options = dict(dtype=dtype, device_map=where, offload=None if resident else str(converted))
        model, store = load_model(checkpoint, config, **options), None
        if not resident:
            files = dict(folder=None, on_disk=True, cast_on_load=False)
            store = FileBlockStore(model, device, **files)
        width = config.get_text_config(decoder=True).hidden_size
        options = dict(batch_size=default_batch_size(device, 256, width), flag=checkpoint.flag)
        runner = BlockRunner(model, device, store or BlockStore(model, device), **options)
        try:
            runner.verify()
        except UserError:
            runner = BlockRunner(model, device, runner.weights, **options, whole=True)
            runner.verify()
        yield runner


def _numbers(module: nn.Module) -> int:
    return sum(each.numel() for each in chain(module.parameters(), module.buffers()))
