"""Training on a GPU that holds one block at a time: weights and their training are on the host.

`FetchedWeights` has the methods of `WholeWeights` in lib/offload/sharded.py. A forward pass fetches
block after block and keeps their inputs. A backward pass fetches each again, recomputes its
activations, and returns the gradients of its weights to the host. There they are added up, and the
optimizer takes its steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats.grids import Grid
from ..model.blocks import BlockRunner, HiddenStates, run_block
from ..model.store import set_tensor
from .sharded import WholeWeights
from .store import FileBlockStore, TrainedStore


class FetchedWeights(WholeWeights):
    """Weights on the host, of which one block at a time is fetched; for a single rank."""

    def __init__(self, runner: BlockRunner, teacher: BlockRunner | None = None) -> None:
        super().__init__(runner)
        self.store = HostStore(runner.weights)
        self.blocks = self.store.twins

    def __enter__(self) -> FetchedWeights:
        self.runner.weights = self.store
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.runner.weights = self.store.files
        self.store.close(write_back=kind is None)

    def forward(self, states: HiddenStates) -> Tensor:
        hidden = states.hidden.requires_grad_()
        for index, ((args, kwargs),) in enumerate(states.block_args):
            hidden = FetchedBlock.apply(self.store, index, hidden, args, kwargs)
        return hidden

    def scales(self, grids: dict[str, Grid]) -> dict[str, Tensor]:
        every = super().scales(grids).items()
        return {name: scales.to(self.runner.device) for name, scales in every}


class HostStore(TrainedStore):
    """The blocks of a store of files, with copies on the host that are trained."""

    def __init__(self, files: FileBlockStore) -> None:
        super().__init__(files)
        self.twins = nn.ModuleList(self._twin(index) for index in range(len(self.blocks)))

    def fetch(self, index: int) -> None:
        for path, parameter in self.twins[index].named_parameters():
            set_tensor(self.blocks[index], path, parameter.data.to(self.device))

    def _twin(self, index: int) -> nn.Module:
        twin = self.empty_twin(index)
        for path, stored, tensor in self.files.each(index):  # no view of the file
            set_tensor(twin, path, tensor.clone() if tensor is stored else tensor)
        return twin


class FetchedBlock(torch.autograd.Function):
    """One block of a `HostStore`, run on batches of hidden states (n, tokens, hidden)."""

    @staticmethod
    def forward(ctx: Any, store: HostStore, index: int, hidden: Tensor, *more: Any) -> Tensor:
        ctx.store, ctx.index, ctx.more = store, index, more
        ctx.save_for_backward(hidden)
        with store.on_device(index):
            return run_block(store.blocks[index], hidden, *more)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Give the twin's parameters their gradients, which calls their hooks."""
        store, block = ctx.store, ctx.store.blocks[ctx.index]
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with store.on_device(ctx.index), torch.enable_grad():
            pairs = [
                (block.get_parameter(path).requires_grad_(), parameter)
                for path, parameter in store.twins[ctx.index].named_parameters()
                if parameter.requires_grad
            ]
            run_block(block, hidden, *ctx.more).backward(gradient)
            for fetched, parameter in pairs:
                if fetched.grad is not None:
                    parameter.backward(fetched.grad.to(parameter.device))
        return None, None, hidden.grad, None, None
