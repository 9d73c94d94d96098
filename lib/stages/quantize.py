"""Quantize the remaining weights to few bits, for the packed format or for llama.cpp.

This takes one more pass over the blocks with calibration text. The inputs of each linear layer come
from the quantized blocks before it, and its target is the output of the unquantized model
(lib/methods/gptq.py). Zeros stay zeros if the format has a 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..calibration.changes import UNREACHED
from ..calibration.inputs import Group, merge, observe
from ..calibration.mixed_types import CHUNK, tables_of
from ..formats.base import ScaledFormat
from ..formats.grids import Grid, Types
from ..methods.gptq import GPTQ, MasterWeights
from ..model.blocks import BlockRunner
from ..model.matrix import PrunableLinear, SaveDtypes
from ..offload.sharded import shard_of_masters, sharded_dims
from ..packed.linear import why_dense
from ..prune import BlockWalker
from ..util.errors import UserError, first_of
from ..util.resume import QUANTIZED, START, of_block

NOTHING_PACKED = (
    "--replace_sparse_layers",
    "packing makes no linear layer smaller",
    "Add --prune_method",
)


def form_of(fmt: ScaledFormat, linear: PrunableLinear) -> ScaledFormat | None:
    """Return the format of a linear layer; None if it won't be packed, or if its rows don't fit."""
    if fmt.packs:
        return fmt if linear.expert is None and not why_dense(linear.module) else None
    return fmt.of(linear.parameter_name, linear.shape[1])


def quantized_numbers(fmt: ScaledFormat, linears: Iterable[PrunableLinear]) -> int:
    """Return the most weights that may be quantized, before they are read.

    By tensor (`Types`) all may be whose rows fit llama.cpp's blocks of 32.
    """
    taken = (
        linear
        for linear in linears
        if (linear.expert is None if fmt.packs else linear.shape[1] % 32 == 0)
    )
    return sum(prod(linear.shape) for linear in taken)


def check_quantized(runner: BlockRunner, fmt: ScaledFormat) -> dict[str, Any]:
    """Return the record of a quantized model. UserError if storing as `fmt` changes a value."""
    types: dict[str, str | None] = {}  # of tensors; None: not quantized
    for linear in runner.each_linear():
        form = form_of(fmt, linear)
        types[linear.parameter_name] = form and form.name
        if form and not form.is_on_grid(linear.matrix()):
            problem = f"{linear.name} is not on the grid"
            raise UserError(f"--quantize {fmt.name}", problem, "Please report this")
    left = [name for name, type_ in types.items() if not type_]
    record = {"format": fmt.name, "tensors": len(types) - len(left), "left": left}
    several = set(filter(None, types.values())) != {fmt.name}
    return record | ({"types": getattr(fmt, "types", types)} if several else {})


def quantize(
    runner: BlockRunner,
    windows: Tensor,
    fmt: ScaledFormat,
    master_dtype: torch.dtype | None = None,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> Quantizer:
    """Quantize the linear layers that `fmt` takes, in place, with windows (n, tokens).

    The returned quantizer reports the results. With `master_dtype`, training continues from its
    `master_weights`. `on_progress(1)` is called after each block.
    """
    return Quantizer(runner, fmt, master_dtype).run(windows, on_progress)


class Quantizer(BlockWalker):
    """Quantizes the linear layers that `fmt` takes, in place.

    Layers without tokens, and experts with fewer tokens than inputs, are rounded to nearest. If the
    model will be trained, `master_weights` maps each parameter's name to its masters
    (`master_dtype`) and grid. If ranks share the training, it holds this rank's shard of them.
    """

    checkpoint_prefix = QUANTIZED
    fallback = "nearest"

    def __init__(
        self, runner: BlockRunner, fmt: ScaledFormat, master_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(runner, GPTQ)
        self.fmt, self.master_dtype = fmt, master_dtype
        self.master_weights: dict[str, tuple[Tensor, Grid]] = {}
        # a parameter that blocks share has several names, but one master
        first: dict[int, str] = {}
        every = runner.model.named_parameters(remove_duplicate=False)
        self.names = {name: first.setdefault(id(each), name) for name, each in every}
        self.saved = SaveDtypes()  # integers times scales are kept exactly
        forms = [form for each in runner.each_linear() if (form := form_of(fmt, each))]
        self.bits = sorted({form.bits for form in forms})
        if not forms and not isinstance(fmt, Types):  # which may be for embedding and head alone
            if fmt.packs:
                raise UserError(*NOTHING_PACKED)
            problem = "no linear layer has rows of a multiple of 32"
            raise UserError(f"--quantize {fmt.name}", problem, "Leave the flag out")

    def takes(self, linear: PrunableLinear) -> bool:
        return form_of(self.fmt, linear) is not None

    def solve(self, group: Group, matrices: list[Tensor]) -> None:
        by_form: dict[ScaledFormat, list[int]] = {}  # each one is solved by itself
        for place, linear in enumerate(group.linears):
            by_form.setdefault(form_of(self.fmt, linear), []).append(place)
        for form, places in by_form.items():
            own = [matrices[place] for place in places]
            if group.fallback:
                every = [self._nearest_(matrix, form) for matrix in own]
            else:
                every = group.method.quantize_(own, form)
            for place, masters in zip(places, every, strict=True):
                self._keep_masters(group.linears[place], masters)

    def exchange_(self, group: Group, owner: int) -> None:
        super().exchange_(group, owner)
        for linear in group.linears if self.master_dtype else ():
            for view in self._masters(linear):
                view.copy_(self.dist.broadcast_(view, owner))

    def finish_(self) -> None:
        """Also round layers without tokens to nearest, and store the masters for --resume."""
        for linear in self.linears:
            if linear.name not in self.written:
                matrix = linear.matrix()
                masters = self._nearest_(matrix, form_of(self.fmt, linear))
                self._keep_masters(linear, masters)
                linear.set_weight_(matrix)
        if self.master_dtype and (finished := self.runner.weights.finished):
            named = {
                f"{field} of {linear.name}": tensor
                for linear in self.linears
                for field, tensor in self._masters(linear)._asdict().items()
            }
            finished.write(of_block(START, self.index), named, {})
        self._shard_masters()

    def restore_(self) -> bool:
        stored = None
        if self.master_dtype:
            stored = self.runner.weights.read_kept(of_block(START, self.index))
        if (self.master_dtype and not stored) or not super().restore_():
            return False
        tensors = dict(stored[0]) if stored else {}
        for linear in self.linears if stored else ():
            fields = (tensors[f"{field} of {linear.name}"] for field in MasterWeights._fields)
            self._keep_masters(linear, MasterWeights(*fields))
        self._shard_masters()
        return True

    @torch.no_grad()
    def quantize_tables_(self) -> None:
        """After a run, quantize the head by its inputs; round another embedding to nearest.

        They become new tensors, since the dense model of comparisons shares the old ones.
        """
        runner, states, last = self.runner, self.inputs.states, len(self.runner.blocks) - 1
        head = PrunableLinear("head", runner.model.get_output_embeddings())
        places = torch.arange(states.windows.shape[1], device=runner.device)
        with runner.on_device(last):
            runner.advance_(states, last)
        runs = (partial(runner.logits(states, batch), places) for batch in states.batches)
        groups = observe(runner, [head], GPTQ, ((run, {}) for run in runs))
        [group] = merge(groups, [head], GPTQ, runner, self.inputs.idle)
        for name, weight in tables_of(runner.model).items():
            if form := self.fmt.of(name, weight.shape[1]):
                table = torch.empty_like(weight)
                for old, new in zip(weight.split(CHUNK), table.split(CHUNK), strict=True):
                    part = old.to(torch.float32, copy=True)
                    if weight is head.module.weight:
                        group.method.quantize_([part], form)
                    else:
                        part = form.nearest(part)
                    new.copy_(part)
                weight.data = table

    def summary(self) -> list[str]:
        """Return lines for the user, which name every layer that was only rounded."""
        few = [name for notes in self.notes for name in sum(notes.fallbacks.values(), [])]
        in_few = sum(len(names.split(", ")) for names in few)
        count, lines = len(self.pruned) - in_few, []
        if self.bits:
            bits = " and ".join(map(str, self.bits))
            lines = [f"quantized {count} linear layers to {bits} bits, column by column"]
        if few:
            reason = "too few tokens were routed to them"
            lines.append(f"quantized {in_few} linear layers to nearest, {reason}: {first_of(few)}")
        dense = self.left_dense.items()
        if left := [name for name, (_, reason) in dense if reason == UNREACHED]:
            lines.append(f"quantized to nearest, {UNREACHED}: {first_of(left)}")
        return lines + self.warnings()

    def _nearest_(self, matrix: Tensor, form: ScaledFormat) -> MasterWeights:
        """Round a matrix (out, in) to nearest, in place."""
        masters = MasterWeights(matrix.clone(), form.fit_scales(matrix).float())
        matrix.copy_(form.round_to(matrix, masters.scales))
        return masters

    def _keep_masters(self, linear: PrunableLinear, masters: MasterWeights) -> None:
        """Keep what the training of a layer begins with, if the model will be trained."""
        if self.master_dtype:
            for view, value in zip(self._masters(linear), masters, strict=True):
                view.copy_(value)

    def _shard_masters(self) -> None:
        """Keep only this rank's shard of a block's masters if ranks will share the training.

        If blocks are trained on the host, the masters move there.
        """
        if not self.master_dtype or self.runner.weights.resident:
            return
        dims = sharded_dims(self.runner.blocks[self.index], self.dist.size)
        prefix = f"{self.runner.name}.{self.index}."
        for name in {self.names[linear.parameter_name] for linear in self.linears}:
            dim = dims[name.removeprefix(prefix)]
            self.master_weights[name] = shard_of_masters(*self.master_weights[name], dim, self.dist)

    def _masters(self, linear: PrunableLinear) -> MasterWeights:
        """Return views of a layer's masters and scales, which may be in a stack of experts."""
        parameter = getattr(linear.module, linear.parameter)
        name = self.names[linear.parameter_name]
        (rows, columns), experts = linear.shape, 1 if linear.expert is None else len(parameter)
        if name not in self.master_weights:
            form = form_of(self.fmt, linear)
            sizes = experts * rows, form.n_groups(columns)
            grid = Grid(form, linear.transposed, torch.ones(sizes, device=parameter.device))
            self.master_weights[name] = parameter.data.to(self.master_dtype, copy=True), grid
        masters, grid = self.master_weights[name]
        masters = masters if linear.expert is None else masters[linear.expert]
        scales = grid.scales.view(experts, rows, -1)[linear.expert or 0]
        return MasterWeights(masters.T if linear.transposed else masters, scales)
