"""The inputs of one block after another: they are recorded, observed, and taken through the block.

In Wanda's code (https://github.com/locuslab/wanda) these are `prepare_calibration_input`,
`WrappedGPT.add_batch`, and the second pass over a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..methods.base import PruningMethod
from ..model.blocks import BlockRunner, HiddenStates
from ..model.matrix import PrunableLinear
from .inputs import Group, merge, observe, rank_windows
from .sequential import OrderedBlock, Stage, find_order


class BlockInputs:
    """Hidden states of calibration windows (n, tokens) at the current block, shared by ranks.

    They come from the changed blocks before it, and for a method with a `dense_stream` also from
    the dense ones. A method that observes nothing has none, and needs no windows.
    """

    def __init__(
        self,
        runner: BlockRunner,
        windows: Tensor | None,
        method: type[PruningMethod],
        caches: bool = True,
    ) -> None:
        self.runner, self.method = runner, method
        # fetching cached inputs from other memory would take longer than computing them again
        on_device = torch.device(runner.state_device).type == runner.device.type
        self.caches = caches and runner.cache_inputs and on_device
        self.states: HiddenStates | None = None
        self.dense_states: HiddenStates | None = None
        if method.observes:
            local, self.idle = rank_windows(windows, runner.dist)
            self.states = runner.capture(local)
            self.dense_states = self.states.copy() if method.dense_stream else None
        # per class of blocks: the layers of the first block, and their order
        self.orders: dict[tuple, tuple[list[PrunableLinear], list[Stage]]] = {}
        self.index = -1
        self.dense: nn.Module | None = None  # a copy of the block from before its change
        self.ordered: OrderedBlock | None = None

    def begin(self, index: int) -> None:
        """Turn to block `index`, which is on the device and unchanged."""
        self.index, self.ordered = index, None
        self.dense = copy.deepcopy(self.runner.blocks[index]) if self.dense_states else None

    def observe(self, linears: list[PrunableLinear]) -> Iterator[list[Group]]:
        """Observe the inputs of layers, and yield groups that can be solved at one time.

        With a dense stream each stage is observed when the one before is solved.
        """
        runner, method = self.runner, self.method
        if self.states is None:
            yield [Group([one], method(one.shape[1], runner.device)) for one in linears]
        elif self.dense and linears:
            order = self._order(linears)
            self.ordered = OrderedBlock(
                runner=runner,
                method=method,
                index=self.index,
                order=order,
                dense=self.dense,
                states=self.states,
                dense_states=self.dense_states,
                cache_inputs=self.caches,
                need_outputs=self._are_needed_again,
            )
            for place, stage in enumerate(order):
                yield merge(self.ordered.observe(place), stage.linears, method, runner, self.idle)
        else:
            passes = ((run, {}) for _, run in runner.iter_batches(self.states, self.index))
            groups = observe(runner, linears, method, passes) if linears else []
            yield merge(groups, linears, method, runner, self.idle)

    def advance_(self) -> None:
        """Replace the states by the block's outputs, unless it is the last one."""
        if self._are_needed_again:
            if self.ordered:
                self.ordered.advance_()
            else:
                if self.dense:
                    self.runner.advance_(self.dense_states, self.index, self.dense)
                self.runner.advance_(self.states, self.index)
            self.states.block_args[self.index] = []  # these arguments are not needed again
        self.dense = self.ordered = None

    @property
    def _are_needed_again(self) -> bool:
        return self.states is not None and self.index + 1 < len(self.runner.blocks)

    def _order(self, linears: list[PrunableLinear]) -> list[Stage]:
        """Return the result of `find_order`, which blocks of one class have in common."""
        prefix = f"{self.runner.name}.{self.index}."
        names = [(linear.name.removeprefix(prefix), linear.shape) for linear in linears]
        key = type(self.runner.blocks[self.index]), *names
        if key not in self.orders:
            self.orders[key] = linears, find_order(self.runner, self.states, self.index, linears)
        first, order = self.orders[key]
        own = dict(zip(first, linears, strict=True))
        return [replace(stage, linears=[own[one] for one in stage.linears]) for stage in order]
