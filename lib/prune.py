"""Prune a model block by block: observe the inputs of its linear layers, solve, propagate.

`BlockWalker.run` is the loop, as in Wanda (https://github.com/locuslab/wanda); Wanda's names are in
its comments. `check_sparsity` is `SparsityCheck` in lib/model/sparsity_check.py. Quantizing and
removing (lib/stages/) walk in the same way.

`prune` takes a model in memory and runs a `Pruner`, as main.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .calibration.allocation import Allocation, allocate
from .calibration.block_inputs import BlockInputs
from .calibration.changes import Changes
from .calibration.inputs import Group, check_widths
from .calibration.output_error import relative_error
from .data.documents import Corpus
from .data.sources import Source
from .data.windows import WindowSpec, calibration_windows, fitting_windows
from .methods.base import PruningMethod
from .methods.registry import method_of
from .methods.sparsity import UNSTRUCTURED, Passes, Sparsity
from .model.blocks import BlockRunner
from .model.device import default_batch_size
from .model.linears import experts_implementation
from .model.masks import Packed, packed_masks, unpacked
from .model.pretrained import window_length
from .model.sparsity_check import SparsityCheck
from .packed.layout import all_finite
from .util.errors import UserError, fields_named, first_of, spelled


class BlockWalker(Changes):
    """Takes windows through a model block by block, and changes the blocks' linear layers in place.

    `solve` changes layers that share an input, whose statistics are a `method`. A subclass does in
    `finish_` what a block needs afterwards. Ranks share the windows and the groups to solve.
    """

    fallback: str | None = None  # method for experts with few tokens, else the group's fallback
    caches_inputs = True  # if memory suffices

    def __init__(self, runner: BlockRunner, method: type[PruningMethod]) -> None:
        super().__init__(runner)
        self.method = method

    @torch.no_grad()
    def run(
        self, windows: Tensor | None, on_progress: Callable[[int], Any] = lambda blocks: None
    ) -> Self:
        """Calibrate on windows (n, tokens), None for a method that needs none, and change layers.

        `on_progress(1)` is called after each block. Raises UserError if a weight or an activation
        is not finite.
        """
        runner = self.runner
        with experts_implementation(runner.model, "eager"):
            # prepare_calibration_input
            self.inputs = BlockInputs(runner, windows, self.method, self.caches_inputs)
            for index in range(len(runner.blocks)):
                with runner.on_device(index, write_back=True):
                    self.inputs.begin(index)
                    self.begin(index)  # find_layers
                    if not self.restore_():
                        for groups in self.groups():  # WrappedGPT.add_batch, in a forward pass
                            self.solve_all_(groups)
                        self.share()
                        self.finish_()
                        self.keep()
                    self.end()
                    self.inputs.advance_()  # the second forward pass
                on_progress(1)
        return self

    def solve_all_(self, groups: list[Group]) -> None:
        """Solve the groups that this rank owns, write the matrices of all ranks, empty the list."""
        owners = self.dist.assign_owners([group.cost for group in groups])
        for group in groups:
            if group.fallback:
                name = self.fallback or group.fallback
                self.notes[-1].fallbacks.setdefault(name, []).append(group.names)
        with self.dist.fail_together():
            for group, owner in zip(groups, owners, strict=True):
                if owner == self.dist.rank:
                    _check_finite(group.method.statistics(), group.names, "activations are")
                    matrices = [linear.matrix() for linear in group.linears]
                    with self.reporting(group):
                        self.solve(group, matrices)
                    for linear in group.linears:
                        _check_finite(matrices[:1], linear.name, "pruned weights are")
                        self.write_(linear, matrices.pop(0))
        for group, owner in zip(groups, owners, strict=True) if self.dist.size > 1 else ():
            self.exchange_(group, owner)
        groups.clear()  # frees the statistics

    def solve(self, group: Group, matrices: list[Tensor]) -> None:
        """Change the float32 matrices (out, in) of a group in place, in the rank that owns it."""
        raise NotImplementedError

    def groups(self) -> Iterator[list[Group]]:
        """Observe the block, and yield groups that can be solved at one time."""
        return self.inputs.observe(self.linears)

    def finish_(self) -> None:
        """Do what the block needs once its layers are changed."""


class Pruner(BlockWalker):
    """Prunes every linear layer of every block; embeddings and output head stay dense.

    `allocation` has the sparsity of each layer.
    """

    def __init__(
        self, runner: BlockRunner, method: type[PruningMethod], allocation: Allocation
    ) -> None:
        super().__init__(runner, method)
        self.allocation = allocation

    def solve(self, group: Group, matrices: list[Tensor]) -> None:
        """Prune a group, and note the errors of its layers' outputs."""
        names, solver = [linear.name for linear in group.linears], group.solver()
        solver.output_costs = [self.allocation.output_costs.get(name) for name in names]
        solver.output_squares = [group.output_squares.get(name) for name in names]
        dense = [group.rows @ matrix.T for matrix in matrices] if group.method.tokens else []
        solver.prune_(matrices, [self.allocation.sparsity[name] for name in names])
        for name, matrix, outputs in zip(names, matrices, dense, strict=False):
            error = relative_error(outputs, group.rows @ matrix.T)
            self.notes[-1].errors |= {name: error} if error is not None else {}

    def summary(self) -> list[str]:
        """Return lines for the user, which name every layer left dense."""
        pruned, left = sum(self.pruned.values()), sum(n for n, _ in self.left_dense.values())
        by_reason: dict[str, list[str]] = {}
        for name, (_, reason) in self.left_dense.items():
            by_reason.setdefault(f"left dense, {reason}", []).append(name)
        for notes in self.notes:
            for method, experts in notes.fallbacks.items():
                reason = f"pruned by {method}, too few tokens were routed to them"
                by_reason.setdefault(reason, []).extend(experts)
        left_dense = f"; left {left:,} weights of the blocks dense" if left else ""
        return [
            f"pruned {pruned:,} weights in {len(self.pruned)} linear layers{left_dense}",
            *(f"{reason}: {first_of(names)}" for reason, names in by_reason.items()),
            *self.warnings(),
        ]


