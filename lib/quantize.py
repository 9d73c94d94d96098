"""Quantize the remaining weights to 4 bits, for the packed format or for llama.cpp.

This takes one more pass over the blocks with calibration text. The inputs of each linear layer come
from the quantized blocks before it, and its target is the output of the unquantized model
(lib/methods/gptq.py). Zeros stay zeros if the format has a 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .methods.gptq import GPTQ, Start
from .model.blocks import BlockRunner
from .model.matrix import PrunableLinear, SaveDtypes
from .model.run_folder import QUANTIZED, START, of_block
from .packed.formats import Grid, Int4
from .packed.linear import why_dense
from .prune import UNREACHED, Pruner
from .pruning.allocation import Allocation
from .pruning.inputs import Group
from .pruning.ordered import OrderedBlock
from .sharded import is_sharded, part_of_start, shared_along
from .util.errors import UserError, first_of

NOTHING = "--replace_sparse_layers: packing makes no linear layer smaller. Add --prune_method."
NO_BLOCKS = "--quantize {}: no linear layer has rows of a multiple of 32. Leave the flag out."


def takes(fmt: Int4, linear: PrunableLinear) -> bool:
    """Return whether a linear layer is quantized: if it will be packed, or if its rows fit."""
    if fmt.packs:
        return linear.expert is None and not why_dense(linear.module)
    return fmt.takes(linear.shape[1])


def check_quantized(runner: BlockRunner, fmt: Int4) -> dict[str, Any]:
    """Return the record of a quantized model. UserError if storing as `fmt` changes a value."""
    tensors: dict[str, bool] = {}  # whether they are on the grid
    for linear in runner.each_linear():
        tensors[linear.stage] = takes(fmt, linear)
        if tensors[linear.stage] and not fmt.holds(linear.matrix()):
            problem = f"{linear.name} is not on the grid. Please report this."
            raise UserError(f"--quantize {fmt.name}: {problem}")
    left = [name for name, on_grid in tensors.items() if not on_grid]
    return {"format": fmt.name, "tensors": len(tensors) - len(left), "left": left}


def quantize(
    runner: BlockRunner,
    windows: Tensor,
    fmt: Int4,
    master_dtype: torch.dtype | None = None,
    on_progress: Callable[[int], Any] = lambda blocks: None,
) -> Quantizer:
    """Quantize the linear layers that `fmt` takes, in place, with windows (n, tokens).

    The returned quantizer reports the results. With `master_dtype`, its `starts` are where training
    continues. `on_progress(1)` is called after each block.
    """
    return Quantizer(runner, fmt, master_dtype).run(windows, on_progress)


class Quantizer(Pruner):
    """Quantizes the linear layers that `fmt` takes, in place.

    Layers without tokens, and experts with fewer tokens than inputs, are rounded to nearest. If the
    model will be trained, `starts` maps each parameter's name to its masters (`master_dtype`) and
    grid. If ranks share the training, it holds this rank's part of them.
    """

    stage = QUANTIZED
    fallback = "nearest"

    def __init__(
        self, runner: BlockRunner, fmt: Int4, master_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(runner, GPTQ, Allocation({}))
        self.fmt, self.master_dtype = fmt, master_dtype
        self.starts: dict[str, tuple[Tensor, Grid]] = {}
        # a parameter that blocks share has several names, but one start
        first: dict[int, str] = {}
        every = runner.model.named_parameters(remove_duplicate=False)
        self.names = {name: first.setdefault(id(each), name) for name, each in every}
        self.saved = SaveDtypes()  # integers times scales are kept exactly
        if not any(takes(fmt, linear) for linear in runner.each_linear()):
            raise UserError(NOTHING if fmt.packs else NO_BLOCKS.format(fmt.name))

    def summary(self) -> list[str]:
        few = [name for notes in self.notes for name in sum(notes.fallbacks.values(), [])]
        in_few = sum(len(names.split(", ")) for names in few)
        count, bits = len(self.pruned) - in_few, self.fmt.bits
        lines = [f"quantized {count} linear layers to {bits} bits, column by column"]
        if few:
            reason = "too few tokens were routed to them"
            lines.append(f"quantized {in_few} linear layers to nearest, {reason}: {first_of(few)}")
        dense = self.left_dense.items()
        if left := [name for name, (_, reason) in dense if reason == UNREACHED]:
            lines.append(f"quantized to nearest, {UNREACHED}: {first_of(left)}")
        return lines + self.all_warnings()

    def _linears(self, index: int) -> list[PrunableLinear]:
        return [linear for linear in super()._linears(index) if takes(self.fmt, linear)]

    def _prune_(
        self, index: int, linears: list[PrunableLinear], ordered: OrderedBlock | None
    ) -> dict[str, Tensor]:
        """As `Pruner._prune_`, but also quantize layers without tokens, and keep the starts."""
        written = super()._prune_(index, linears, ordered)
        for linear in linears:
            if linear.name not in written:
                matrix = linear.matrix()
                self._keep(linear, self._nearest_(matrix))
                linear.set_weight_(matrix)
        if self.master_dtype and (finished := self.runner.weights.finished):
            named = {
                f"{part} of {linear.name}": tensor
                for linear in linears
                for part, tensor in self._start(linear)._asdict().items()
            }
            finished.write(of_block(START, index), named, {})
        self._share(index, linears)
        return written

    def _solve_(self, groups: list[Group]) -> dict[str, Tensor]:
        """As `Pruner._solve_`, and send masters and scales to all processes."""
        written = super()._solve_(groups)
        owners = self.dist.assign_owners([group.cost for group in groups])
        for group, owner in zip(groups, owners, strict=True):
            for linear in group.linears if self.master_dtype and self.dist.size > 1 else ():
                for part in self._start(linear):
                    part.copy_(self.dist.broadcast_(part, owner))
        return written

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        if group.fallback:
            starts = [self._nearest_(matrix) for matrix in matrices]
        else:
            starts = group.method.quantize_(matrices, self.fmt)
        for linear, start in zip(group.linears, starts, strict=True):
            self._keep(linear, start)

    def _nearest_(self, matrix: Tensor) -> Start:
        """Round a matrix (out, in) to nearest, in place."""
        start = Start(matrix.clone(), self.fmt.fit_scales(matrix).float())
        matrix.copy_(self.fmt.round_to(matrix, start.scales))
        return start

    def _restore_(self, index: int, linears: list[PrunableLinear]) -> bool:
        kept = self.runner.weights.read_kept(of_block(START, index)) if self.master_dtype else None
        if (self.master_dtype and not kept) or not super()._restore_(index, linears):
            return False
        tensors = dict(kept[0]) if kept else {}
        for linear in linears if kept else ():
            self._keep(linear, Start(*(tensors[f"{p} of {linear.name}"] for p in Start._fields)))
        self._share(index, linears)
        return True

    def _keep(self, linear: PrunableLinear, start: Start) -> None:
        """Keep where the training of a layer starts, if the model will be trained."""
        if self.master_dtype:
            for part, value in zip(self._start(linear), start, strict=True):
                part.copy_(value)

    def _share(self, index: int, linears: list[PrunableLinear]) -> None:
        """Keep only this rank's part of a block's starts if ranks will share the training."""
        if not (self.master_dtype and is_sharded(self.runner)):
            return
        along = shared_along(self.runner.blocks[index], self.dist.size)
        prefix = f"{self.runner.name}.{index}."
        for name in {self.names[linear.stage] for linear in linears}:
            dim = along[name.removeprefix(prefix)]
            self.starts[name] = part_of_start(*self.starts[name], dim, self.dist)

    def _start(self, linear: PrunableLinear) -> Start:
        """Return views of a layer's masters and scales, which may be in a stack of experts."""
        parameter, name = getattr(linear.module, linear.parameter), self.names[linear.stage]
        (rows, columns), experts = linear.shape, 1 if linear.expert is None else len(parameter)
        if name not in self.starts:
            sizes = experts * rows, self.fmt.n_groups(columns)
            grid = Grid(self.fmt, linear.transposed, torch.ones(sizes, device=parameter.device))
            self.starts[name] = parameter.data.to(self.master_dtype, copy=True), grid
        masters, grid = self.starts[name]
        masters = masters if linear.expert is None else masters[linear.expert]
        scales = grid.scales.view(experts, rows, -1)[linear.expert or 0]
        return Start(masters.T if linear.transposed else masters, scales)
