"""A cache of the dense model and the texts, for many runs of main.py in one process.

Every run gets its own copy, so that its changes (pruned weights, swapped linears, another dtype)
end with it, and its results are those of a single run.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lib.model.pretrained import fresh_copy
from lib.run.job import NoCache, TextRequest, Texts

if TYPE_CHECKING:
    from lib.vocabulary import TrimmedVocabulary

_RESET_PEAK = "5"  # Linux, proc(5): the high-water mark of resident memory starts again from now

QUESTION_SEED = 0  # of runs that draw no calibration text too


class SweepCache(NoCache):
    """Holds dense weights and texts that several runs share.

    Offloaded and quantised models are not cached: every run reads them anew.
    """

    def __init__(self) -> None:
        self.dense: nn.Module | None = None  # on the host
        self.dense_key: str | None = None
        self.read_texts: dict[TextRequest, Texts] = {}
        self.outputs_of_dense: dict[str, Any] = {}
        self.vocabularies: dict[str, TrimmedVocabulary] = {}

    def texts(self, request: TextRequest, tokenizer: Any) -> Texts:
        if request not in self.read_texts:
            self.read_texts[request] = request.read(tokenizer)
        return copy.copy(self.read_texts[request])

    def vocabulary(self, key: tuple, make: Callable[[], TrimmedVocabulary]) -> TrimmedVocabulary:
        if repr(key) not in self.vocabularies:
            self.vocabularies[repr(key)] = make()
        vocabulary = self.vocabularies[repr(key)]
        return replace(vocabulary, facts=dict(vocabulary.facts))

    def model(self, key: tuple, device: torch.device, read: Callable[[], nn.Module]) -> nn.Module:
        settings = repr((key, device))
        if self.dense_key != settings:
            self.dense = None  # freed before the next model is read
            # read on `device` as main.py does, so that tables computed on loading are the same
            self.dense = read().to("cpu")
            self.dense_key = settings
        return fresh_copy(self.dense).to(device)

    def question_seed(self, seed: int) -> int:
        """Return one seed for all runs, whose answers are compared."""
        return QUESTION_SEED

    def dense_outputs(self, key: tuple, compute: Callable[[], Any]) -> Any:
        if repr(key) not in self.outputs_of_dense:
            self.outputs_of_dense[repr(key)] = compute()
        return self.outputs_of_dense[repr(key)]

    def beside(self, own_peak: bool) -> str:
        """Say what a peak of memory covers; `own_peak` says that it was reset for the run."""
        covered = "this run" if own_peak else "the sweep up to this run"
        return covered + (", with the dense model kept beside it" if self.dense is not None else "")


def start_peak(device: str) -> bool:
    """Reset the peaks of memory; return whether the host's could be reset."""
    gc.collect()  # the run before may have left cycles
    if torch.cuda.is_initialized() and device.startswith("cuda"):
        torch.cuda.empty_cache()  # cached memory would count as used
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True