def _check_finite(tensors: Iterable[Tensor], what: str, which: str) -> None:
    if not all(map(all_finite, tensors)):
        raise UserError(what, f"{which} not finite", "Use {--dtype} float32")


@dataclass(frozen=True)
class Pruned:
    """The results of `prune`, by layer: the full name of a linear layer of the blocks."""

    errors: dict[
        str, float
    ]  # relative squared error of its outputs, see lib/calibration/output_error.py
    shares: dict[str, float]  # share of zeros
    sparsity: float  # share of zeros in all layers together
    notes: list[str]  # fallbacks and layers left dense
    packed: Packed

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool (out, in), True where a weight is pruned; unpacked at each call."""
        return unpacked(self.packed)


named_arguments = fields_named(
    "",
    calibration_data="calibration",
    prune_method="method",
    sparsity_ratio="sparsity",
    sparsity_type="sparsity",
)


@named_arguments
def prune(
    model: PreTrainedModel,
    calibration: Tensor | Sequence[str] | None = None,
    method: str | type[PruningMethod] = "wanda",
    sparsity: str | float = 0.5,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    nsamples: int = 128,
    seqlen: int | None = None,
    allocation: str = "uniform",
    method_args: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> Pruned:
    """Prune a causal language model of transformers in place, on its device and in its dtype.

    `calibration`: windows of token ids (n, tokens), or texts, from which `nsamples` windows of
    `seqlen` tokens are drawn with `seed`; None for a method that needs none. `method`: a name in
    lib/methods/registry.py, FILE.py:CLASS or a class. `sparsity`: a share, or "2:4". `allocation`
    and `method_args` are as the flags of main.py. Raises UserError.
    """
    kind, ratio = (sparsity, None) if isinstance(sparsity, str) else (UNSTRUCTURED, sparsity)
    wanted = Sparsity.parse(kind, ratio)
    method = method_of(method, arguments=method_args, kind=kind)
    length, notes = window_length(model.config, seqlen), []
    if calibration is None and (method.observes or any(Passes.of(allocation, method))):
        problem = f"{method.__name__} needs windows or texts"
        raise UserError("calibration", problem, "Give some")
    if isinstance(calibration, str):
        raise UserError("calibration", "it is a single text", "Give a list of texts")
    if calibration is not None and not isinstance(calibration, Tensor):
        if tokenizer is None:
            raise UserError("tokenizer", "texts require one", "Give it, or windows of token ids")
        spec = WindowSpec(tokenizer, length, seed=seed)
        calibration = windows_of_texts(calibration, spec, nsamples, not seqlen, notes.append)
    if calibration is not None:
        if calibration.ndim != 2 or calibration.is_floating_point() or not calibration.numel():
            problem = f"its shape is {tuple(calibration.shape)}, its dtype {calibration.dtype}"
            raise UserError("calibration", problem, "Give windows of token ids (windows, tokens)")
        length = calibration.shape[1]
    with _runner_of(model, length, batch_size, wanted) as runner:
        layers = allocate(runner, calibration, wanted, allocation, seed, method=method)
        pruner = Pruner(runner, method, layers).run(calibration, on_progress)
        check = SparsityCheck(runner, layers.sparsity, pruner.left_dense)
        masks = packed_masks(runner, pruner.pruned)
    shares, notes = check.record()["linears"], [*notes, *pruner.summary()[1:]]
    return Pruned(pruner.errors(), shares, check.overall, notes, masks)


@named_arguments
def windows_of_texts(
    texts: Sequence[str],
    spec: WindowSpec,
    count: int,
    shortens: bool = False,
    say: Callable[[str], Any] = lambda line: None,
) -> Tensor:
    """Return windows of token ids (count, tokens), drawn as main.py does from the rows of a file.

    `shortens` and `say` are as for `fitting_windows`. Raises UserError if the texts are too short.
    """
    corpora = [Corpus(Source("texts", "{--calibration_data}", "texts"), rows=texts)]
    draw = partial(calibration_windows, corpora, nsamples=count)
    windows, _ = fitting_windows(draw, corpora, spec, shortens, lambda line: say(spelled(line)))
    return windows.ids


@contextmanager
def _runner_of(
    model: PreTrainedModel, seqlen: int, batch_size: int | None, sparsity: Sparsity
) -> Iterator[BlockRunner]:
    """Yield a runner of the model's blocks in place; afterwards the model's modes are restored.

    Raises UserError if they lie on several devices, cannot run one by one, are not finite, or too
    narrow for the pattern.
    """
    devices = sorted({str(each.device) for each in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        problem = f"its weights are on {' and '.join(devices)}"
        fix = "Load it on one device, without device_map or offloading"
        raise UserError("model", problem, fix)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training, device = model.training, next(model.parameters()).device
    width = model.config.get_text_config(decoder=True).hidden_size
    batch_size = batch_size or default_batch_size(device, seqlen, width)
    try:
        model.eval().requires_grad_(False)
        runner = BlockRunner(model, device, flag="model", batch_size=batch_size)
        check_widths(runner.blocks, runner.name, sparsity)
        runner.verify()
        runner.check_finite()
        yield runner
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_()
