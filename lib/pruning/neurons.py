"""Remove whole neurons of the blocks' MLPs, block by block: what is left is a smaller dense model.

Each block is observed with the blocks before it already smaller; of its down projection's input a
method sums what it needs, chooses the neurons that stay and, if it repairs, what down's columns
become (`PruningMethod.remove_neurons_`). The rows of gate and up stay as they were.
Run: `python main.py --model MODEL --prune_method sparsegpt --sparsity_type neurons ...`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.pytorch_utils import Conv1D

from lib.distributed.context import DistContext
from lib.methods.registry import MethodSpec
from lib.model.blocks import BlockRunner, HiddenStates, run_block
from lib.model.finite import all_finite, check_weight
from lib.model.matrix import PrunableLinear
from lib.model.mlp import BlockMlp, MlpLayout, check_removable, fit_sizes_, keep_neurons_
from lib.model.shapes import FLOAT, META, BlockShape, Shapes, StepBytes, Workload
from lib.pruning.inputs import Group, merge
from lib.pruning.observe import DenseBlock, observe, own_windows
from lib.pruning.ordered import BlockOrder, OrderedBlock
from lib.pruning.residual import ResidualProjections
from lib.util.errors import RunWarning, UserError
from lib.util.host import malloc_trim
from lib.util.products import exact_products

CHECKED = 16  # tokens of the check of a block where no text is observed


@dataclass(frozen=True)
class Removal:
    """How many neurons of each MLP stay, and the shapes of the model that has no others."""

    width: int
    left: int
    shapes: Shapes


def count_left(width: int, ratio: float, multiple: int) -> int:
    """How many of `width` neurons stay: about 1 - `ratio` of them, a multiple of `multiple`.

    UserError where that removes none.
    """
    left = max(1, round((1 - ratio) * width / multiple)) * multiple
    if left >= width:
        raise UserError(
            f"--sparsity_ratio {ratio:g}: of {width} neurons in each block none can go and leave a "
            f"multiple of {multiple}; give a higher ratio, or a smaller --neurons_multiple"
        )
    return left


@dataclass
class NeuronsPruned:
    """Which neurons of each block stay, indices in rising order; sizes in weights; warnings."""

    width: int
    left: int
    kept: list[list[int]] = field(default_factory=list)
    weights_before: int = 0  # of the blocks
    weights_after: int = 0
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Lines for the user."""
        share = 1 - self.weights_after / self.weights_before
        line = (
            f"removed {self.width - self.left} of {self.width} neurons in each of {len(self.kept)} "
            f"blocks, {share:.1%} of the blocks' weights"
        )
        return [line, *self.warnings]


