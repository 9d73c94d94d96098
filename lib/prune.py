"""Prune a model block by block: observe the inputs of its linear layers, solve, propagate.

`BlockWalker.run` is the loop, as in Wanda (https://github.com/locuslab/wanda); Wanda's names are in
brackets. The first block's inputs are recorded (`prepare_calibration_input`:
`BlockRunner.capture`). For each block one pass observes the inputs of its linear layers
(`WrappedGPT.add_batch`: `PruningMethod.observe`), all of them are pruned (`Pruner.solve`), and a
second pass takes the hidden states through the pruned block (`BlockRunner.advance_`).
`check_sparsity` is `SparsityCheck` in lib/model/sparsity_check.py. lib/quantize.py and
lib/remove.py walk in the same way.

`prune` takes a model in memory and runs a `Pruner`, as main.py does.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration.allocation import Allocation, allocate
from .calibration.inputs import (
    BlockNotes,
    Group,
    check_widths,
    merge,
    observe,
    rank_windows,
    weight_key,
)
from .calibration.output_error import relative_error
from .calibration.sequential import OrderedBlock, Stage, known_order
from .data.windows import tokenize
from .formats.packed.layout import all_finite
from .methods.base import PruningMethod
from .methods.registry import method_of
from .methods.sparsity import UNSTRUCTURED, Passes, Sparsity
from .model.blocks import BlockRunner, HiddenStates
from .model.device import default_batch_size
from .model.linears import experts_implementation, find_linears
from .model.masks import Packed, packed_masks, unpacked
from .model.matrix import PrunableLinear
from .model.pretrained import window_length
from .model.sparsity_check import SparsityCheck
from .util import progress
from .util.errors import RunWarning, UserError, first_of
from .util.resume import PRUNED

UNREACHED = "no calibration token reached it, or its forward() is bypassed"


class BlockWalker:
    """Takes windows through a model block by block, and changes the blocks' linear layers in place.

    `solve` changes layers that share an input, whose statistics are a `method`. A subclass may
    choose among the layers (`takes`), and does in `finish_` what a block needs afterwards. Ranks
    share the windows and the groups to solve. After a run `pruned` maps changed layers to their
    number of weights, and `left_dense` the others also to the reason.
    """

    checkpoint_prefix = PRUNED  # of the files in which --resume keeps finished blocks
    fallback: str | None = None  # method for experts with few tokens, else the group's fallback

    def __init__(self, runner: BlockRunner, method: type[PruningMethod]) -> None:
        self.runner = runner
        self.method = method
        self.dist = runner.dist
        self.saved = runner.weights.saved  # dtype in which changed weights are saved
        self.pruned: dict[str, int] = {}
        self.left_dense: dict[str, tuple[int, str]] = {}
        self.notes: list[BlockNotes] = []  # the last ones are the current block's
        # weights that several blocks share are changed once, where tokens reach them first
        count = Counter(id(p) for block in runner.blocks for p in block.parameters())
        self.shared = {key for key, times in count.items() if times > 1}
        self.shared_done: set[tuple[int, int | None]] = set()
        # per class of blocks: the layers of the first block, and their order
        self.orders: dict[tuple, tuple[list[PrunableLinear], list[Stage]]] = {}
        # fetching cached inputs from other memory would take longer than computing them again
        on_device = torch.device(runner.state_device).type == runner.device.type
        self.cache_inputs = runner.cache_inputs and on_device
        self.states: HiddenStates | None = None  # inputs of the next block
        self.dense_states: HiddenStates | None = None  # the same in the dense model
        # the current block
        self.index = -1
        self.linears: list[PrunableLinear] = []  # to be changed
        self.written: dict[str, Tensor] = {}  # changed matrices as they are saved, by layer
        self.dense: nn.Module | None = None  # a copy from before, for a method with a dense stream
        self.ordered: OrderedBlock | None = None

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
            if self.method.observes:
                local, self.idle = rank_windows(windows, self.dist)
                self.states = runner.capture(local)
            if self.method.dense_stream:
                self.dense_states = self.states.copy()
            for index in range(len(runner.blocks)):
                with runner.on_device(index, write_back=True):
                    self._open(index)
                    if not self.restore_():
                        for groups in self.groups():  # all, or q k v | o | gate up | down
                            self.solve_all_(groups)
                        self.finish_()
                        self._keep()
                    self._advance_()
                on_progress(1)
        return self

    def solve(self, group: Group, matrices: list[Tensor]) -> None:
        """Change the float32 matrices (out, in) of a group in place, in the rank that owns it."""
        raise NotImplementedError

    def takes(self, linear: PrunableLinear) -> bool:
        """Return whether a layer is to be changed."""
        return True

    def groups(self) -> Iterator[list[Group]]:
        """Observe the block, and yield groups of layers that can be solved at one time.

        With a dense stream each stage is observed when the one before is solved.
        """
        runner, method = self.runner, self.method
        if self.states is None:
            yield [Group([one], method(one.shape[1], runner.device)) for one in self.linears]
        elif self.dense and self.linears:
            order = known_order(self.orders, runner, self.states, self.index, self.linears)
            self.ordered = OrderedBlock(
                runner=runner,
                method=method,
                index=self.index,
                order=order,
                dense=self.dense,
                states=self.states,
                dense_states=self.dense_states,
                cache_inputs=self.cache_inputs,
                need_outputs=self.needs_outputs,
            )
            for place, stage in enumerate(order):
                yield merge(self.ordered.observe(place), stage.linears, method, runner, self.idle)
        else:
            passes = ((run, {}) for _, run in runner.iter_batches(self.states, self.index))
            groups = observe(runner, self.linears, method, passes)
            yield merge(groups, self.linears, method, runner, self.idle)

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
                    with self._reporting(group):
                        self.solve(group, matrices)
                    for linear in group.linears:
                        _check_finite(matrices[:1], linear.name, "pruned weights are")
                        self._write_(linear, matrices.pop(0).to(linear.saved_dtype(self.saved)))
        for group, owner in zip(groups, owners, strict=True) if self.dist.size > 1 else ():
            self.exchange_(group, owner)
        groups.clear()  # frees the statistics

    def exchange_(self, group: Group, owner: int) -> None:
        """Send a group's matrices from the rank that solved it to all others."""
        for linear in group.linears:
            matrix = self.written.get(linear.name)
            if matrix is None:
                dtype, device = linear.saved_dtype(self.saved), linear.raw_weight.device
                matrix = torch.empty(linear.shape, dtype=dtype, device=device)
            matrix = self.dist.broadcast_(matrix, owner)
            if owner != self.dist.rank:
                self._write_(linear, matrix)

    def restore_(self) -> bool:
        """Load the block and its notes if an interrupted run finished it; return whether it did."""
        facts = self.runner.weights.get(self.index, prefix=self.checkpoint_prefix)
        if facts is None:
            return False
        notes = BlockNotes(**facts)
        self.notes[-1] = replace(notes, pruned=[])
        for linear in self.linears:
            if linear.name in notes.pruned:
                self._mark_pruned(linear)
        return True

    def finish_(self) -> None:
        """Share the notes of all ranks, once the block's layers are changed."""
        notes = self.notes[-1]
        of_all = self.dist.all_gather_object((notes.warnings, notes.kept, notes.errors))
        warned, kept, errors = zip(*of_all, strict=True)
        notes.warnings, notes.kept = sum(warned, []), sum(kept, [])
        notes.errors = {name: error for each in errors for name, error in each.items()}

    def all_warnings(self) -> list[str]:
        """Return all warnings of the methods."""
        return [warning for notes in self.notes for warning in notes.warnings]

    def errors(self) -> dict[str, float]:
        """Return the relative squared error of each pruned layer's outputs, by name."""
        return {name: error for notes in self.notes for name, error in notes.errors.items()}

    def _open(self, index: int) -> None:
        """Begin a block: choose its layers that are still to be changed; report the others."""
        runner, self.index = self.runner, index
        self.needs_outputs = self.states is not None and index + 1 < len(runner.blocks)
        self.dense = copy.deepcopy(runner.blocks[index]) if self.dense_states else None
        self.notes.append(BlockNotes())
        # resident blocks were checked when they were loaded
        for linear in runner.linears(index) if not runner.weights.resident else ():
            linear.check_finite(runner.named)
        linears, left_dense = find_linears(runner.blocks[index], f"{runner.name}.{index}")
        self.left_dense |= left_dense
        left = [linear for linear in linears if weight_key(linear) not in self.shared_done]
        self.linears = [linear for linear in left if self.takes(linear)]

    def _keep(self) -> None:
        """Store the block for --resume: for quantized layers the matrices behind their codes."""
        prefix = f"{self.runner.name}.{self.index}."
        matrices = {
            linear.name.removeprefix(prefix): self.written[linear.name]
            for linear in self.linears
            if linear.is_quantized and linear.name in self.written
        }
        notes = vars(self.notes[-1])
        self.runner.weights.put(self.index, notes, matrices, prefix=self.checkpoint_prefix)

    def _advance_(self) -> None:
        """Report layers that no token reached, and take the streams through the block."""
        for linear in self.linears:
            if linear.name not in self.pruned:
                self.left_dense[linear.name] = prod(linear.shape), UNREACHED
        if self.needs_outputs:
            if self.ordered:
                self.ordered.advance_()
            else:
                if self.dense:
                    self.runner.advance_(self.dense_states, self.index, self.dense)
                self.runner.advance_(self.states, self.index)
            self.states.block_args[self.index] = []  # these arguments are not needed again
        self.dense = self.ordered = None
        self.written.clear()

    @contextmanager
    def _reporting(self, group: Group) -> Iterator[None]:
        """Note warnings raised inside, and name the group's layers in an error."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                progress.on_step("solve", 0)
                yield
            except UserError as error:
                raise error.inside(group.names) from error
        for warning in caught:
            prefix = "" if issubclass(warning.category, RunWarning) else f"{group.names}: "
            self.notes[-1].warnings.append(f"{prefix}{warning.message}")

    def _write_(self, linear: PrunableLinear, matrix: Tensor) -> None:
        linear.set_weight_(matrix)
        self.written[linear.name] = matrix
        self._mark_pruned(linear)

    def _mark_pruned(self, linear: PrunableLinear) -> None:
        self.pruned[linear.name] = prod(linear.shape)
        self.notes[-1].pruned.append(linear.name)
        if weight_key(linear)[0] in self.shared:
            self.shared_done.add(weight_key(linear))


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
            *self.all_warnings(),
        ]


def _check_finite(tensors: Iterable[Tensor], what: str, which: str) -> None:
    if not all(map(all_finite, tensors)):
        raise UserError(what, f"{which} not finite", "Use --dtype float32")


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


@contextmanager
def _of_arguments() -> Iterator[None]:
    """Name the arguments of `prune` in an error inside that names flags of main.py."""
    try:
        yield
    except UserError as error:
        flag = r"--(?:prune_)?(\w+?)(?:_ratio|_type)?\b"
        said = (re.sub(flag, r"\1", part) for part in (error.what, error.problem, error.fix))
        raise UserError(*said) from error


@_of_arguments()
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
    length = window_length(model.config, seqlen)
    if calibration is None and (method.observes or any(Passes.of(allocation, method))):
        problem = f"{method.__name__} needs windows or texts"
        raise UserError("calibration", problem, "Give some")
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.is_floating_point() or not calibration.numel():
            problem = f"its shape is {tuple(calibration.shape)}, its dtype {calibration.dtype}"
            raise UserError("calibration", problem, "Give windows of token ids (windows, tokens)")
        length = calibration.shape[1]
    elif isinstance(calibration, str):
        raise UserError("calibration", "it is a single text", "Give a list of texts")
    elif calibration is not None:
        calibration = _text_windows(tokenizer, calibration, length, nsamples, seed)
    with _runner_of(model, length, batch_size, wanted) as runner:
        layers = allocate(runner, calibration, wanted, allocation, seed, method=method)
        pruner = Pruner(runner, method, layers).run(calibration, on_progress)
        check = SparsityCheck(runner, layers.sparsity, pruner.left_dense)
        masks = packed_masks(runner, pruner.pruned)
    shares = check.record()["linears"]
    return Pruned(pruner.errors(), shares, check.overall, pruner.summary()[1:], masks)


def _text_windows(
    tokenizer: Any, texts: Sequence[str], seqlen: int, count: int, seed: int
) -> Tensor:
    """Return `count` windows of token ids (count, seqlen) from the texts, shuffled with `seed`.

    Raises UserError if they are too short.
    """
    if tokenizer is None:
        raise UserError("tokenizer", "texts require one", "Give it, or windows of token ids")
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    pieces, total = [], 0
    for place in order:
        if total < count * seqlen:
            pieces.append(tokenize(tokenizer, texts[place]))
            total += len(pieces[-1])
    if total < count * seqlen:
        wanted = f"nsamples {count} windows of seqlen {seqlen}"
        problem = f"their {total} tokens are too few for {wanted}"
        raise UserError("texts", problem, "Give more text, or lower one of these")
    return torch.cat(pieces)[: count * seqlen].view(count, seqlen)


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
