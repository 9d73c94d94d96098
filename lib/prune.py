"""Prune a model block by block: observe the inputs of its linear layers, solve, propagate.

`prune` takes a model in memory and runs a `Pruner`, as main.py does. `Pruner._block_` prunes one
block as Wanda does (https://github.com/locuslab/wanda); Wanda's names are in brackets.
The first block's inputs are recorded (`prepare_calibration_input`: `BlockRunner.capture`). For each
block one pass observes the inputs of its linear layers (`WrappedGPT.add_batch`:
`PruningMethod.observe`), all of them are pruned (`PruningMethod.prune_`), and a second pass takes
the hidden states through the pruned block (`BlockRunner.advance_`). `check_sparsity` is `Measured`
in lib/pruning/check.py.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .methods.base import PruningMethod
from .methods.registry import method_of
from .methods.sparsity import UNSTRUCTURED, Sparsity
from .model.blocks import BlockRunner, HiddenStates
from .model.linears import experts_implementation, find_linears
from .model.matrix import PrunableLinear
from .model.pretrained import window_length
from .model.run_folder import PRUNED
from .packed.layout import all_finite
from .pruning.allocation import Allocation, allocate
from .pruning.check import Measured
from .pruning.errors import relative_error
from .pruning.in_memory import Pruned, runner_of, text_windows
from .pruning.inputs import BlockNotes, Group, merge, observe, rank_windows, weight_key
from .pruning.masks import packed_masks
from .pruning.ordered import OrderedBlock, Stage, known_order
from .util import progress
from .util.errors import RunWarning, UserError, first_of

UNREACHED = "no calibration token reached it, or its forward() is bypassed"


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
    gradients, measured = method.needs_gradients, allocation in ("error", "owl")
    if calibration is None and (method.observes or gradients or measured):
        raise UserError(f"calibration: {method.__name__} needs windows or texts. Give some.")
    if isinstance(calibration, Tensor):
        length = calibration.shape[1]
    elif calibration is not None:
        calibration = text_windows(tokenizer, calibration, length, nsamples, seed)
    with runner_of(model, length, batch_size, wanted) as runner:
        layers = allocate(runner, calibration, wanted, allocation, seed, gradients=gradients)
        pruner = Pruner(runner, method, layers).run(calibration, on_progress)
        reached = Measured(runner, layers.sparsity, pruner.left_dense)
        masks = packed_masks(runner, pruner.pruned)
    shares = reached.shares()["linears"]
    return Pruned(pruner.errors(), shares, reached.overall, pruner.summary()[1:], masks)


class Pruner:
    """Prunes every linear layer of every block in place; embeddings and output head stay dense.

    `method` is instantiated for each input; `allocation` has the sparsity of each layer. After a
    run `pruned` maps layers to their number of weights, and `left_dense` also to the reason.
    Subclasses override `_linears` (which layers) and `_change_` (what to do with them).
    """

    stage = PRUNED  # the name under which --resume keeps finished blocks
    fallback: str | None = None  # method for experts with few tokens, else the group's fallback

    def __init__(
        self, runner: BlockRunner, method: type[PruningMethod], allocation: Allocation
    ) -> None:
        self.runner = runner
        self.method = method
        self.allocation = allocation
        self.dist = runner.dist
        self.saved = runner.weights.saved  # dtype in which pruned weights are saved
        self.pruned: dict[str, int] = {}
        self.left_dense: dict[str, tuple[int, str]] = {}
        self.notes: list[BlockNotes] = []
        # weights that several blocks share are pruned once, where tokens reach them first
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

    @torch.no_grad()
    def run(
        self, windows: Tensor | None, on_progress: Callable[[int], Any] = lambda blocks: None
    ) -> Self:
        """Calibrate on windows (n, tokens), None for a method that needs none, and prune.

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
                    self._block_(index)
                on_progress(1)
        return self

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

    def all_warnings(self) -> list[str]:
        """Return all warnings of the methods."""
        return [warning for notes in self.notes for warning in notes.warnings]

    def errors(self) -> dict[str, float]:
        """Return the relative squared error of each pruned layer's outputs, by name."""
        return {name: error for notes in self.notes for name, error in notes.errors.items()}

    def _block_(self, index: int) -> None:
        """Prune one block, or load its finished version, and take the streams through it."""
        runner, states, ordered = self.runner, self.states, None
        dense = copy.deepcopy(runner.blocks[index]) if self.dense_states else None
        need_outputs = states is not None and index + 1 < len(runner.blocks)
        self.notes.append(BlockNotes())
        # resident blocks were checked when they were loaded
        for linear in runner.linears(index) if not runner.weights.resident else ():
            linear.check_finite(runner.named)
        linears = self._linears(index)
        if not self._restore_(index, linears):
            if dense and linears:
                order = known_order(self.orders, runner, states, index, linears)
                both = states, self.dense_states
                ordered = OrderedBlock(
                    runner, self.method, index, order, dense, *both, self.cache_inputs, need_outputs
                )
            written = self._prune_(index, linears, ordered)
            self._finish_(index)
            # for quantized layers --resume stores the matrices from which their codes are made
            matrices = {
                linear.name.removeprefix(f"{runner.name}.{index}."): written[linear.name]
                for linear in linears
                if linear.is_quantized and linear.name in written
            }
            notes = vars(self.notes[-1])
            runner.weights.put(index, notes, matrices, stage=self.stage)
        for linear in linears:
            if linear.name not in self.pruned:
                self.left_dense[linear.name] = prod(linear.shape), UNREACHED
        if not need_outputs:
            return
        if ordered:
            ordered.advance_()
        else:
            if dense:
                runner.advance_(self.dense_states, index, dense)
            runner.advance_(states, index)
        states.block_args[index] = []  # the block's recorded arguments are not needed again

    def _linears(self, index: int) -> list[PrunableLinear]:
        """Return the block's layers that are still to be changed; report the others."""
        linears, left_dense = find_linears(self.runner.blocks[index], f"{self.runner.name}.{index}")
        self.left_dense |= left_dense
        return [linear for linear in linears if weight_key(linear) not in self.shared_done]

    def _restore_(self, index: int, linears: list[PrunableLinear]) -> bool:
        """Load the block and its notes if an interrupted run finished it; return whether it did."""
        facts = self.runner.weights.get(index, stage=self.stage)
        if facts is None:
            return False
        notes = BlockNotes(**facts)
        self.notes[-1] = replace(notes, pruned=[])
        for linear in linears:
            if linear.name in notes.pruned:
                self._mark_pruned(linear)
        return True

    def _finish_(self, index: int) -> None:
        """Share the notes of all processes, once the block's layers are pruned."""
        notes = self.notes[-1]
        of_all = self.dist.all_gather_object((notes.warnings, notes.kept, notes.errors))
        warned, kept, errors = zip(*of_all, strict=True)
        notes.warnings, notes.kept = sum(warned, []), sum(kept, [])
        notes.errors = {name: error for each in errors for name, error in each.items()}

    def _prune_(
        self, index: int, linears: list[PrunableLinear], ordered: OrderedBlock | None
    ) -> dict[str, Tensor]:
        """Observe and prune, stage by stage or all at once; return {layer's name: new weights}."""
        runner, method = self.runner, self.method
        if self.states is None:
            return self._solve_(
                [Group([one], method(one.shape[1], runner.device)) for one in linears]
            )
        written: dict[str, Tensor] = {}
        stages = [stage.linears for stage in ordered.order] if ordered else [linears]
        for place, stage in enumerate(stages):
            if ordered:
                groups = ordered.observe(place)
            else:
                passes = ((run, {}) for _, run in runner.iter_batches(self.states, index))
                groups = observe(runner, linears, method, passes)
            written |= self._solve_(merge(groups, stage, method, runner, self.idle))
        return written

    def _solve_(self, groups: list[Group]) -> dict[str, Tensor]:
        """Solve this process's groups, and store those of all processes."""
        owners = self.dist.assign_owners([group.cost for group in groups])
        written: dict[str, Tensor] = {}

        def solve_own_() -> None:
            for group, owner in zip(groups, owners, strict=True):
                if group.fallback:
                    name = self.fallback or group.fallback
                    self.notes[-1].fallbacks.setdefault(name, []).append(group.names)
                if owner == self.dist.rank:
                    for linear, matrix in zip(group.linears, self._solved(group), strict=True):
                        self._store_(linear, matrix)
                        written[linear.name] = matrix

        self.dist.fail_together(solve_own_)
        for group, owner in zip(groups, owners, strict=True) if self.dist.size > 1 else ():
            for linear in group.linears:
                matrix = written.get(linear.name)
                if matrix is None:
                    dtype, device = linear.saved_dtype(self.saved), linear.raw_weight.device
                    matrix = torch.empty(linear.shape, dtype=dtype, device=device)
                matrix = self.dist.broadcast_(matrix, owner)
                if owner != self.dist.rank:
                    self._store_(linear, matrix)
                written[linear.name] = matrix
        return written

    def _solved(self, group: Group) -> list[Tensor]:
        """Return the group's pruned matrices (out, in), in the dtype in which they are saved."""
        _check_finite(group.method.statistics(), f"{group.names}: activations are not finite")
        matrices = [linear.matrix() for linear in group.linears]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                progress.on_step("solve", 0)
                self._change_(group, matrices)
            except UserError as error:
                raise UserError(f"{group.names}: {error}") from error
        for warning in caught:
            prefix = "" if issubclass(warning.category, RunWarning) else f"{group.names}: "
            self.notes[-1].warnings.append(f"{prefix}{warning.message}")
        solved = []
        for linear, matrix in zip(group.linears, matrices, strict=True):
            _check_finite([matrix], f"{linear.name}: pruned weights are not finite")
            solved.append(matrix.to(linear.saved_dtype(self.saved)))
        return solved

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        """Prune the matrices (out, in) of a group in place."""
        names, solver = [linear.name for linear in group.linears], group.solver()
        solver.output_costs = [self.allocation.output_costs.get(name) for name in names]
        solver.output_squares = [group.output_squares.get(name) for name in names]
        dense = [group.rows @ matrix.T for matrix in matrices] if group.method.tokens else []
        solver.prune_(matrices, [self.allocation.sparsity[name] for name in names])
        for name, matrix, outputs in zip(names, matrices, dense, strict=False):
            error = relative_error(outputs, group.rows @ matrix.T)
            self.notes[-1].errors |= {name: error} if error is not None else {}

    def _store_(self, linear: PrunableLinear, matrix: Tensor) -> None:
        linear.set_weight_(matrix)
        self._mark_pruned(linear)

    def _mark_pruned(self, linear: PrunableLinear) -> None:
        self.pruned[linear.name] = prod(linear.shape)
        self.notes[-1].pruned.append(linear.name)
        if weight_key(linear)[0] in self.shared:
            self.shared_done.add(weight_key(linear))


def _check_finite(tensors: Iterable[Tensor], what: str) -> None:
    if not all(map(all_finite, tensors)):
        raise UserError(f"{what}. Use --dtype float32.")


# lets callers of `from langprune import prune`, which gives this module, call it
sys.modules[__name__].__class__ = type("Verb", (type(sys),), {"__call__": staticmethod(prune)})
