"""A run as a plain object: all decisions before weights are read, and all later measurements."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, device, dtype, nn

from ..data.samples import Windows
from ..data.sources import Source
from ..data.training import TrainingText
from ..data.windows import TestSet
from ..distributed.context import DistContext
from ..model.access import Checkpoint
from ..model.parts import PartLayout
from ..model.pretrained import skeleton_with
from ..model.run_folder import RunFolder
from ..recover import TrainSchedule
from ..sharded import can_share
from ..util.progress import progress
from ..vocabulary import TrimmedVocabulary
from .plan import Plan


@dataclass
class Texts:
    """All windows of a run; `bos` is the id at the start of each of them, or None."""

    bos: int | None
    windows: Tensor | Windows | None = None  # calibration windows (windows, tokens)
    calibration: dict[str, Any] | None = None  # record of their source
    tests: list[TestSet] = field(default_factory=list)
    training: TrainingText | None = None  # for recovery


@dataclass
class Outcome:
    """The measurements of a run, filled by its steps."""

    results: dict[str, Any] = field(default_factory=dict)  # see lib/run/results.py
    losses: dict[str, Tensor] = field(default_factory=dict)  # by window, see lib/run/results.py
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by step
    folder: RunFolder | None = None  # of finished blocks, in the main rank
    is_saved: bool = False  # the model is on the disk; in the main rank
    layers: dict[str, float] = field(default_factory=dict)  # share of zeros of each linear layer
    is_recorded: bool = False  # the results are on the disk


@dataclass(frozen=True)
class Job:
    """Everything that is decided about a run before any weight is read.

    Only `texts` may change later, if the dense model turns out to need BOS.
    """

    args: argparse.Namespace
    plan: Plan
    device: device
    dtype: dtype  # compute dtype
    save_dtype: dtype  # dtype of the saved weights
    dist: DistContext
    checkpoint: Checkpoint
    config: Any
    tokenizer: Any  # the trimmed one, if the vocabulary is trimmed
    seqlen: int
    skeleton: nn.Module  # the model without weights
    blocks_name: str
    sources: list[Source] = field(default_factory=list)  # calibration sources
    vocabulary_sources: list[Source] = field(default_factory=list)  # their tokens are kept
    tests: list[Source] = field(default_factory=list)
    batch_size: int = 1
    layout: PartLayout | None = None  # neurons or experts, if they are removed
    left: int | None = None  # number that each block keeps of these
    vocabulary: TrimmedVocabulary | None = None
    schedule: TrainSchedule | None = None  # recovery training
    teacher: Checkpoint | None = None
    teacher_config: Any = None
    teacher_rows: Tensor | None = None  # the teacher's vocabulary rows that the model has
    smaller: bool = False  # the model has fewer neurons or experts than the teacher
    texts: Texts = field(default_factory=lambda: Texts(None))
    fingerprint: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: Path | None = None  # folder of a sweep, for the dense model's states
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def dense_key(self) -> str:
        """Digest of everything that the dense model's states on the test windows depend on."""
        pruning, measuring = self.fingerprint["pruning"], self.fingerprint["measuring"]
        names = ["--dtype", "--load_bit", "kind of device"]
        names += [name for name in pruning if name.startswith(("weights", "config", "version"))]
        trimmed = self.vocabulary and self.vocabulary.digest
        values = [*map(pruning.get, names), measuring, trimmed, self.texts.bos, self.seqlen]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def small_skeleton(self) -> nn.Module:
        """Return the model without weights, as it is after neurons or experts are removed."""
        if not self.layout:
            return self.skeleton
        smaller = skeleton_with(self.config, self.layout.field, self.left, self.checkpoint)
        return smaller or self.skeleton

    @property
    def shares(self) -> bool:
        """Whether ranks share out the trained weights."""
        blocks = self.skeleton.get_submodule(self.blocks_name)
        return bool(self.schedule) and self.dist.size > 1 and can_share(blocks)

    @contextmanager
    def timed(self, step: str, what: str = "", total: int = 0, unit: str = "block") -> Iterator:
        """Count wall time in this context as that of `step`; yield a callback to advance a bar.

        The bar is named `what` and is full after `total` units; without a name there is none.
        """
        start = time.perf_counter()
        shown = bool(what) and self.dist.is_main
        with progress(total, what, unit, shown, step) as on_progress:
            yield on_progress
        seconds = self.outcome.seconds
        seconds[step] = round(seconds.get(step, 0) + time.perf_counter() - start, 3)

    def print(self, *lines: str) -> None:
        """Print lines in the main rank."""
        if self.dist.is_main and lines:
            print(*lines, sep="\n", flush=True)
