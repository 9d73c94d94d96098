"""A run as a plain object: what is known of it before any weight is read, then the model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lib.methods.registry import MethodSpec
from lib.methods.sparsity import Sparsity
from lib.run.flag import INPUT, PLACE, RESULT
from lib.run.flags import values

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lib.data.sources import Source
    from lib.data.training import TrainingText
    from lib.data.windows import TestSet
    from lib.distributed.context import DistContext
    from lib.model.access import Checkpoint
    from lib.model.blocks import BlockRunner
    from lib.model.mlp import MlpLayout
    from lib.model.work_folder import WorkFolder
    from lib.quality.reference import DenseReference
    from lib.recover import TrainSchedule
    from lib.vocabulary import TrimmedVocabulary


class NoCache:
    """Reads whatever a run needs. A sweep hands in one that keeps it for the next run."""

    def texts(self, request: TextRequest, tokenizer: Any) -> Texts:
        """Return the windows that `request` describes."""
        return request.read(tokenizer)

    def vocabulary(self, key: tuple, make: Callable[[], TrimmedVocabulary]) -> TrimmedVocabulary:
        """The trimmed vocabulary, which depends on `key` alone."""
        return make()

    def model(self, key: tuple, device: torch.device, read: Callable[[], nn.Module]) -> nn.Module:
        """The dense model, which depends on `key` alone, on `device`; it may be changed."""
        return read()

    def question_seed(self, seed: int) -> int:
        """The seed that draws the questions of a run with `seed`."""
        return seed

    def dense_outputs(self, key: tuple, compute: Callable[[], Any]) -> Any:
        """What was computed by the dense model, and depends on `key` alone."""
        return compute()


@dataclass
class Texts:
    """All windows of a run; `bos`: the token that was put before each, if any."""

    bos: int | None
    windows: Tensor | None  # (windows, tokens) to calibrate on; None where no text is observed
    calibration: dict[str, Any] | None  # where they were found
    tests: list[TestSet]
    training: TrainingText | None = None  # what is recovered on


@dataclass(frozen=True)
class TextRequest:
    """All that the windows of a run depend on: equal requests read equal windows."""

    tokenizer: tuple  # flags of the model, and the digest of its vocabulary if it was trimmed
    tests: tuple[Source, ...]
    seqlen: int
    bos: int | None
    n_prompts: int
    sources: tuple[Source, ...] = ()  # to calibrate and recover on; none if no text is observed
    seed: int | None = None
    nsamples: int | None = None  # calibration windows; None if there are none
    n_training: int | None = None  # windows to recover on; None if there are none

    def read(self, tokenizer: Any) -> Texts:
        """Read the windows; `tokenizer` is the one that the request describes."""
        from lib.data.training import training_windows
        from lib.data.windows import calibration_windows, test_set

        texts = Texts(self.bos, windows=None, calibration=None, tests=[])
        if self.nsamples:
            texts.windows, texts.calibration = calibration_windows(
                self.sources, tokenizer, self.nsamples, self.seqlen, self.seed, self.bos
            )
        texts.tests = [
            test_set(test, tokenizer, self.seqlen, self.bos, self.n_prompts) for test in self.tests
        ]
        if self.n_training:
            texts.training = training_windows(
                self.sources,
                tokenizer,
                self.n_training,
                self.seqlen,
                self.seed,
                bos=self.bos,
                tests=[test.windows for test in texts.tests],
            )
        return texts


@dataclass
class Job:
    """What is known of a run before any weight is read."""

    args: argparse.Namespace
    cache: NoCache
    sources: list[Source]  # to calibrate on
    vocabulary_sources: list[Source]  # whose tokens stay; none where the vocabulary stays whole
    tests: list[Source]
    device: torch.device
    dist: DistContext
    checkpoint: Checkpoint
    config: Any
    tokenizer: Any  # of what is worked on: the trimmed one, once there is one
    seqlen: int
    batch_size: int
    skeleton: nn.Module  # the model without weights
    blocks_name: str
    method_spec: MethodSpec | None
    sparsity: Sparsity
    mlps: MlpLayout | None = None  # whose neurons are removed
    neurons_left: int | None = None  # in each of them
    vocabulary: TrimmedVocabulary | None = None
    schedule: TrainSchedule | None = None  # of the recovery
    teacher: Checkpoint | None = None
    teacher_config: Any = None
    teacher_rows: Tensor | None = None  # of the teacher, where it has more tokens than the model
    smaller: bool = False  # the model has fewer neurons than the teacher
    texts: Texts | None = None
    fingerprint: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: WorkFolder | None = None  # of --resume, in the main process
    seconds: dict[str, float] = field(default_factory=dict)  # by step

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at text, or the allocation does."""
        spec = self.method_spec
        return bool(spec and (spec.cls.observes or self.args.allocation != "uniform"))

    @property
    def model_key(self) -> tuple:
        """What the weights of the dense model depend on."""
        weights = self.fingerprint["pruning"]["weights of --model"]
        return values(self.args, ["model"], (RESULT, INPUT, PLACE)), weights

    @property
    def has_dense(self) -> bool:
        """Whether there is a dense model to compare with: the model itself, or its teacher."""
        return bool(self.method_spec or self.schedule or self.args.teacher)

    @property
    def question_seed(self) -> int:
        """Draws the questions of --abilities and the beginnings of --fidelity."""
        return self.cache.question_seed(self.args.seed)

    @property
    def dense_key(self) -> tuple:
        """What the outputs of the dense model depend on, besides their inputs."""
        return self.args.teacher, self.model_key, self.vocabulary and self.vocabulary.digest

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = self.seconds.get(step, 0) + time.perf_counter() - start
        self.seconds[step] = round(spent, 3)


@dataclass
class LoadedModel:
    """The model that is worked on."""

    model: nn.Module
    blocks: nn.ModuleList
    runner: BlockRunner
    state_device: torch.device  # where hidden states stand between two blocks
    footprint: int  # bytes of the dense model
    checkpointed: bool = False  # activations are computed again in training
    cache_inputs: bool = True  # of a block, which saves passes through it
    sparsity: dict[str, Sparsity] | None = None  # of the linears, where it must be reached
    left_dense: frozenset[str] = frozenset()  # names of linears
    reference: DenseReference | None = None  # what evaluation compares with
