"""A run as one object: all decisions before weights are read, and all later measurements.

`check` of lib/run/check.py builds it, complete. Its steps change only `windows`, if the dense model
turns out to need BOS, the measurements, and the open `folder`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.planned_inputs import SharedInput, expected_inputs
from ..methods.sparsity import EXPERTS
from ..model.checkpoint import Checkpoint
from ..model.parts import StructureLayout, find_parts
from ..model.skeleton import build_skeleton, skeleton_with
from ..offload.sharded import can_share
from ..stages.recover import TrainSchedule
from ..stages.remove import experts_left, neurons_left
from ..util.progress import progress
from ..util.ranks import DistContext
from ..util.resume import RunFolder
from .plan import Flags
from .windows import Corpora, RunWindows


@dataclass(frozen=True)
class Model:
    """A model before its weights are read."""

    checkpoint: Checkpoint
    config: Any
    skeleton: nn.Module  # without weights
    blocks_name: str
    dtype: torch.dtype  # compute dtype
    save_dtype: torch.dtype  # dtype of the saved weights
    window: int  # tokens, unless the texts are too short
    layout: StructureLayout | None = None  # neurons or experts, if they are removed
    left: int | None = None  # number that each block keeps of these
    tokenizer: Any = None
    listed: dict[str, Any] = field(default_factory=dict)  # vocabulary.json of a trimmed one

    @property
    def blocks(self) -> nn.ModuleList:
        return self.skeleton.get_submodule(self.blocks_name)

    @property
    def width(self) -> int:
        """Numbers in a hidden state."""
        return self.config.get_text_config(decoder=True).hidden_size

    @cached_property
    def inputs(self) -> list[list[SharedInput]]:
        """The inputs of the linear layers of each kind of block."""
        return expected_inputs(self.skeleton, self.blocks_name)

    @cached_property
    def small(self) -> nn.Module:
        """The skeleton after neurons or experts are removed."""
        if not self.layout:
            return self.skeleton
        smaller = skeleton_with(self.config, self.layout.field, self.left, self.checkpoint)
        return smaller or self.skeleton

    @property
    def small_blocks(self) -> nn.ModuleList:
        return self.small.get_submodule(self.blocks_name)


def kept_parts(
    flags: Flags, config: Any, checkpoint: Checkpoint, skeleton: nn.Module, blocks_name: str
) -> tuple[StructureLayout, int]:
    """Return the neurons or experts of a model, and how many each block keeps.

    Raises UserError if the model has none that can be removed.
    """
    layout = find_parts(flags.removes, config, checkpoint, skeleton, blocks_name)
    count_left = experts_left if flags.removes == EXPERTS else neurons_left
    return layout, count_left(layout, flags.sparsity.ratio)


@dataclass(frozen=True)
class Teacher:
    """The model of --teacher before its weights are read."""

    checkpoint: Checkpoint
    config: Any
    rows: list[int] | None  # of its vocabulary, one for each of the model's; None: all
    is_larger: bool  # it has more neurons or experts than the model

    @cached_property
    def skeleton(self) -> nn.Module:
        return build_skeleton(self.config, self.checkpoint)


@dataclass(kw_only=True)
class RunPlan:
    """The decisions on which a run's memory depends."""

    flags: Flags
    dist: DistContext
    model: Model
    windows: RunWindows
    batch_size: int
    schedule: TrainSchedule | None = None  # of the recovery training
    teacher: Teacher | None = None
    form: Any = None  # of the linear layers; with --quantize auto chosen before they are quantized

    @property
    def device(self) -> torch.device:
        return self.dist.device

    @property
    def is_sharded(self) -> bool:
        """Whether each rank trains a shard of the weights."""
        return bool(self.schedule) and self.dist.size > 1 and can_share(self.model.blocks)

    @property
    def fetches_teacher(self) -> bool:
        """Whether a teacher's blocks are fetched one at a time, if the model's are."""
        return bool(self.schedule) or self.dist.size > 1


@dataclass(kw_only=True)
class Run(RunPlan):
    """Everything about a run; the fields from `results` on are measured by its steps."""

    corpora: Corpora
    shared: Path | None = None  # folder of a sweep, for the dense model's states
    fingerprint: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: RunFolder | None = None  # of finished blocks, in the main rank
    results: dict[str, Any] = field(default_factory=dict)  # see lib/run/results.py
    losses: dict[str, Tensor] = field(default_factory=dict)  # by window, see lib/run/results.py
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by step
    layers: dict[str, float] = field(default_factory=dict)  # share of zeros of each linear layer
    is_saved: bool = False  # the model is on the disk; in the main rank
    is_recorded: bool = False  # the results are on the disk

    @property
    def trains_all(self) -> bool:
        """Whether all linear layers of the blocks are trained, not only those with zeros."""
        return self.flags.trains_all or bool(self.teacher and self.teacher.is_larger)

    @property
    def dense_key(self) -> str:
        """Digest of everything that the dense model's states on the test windows depend on."""
        pruning, measuring = self.fingerprint["pruning"], self.fingerprint["measuring"]
        names = ["--dtype", "--load_bit", "kind of device"]
        names += [name for name in pruning if name.startswith(("weights", "config", "version"))]
        windows = self.windows
        values = [*map(pruning.get, names), measuring, windows.bos, windows.seqlen]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    @contextmanager
    def timed(self, step: str, what: str = "", total: int = 0, unit: str = "block") -> Iterator:
        """Count wall time in this context as that of `step`; yield a callback to advance a bar.

        The bar is named `what` and is full after `total` units; without a name there is none.
        """
        start, shown = time.perf_counter(), bool(what) and self.dist.is_main
        with progress(total, what, unit, shown, step) as on_progress:
            yield on_progress
        spent = self.seconds.get(step, 0) + time.perf_counter() - start
        self.seconds[step] = round(spent, 3)

    def print(self, *lines: str) -> None:
        """Print lines in the main rank."""
        self.dist.print(*lines)