class NeuronPruner:
    """Makes the MLPs of a runner's model narrower, in place, and its config say so.

    `left`: how many neurons stay in each block. `rounding`: the dtype in which the model will be
    saved. `dist`: the processes that share the work.
    """

    def __init__(
        self,
        runner: BlockRunner,
        method_spec: MethodSpec,
        layout: MlpLayout,
        left: int,
        *,
        dist: DistContext,
        rounding: torch.dtype | None = None,
    ) -> None:
        self.runner = runner
        self.method_spec = method_spec
        self.layout = layout
        self.left = left
        self.dist = dist
        self.rounding = rounding
        self.projections = ResidualProjections(runner, dist)
        self.checked: set[type] = set()  # classes of blocks
        self.done = NeuronsPruned(layout.width, left)

    @torch.no_grad()
    def run(
        self,
        windows: Tensor | None,
        batch_size: int,
        state_device: torch.device | str = "cpu",
        on_progress: Callable[[int], None] | None = None,
    ) -> NeuronsPruned:
        """Calibrate on windows (n, tokens), None for a method that needs none, and prune.

        `state_device`: where hidden states are kept. `on_progress(1)` is called after each block.
        Raises UserError where a weight or an activation is not finite, or where a block's MLP is
        more than its linears and activation.
        """
        states = dense = None
        if windows is not None:
            own, self.idle = own_windows(windows, self.dist)
            states = self.runner.capture(own, batch_size, state_device)
        if self.method_spec.cls.dense_stream:
            dense = replace(states, hidden=self.runner.transfer.copy(states.hidden))
        for index in range(len(self.runner.blocks)):
            with self.runner.on_device(index, write_back=True):
                self._block_(index, states, dense)
            if on_progress:
                on_progress(1)
        self.layout.set_width(self.runner.model.config, self.left)
        return self.done

    def _block_(
        self, index: int, states: HiddenStates | None, dense_states: HiddenStates | None
    ) -> None:
        """Make one block smaller, or load it finished, and take the streams through it."""
        runner, block = self.runner, self.runner.blocks[index]
        mlp, prefix = self.layout.blocks[index], f"{runner.name}.{index}"
        [down] = [one for one in runner.linears(index) if one.name == f"{prefix}.{mlp.down}"]
        self.done.weights_before += _weights(block)
        dense = DenseBlock.copy_of(dense_states, block, prefix) if dense_states else None
        need_outputs = states is not None and index + 1 < len(runner.blocks)
        ordered = None
        if not self._restore_(index, mlp):
            if not runner.weights.resident:  # otherwise it was checked when it was loaded
                for linear in runner.linears(index):
                    check_weight(linear, runner.named)
            self._check_once(index, mlp, states)
            if dense:
                ordered = self._ordered(index, down, states, dense, need_outputs)
            self._prune_(index, mlp, down, self._observe(index, down, states, ordered))
        self.done.weights_after += _weights(block)
        if need_outputs:
            if ordered:
                ordered.advance_()
            else:
                if dense:
                    runner.advance_(dense.states, index, dense.block)
                runner.advance_(states, index)
            states.block_args[index] = []  # the block's recorded arguments are not needed again

    def _ordered(
        self,
        index: int,
        down: PrunableLinear,
        states: HiddenStates,
        dense: DenseBlock,
        need_outputs: bool,
    ) -> OrderedBlock:
        """The block beside the untouched one, with down's input as the only one to be taken."""
        return OrderedBlock(
            runner=self.runner,
            states=states,
            index=index,
            order=BlockOrder.of([[down]], 1, self.projections, states=states, index=index),
            dense=dense,
            method_spec=self.method_spec,
            cache_inputs=False,  # they would have the wrong width once neurons are removed
            need_outputs=need_outputs,
        )

    def _check_once(self, index: int, mlp: BlockMlp, states: HiddenStates | None) -> None:
        """Check each class of blocks on a batch, or on a few tokens where no text is observed."""
        block = self.runner.blocks[index]
        if type(block) in self.checked:
            return
        self.checked.add(type(block))
        if states is None:
            ids = torch.arange(CHECKED, device=self.runner.device)[None]
            states = self.runner.capture(ids, 1, self.runner.device)
        hidden = self.runner.transfer.fetch(states.hidden, states.batches[0])
        args, kwargs = states.block_args[index][0]
        run = partial(run_block, hidden=hidden, args=args, kwargs=kwargs)
        check_removable(block, mlp, self.layout.width, run, f"{self.runner.name}.{index}")

    def _observe(
        self,
        index: int,
        down: PrunableLinear,
        states: HiddenStates | None,
        ordered: OrderedBlock | None,
    ) -> Group:
        """What all processes have observed of down's input."""
        runner, spec = self.runner, self.method_spec
        if states is None:
            return Group([down], spec(down.shape[1], runner.device))
        if ordered:
            groups = ordered.observe(0)
        else:
            groups = observe(runner, states, index, [down], spec)
        for group in groups if self.idle else ():
            group.reset_()
        [group] = merge(groups, [down], spec, runner.device, self.dist)
        for handle in self.dist.all_reduce_(group.method.statistics()):
            handle.wait()
        return group

    def _prune_(self, index: int, mlp: BlockMlp, down: PrunableLinear, group: Group) -> None:
        """Choose and repair on the main process, and make the block smaller on all."""
        caught = []
        if self.dist.is_main:
            kept, matrix, caught = self._solve(group, _gains(self.runner.blocks[index], mlp))
        else:
            kept = torch.empty(self.left, dtype=torch.long, device=self.runner.device)
            matrix = down.empty_matrix(self.rounding)
        kept, matrix = self.dist.broadcast_(kept, 0), self.dist.broadcast_(matrix, 0)
        notes = self.dist.all_gather_object(caught)[0]
        down.set_weight_(matrix)
        keep_neurons_(self.runner.blocks[index], mlp, kept)
        malloc_trim()  # weights lie in heaps of the threads that read them, which none else fills
        self._report({"kept": kept.tolist(), "warnings": notes})
        self.runner.weights.save(index, {"kept": kept.tolist(), "warnings": notes})

    @exact_products()
    def _solve(self, group: Group, gains: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """Neurons that stay (left,), down's matrix (out, in) as it is saved, and warnings."""
        [down] = group.linears
        for statistic in group.method.statistics():
            if not all_finite(statistic):
                raise UserError(f"{down.name}: activations are not finite; try --dtype float32")
        matrix = down.matrix()
        with record_function("solve"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                kept = group.method.remove_neurons_(matrix, gains, self.left)
            except UserError as error:
                raise UserError(f"{down.name}: {error}") from error
        if not all_finite(matrix):
            raise UserError(f"{down.name}: pruned weights are not finite; try --dtype float32")
        messages = [
            str(warning.message)
            if issubclass(warning.category, RunWarning)
            else f"{down.name}: {warning.message}"
            for warning in caught
        ]
        return kept, down.to_saved_dtype(matrix, self.rounding), messages

    def _restore_(self, index: int, mlp: BlockMlp) -> bool:
        """Load the block if an interrupted run has finished it; whether it has."""
        weights = self.runner.weights
        if not weights.has(index):
            return False
        self._report(weights.load(index))
        fit_sizes_(self.runner.blocks[index], mlp)
        return True

    def _report(self, notes: dict[str, Any]) -> None:
        self.done.kept.append(notes["kept"])
        self.done.warnings += notes["warnings"]


def neuron_pruning_bytes(load: Workload, method_spec: MethodSpec, removal: Removal) -> StepBytes:
    """Memory of removing neurons: hidden states of all calibration windows, and the work on a
    block."""
    cls, blocks = method_spec.cls, zip(load.shapes.blocks, removal.shapes.blocks, strict=True)
    streams = 2 if cls.dense_stream else 1
    hidden = streams * load.hidden_states(load.windows if cls.observes else 0)
    work = max(_block_bytes(load, method_spec, removal, *block) for block in blocks)
    return StepBytes(hidden, work)


def _block_bytes(
    load: Workload,
    method_spec: MethodSpec,
    removal: Removal,
    block: BlockShape,
    smaller: BlockShape,
) -> int:
    """The largest of checking a block, a batch on its way, and removing its neurons."""
    cls, size, width = method_spec.cls, load.working.itemsize, removal.width
    matrix = width * max(sum(each.outputs) for each in block.inputs if each.width == width)
    statistics, solving = method_spec(width, META).removal_bytes_needed(
        matrix // width, removal.left
    )
    solving = FLOAT * matrix + max(solving, load.saved.itemsize * matrix)
    untouched = block.weights * size if cls.dense_stream else 0
    batch = passing = load.activations(block)  # of one stream: what passes in the other is dropped
    if not cls.observes:
        batch, passing = batch * CHECKED // (load.batch_size * load.seqlen), 0
    half = (block.weights - smaller.weights) * (width // 2) // (width - removal.left)
    copying = (block.weights + matrix // 2) * size
    checking = max(copying, (block.weights - half) * size + batch)
    return untouched + max(checking, statistics + max(passing, solving))


def _gains(block: nn.Module, mlp: BlockMlp) -> Tensor:
    """The product of the norms of the rows that make each neuron (width,), float32."""
    gains: Tensor | float = 1.0
    for producer in mlp.producers:
        linear = block.get_submodule(producer.path)
        weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
        for part in weight.chunk(producer.parts):  # (width, in)
            gains = gains * torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)
    return gains


def _weights(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())
