"""A run as plain objects: the job, complete before any weight is read, and its loaded model."""

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
from lib.run.flags import observes, values
from lib.util.events import emit

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
    """Reads everything anew; a sweep passes a subclass that keeps it for the next run."""

    def texts(self, request: TextRequest, tokenizer: Any) -> Texts:
        """Return the windows that `request` describes."""
        return request.read(tokenizer)

    def vocabulary(self, key: tuple, make: Callable[[], TrimmedVocabulary]) -> TrimmedVocabulary:
        """Return the trimmed vocabulary, which depends on `key` alone."""
        return make()

    def model(self, key: tuple, device: torch.device, read: Callable[[], nn.Module]) -> nn.Module:
        """Return the dense model on `device`, to be changed freely; it depends on `key` alone."""
        return read()

    def question_seed(self, seed: int) -> int:
        """Return the seed that draws the questions of a run with `seed`."""
        return seed

    def dense_outputs(self, key: tuple, compute: Callable[[], Any]) -> Any:
        """Return what the dense model computes, which depends on `key` alone."""
        return compute()


@dataclass
class Texts:
    """All windows of a run; `bos` is the id that begins each of them, None for none."""

    bos: int | None
    windows: Tensor | None  # (windows, tokens) to calibrate on; None where no text is observed
    calibration: dict[str, Any] | None  # the record of their source
    tests: list[TestSet]
    training: TrainingText | None = None  # for the recovery


@dataclass(frozen=True)
class TextRequest:
    """Everything that the windows of a run depend on: equal requests read equal windows."""

    tokenizer: tuple  # flags of the model, and the digest of its vocabulary if it was trimmed
    tests: tuple[Source, ...]
    seqlen: int
    bos: int | None
    n_prompts: int
    sources: tuple[Source, ...] = ()  # for calibration and recovery; none if neither reads text
    seed: int | None = None
    nsamples: int | None = None  # calibration windows; None if there are none
    n_training: int | None = None  # windows of the recovery; None if there are none

    def read(self, tokenizer: Any) -> Texts:
        """Read the windows; `tokenizer` is the one that the request describes."""
        from lib.data.training import training_windows
        from lib.data.windows import calibration_windows, test_set

        texts = Texts(self.bos, windows=None, calibration=None, tests=[])
        if self.nsamples:
            texts.windows, texts.calibration = calibration_windows(
                self.sources,
                tokenizer,
                nsamples=self.nsamples,
                seqlen=self.seqlen,
                seed=self.seed,
                bos=self.bos,
            )
        texts.tests = [
            test_set(test, tokenizer, seqlen=self.seqlen, bos=self.bos, n_prompts=self.n_prompts)
            for test in self.tests
        ]
        if self.n_training:
            texts.training = training_windows(
                self.sources,
                tokenizer,
                count=self.n_training,
                seqlen=self.seqlen,
                seed=self.seed,
                bos=self.bos,
                tests=[test.windows for test in texts.tests],
            )
        return texts


@dataclass
class Job:
    """Everything that is decided about a run before any weight is read."""

    args: argparse.Namespace
    cache: NoCache
    sources: list[Source]  # of the calibration
    vocabulary_sources: list[Source]  # whose tokens are kept; none if nothing is trimmed
    tests: list[Source]
    device: torch.device
    dist: DistContext
    checkpoint: Checkpoint
    config: Any
    tokenizer: Any  # the trimmed one, if the vocabulary is trimmed
    seqlen: int
    batch_size: int
    skeleton: nn.Module  # the model without weights
    blocks_name: str
    method_spec: MethodSpec | None
    sparsity: Sparsity
    rounding: MethodSpec | None = None  # of kept weights, before they are packed
    mlps: MlpLayout | None = None  # whose neurons are removed
    neurons_left: int | None = None  # in each of them
    vocabulary: TrimmedVocabulary | None = None
    schedule: TrainSchedule | None = None  # of the recovery
    teacher: Checkpoint | None = None
    teacher_config: Any = None
    teacher_rows: Tensor | None = None  # rows of the teacher's vocabulary that a smaller model has
    teacher_weights: tuple[int, int] = (0, 0)  # of --teacher as it is read, and in those rows
    smaller: bool = False  # the model has fewer neurons than the teacher
    texts: Texts | None = None
    fingerprint: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: WorkFolder | None = None  # of --resume, in the main process
    seconds: dict[str, float] = field(default_factory=dict)  # by step

    @property
    def calibrated(self) -> bool:
        """Whether pruning or rounding observes calibration text."""
        return bool(self.rounding or observes(self.args))

    @property
    def model_key(self) -> tuple:
        """The cache key of the dense model's weights."""
        weights = self.fingerprint["pruning"]["weights of --model"]
        return values(self.args, ["model"], (RESULT, INPUT, PLACE)), weights

    @property
    def has_dense(self) -> bool:
        """Whether the run compares with a dense model: the model itself, or its teacher."""
        return bool(self.method_spec or self.schedule or self.args.teacher)

    @property
    def question_seed(self) -> int:
        """The seed of the questions of --abilities and the beginnings of --fidelity."""
        return self.cache.question_seed(self.args.seed)

    @property
    def dense_key(self) -> tuple:
        """The cache key of the dense model's outputs, without that of their inputs."""
        return self.args.teacher, self.model_key, self.vocabulary and self.vocabulary.digest

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Inside, wall time counts as that of `step`, whose beginning is an event."""
        emit(f"step {step}")
        start = time.perf_counter()
        yield
        total = self.seconds.get(step, 0) + time.perf_counter() - start
        self.seconds[step] = round(total, 3)


@dataclass
class LoadedModel:
    """The model that the run prunes and measures."""

    model: nn.Module
    blocks: nn.ModuleList
    runner: BlockRunner
    state_device: torch.device  # holds hidden states between two blocks
    footprint: int  # bytes of the dense model
    checkpointed: bool = False  # activations are computed again in training
    cache_inputs: bool = True  # of the linears of a block; saves passes through it
    sparsity: dict[str, Sparsity] | None = None  # by linear, if it must be reached
    left_dense: frozenset[str] = frozenset()  # names of linears
    scales: dict[str, Tensor] | None = None  # by weight, of grids that the weights are on
    unrounded: Tensor | None = None  # logits of the model before its weights were put on grids
    reference: DenseReference | None = None  # for the divergence
    after_block: Callable[[], None] | None = None  # called when one more was pruned
    products: str | None = None  # bfloat16 where products round float32 operands to it
