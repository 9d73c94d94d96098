"""The dense model and the texts kept in memory, for many runs of main.py in one process.

Every run gets a copy of its own, so that whatever it does to it (prune, swap linears, cast to the
dtype it saves in) is gone with it, and the results are those of a run by itself.
"""

from __future__ import annotations

import argparse
import copy
import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.model import pretrained as model
from lib.report.results import write_results
from main import Job

_RESET_PEAK = "5"  # Linux, proc(5): the high-water mark of resident memory starts again from now


class Kept:
    """What runs on one model share."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None  # on the host
        self.loaded_by: tuple | None = None  # the settings that it was loaded with
        self.texts: dict[tuple, tuple] = {}


class KeptJob(Job):
    """A run that takes dense weights and texts from `kept`, and leaves there what it had to read.

    Models that are offloaded or quantised are read anew by every run.
    """

    def __init__(self, args: argparse.Namespace, kept: Kept) -> None:
        super().__init__(args)
        self.kept = kept

    def run(self) -> None:
        self.peak_is_own = _start_peak(self.args.device)
        super().run()

    def read_texts(self) -> None:
        args, kept = self.args, self.kept.texts
        drawn = (args.calibration_data, args.prune_on_c4, args.nsamples, args.seed)
        key = _key(args.eval_data, self.seqlen, self.bos, self.calibrated and drawn)
        if key in kept:
            self.windows, self.calibration, self.test_sets = kept[key]
            return
        super().read_texts()
        kept[key] = self.windows, self.calibration, self.test_sets

    def read_model(self, where: dict) -> nn.Module:
        args, kept = self.args, self.kept
        quantised = args.load_bit or getattr(self.config, "quantization_config", None)
        if len(where) > 1 or quantised:
            return super().read_model(where)
        settings = _key(args.model, args.dtype, args.cache_dir, self.device)
        if kept.loaded_by != settings:
            kept.model = None  # before the next one needs its room
            # read where main.py reads it, so that tables computed on loading are the same
            kept.model = super().read_model(where).to("cpu")
            kept.loaded_by = settings
        return fresh_copy(kept.model).to(self.device)

    def record(self) -> None:
        super().record()
        whose = "this run" if self.peak_is_own else "the sweep up to this run"
        beside = ", with the dense model kept beside it" if self.kept.model is not None else ""
        self.results["peak_memory"]["of"] = whose + beside
        write_results(Path(self.args.save), self.results)


def fresh_copy(dense: nn.Module) -> nn.Module:
    """A copy that may be changed in every way; the weights outside its blocks share memory with
    `dense` as long as they are not moved or cast, because no run writes into those."""
    _, blocks = model.decoder_blocks(dense)
    written = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.data, requires_grad=False)
        for p in dense.parameters()
        if id(p) not in written
    }
    return copy.deepcopy(dense, memo)


def _key(*parts: Any) -> tuple:
    return tuple(map(repr, parts))


def _start_peak(device: str) -> bool:
    """Forget the peaks of memory so far; whether the host's could be forgotten."""
    gc.collect()  # the run before may have left cycles
    if torch.cuda.is_initialized() and device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True
