"""Decoder blocks that live on the host or on disk, and come to the device one at a time.

While a block is away its weights are on the meta device, and a store (lib/model/store.py) has them.
A whole block is fetched once for all windows; a pruned or packed one is put back into the store.
Called while it is away, as by the model's own forward, a block fetches itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lib.distributed.context import DistContext
from lib.model.store import BlockStore, Slots
from lib.packed.linear import SparseLinear
from lib.util.errors import UserError

META = torch.device("meta")
Fetched = tuple[dict[str, Tensor], Tensor | None]  # {path: tensor}, and the piece these are part of


class BlockPlacement:
    """Brings block `index` to `device` and takes it away again.

    `rounding`: the dtype in which the model is saved, but for what its class keeps in another
    (`exact`, parts of names). `dist`: the processes that share the store.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        device: torch.device,
        store: BlockStore,
        rounding: torch.dtype,
        exact: frozenset[str] = frozenset(),
        dist: DistContext | None = None,
    ) -> None:
        self.blocks = blocks
        self.device = device
        self.store = store
        self.rounding, self.exact = rounding, exact
        self.dist = dist or DistContext(device, alone=True)
        # of the blocks' modules those that the model came with: their buffers stay on the device
        self.first = weakref.WeakSet(module for block in blocks for module in block.modules())
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: tuple[int, Fetched] = (-1, ({}, None))  # a block that is already on its way
        for index, block in enumerate(blocks):
            self._send_away(block)
            block.forward = self._fetching(index, block)

    @property
    def zero_copy(self) -> bool:
        """Whether a block that is not changed is used where it stands."""
        return self.device.type == "cpu" and self.store.piece(0) is not None

    def _fetching(self, index: int, block: nn.Module):
        own = block.forward

        def forward(*args, **kwargs):
            with self.on_device(index):
                return own(*args, **kwargs)

        return forward

    @contextmanager
    def on_device(self, index: int, write_back: bool = False) -> Iterator[None]:
        """Inside, the block's weights are on the device; with `write_back` its changes are stored.

        With `write_back`, every process has to call it: it waits for all of them.
        """
        block = self.blocks[index]
        forward = block.__dict__.pop("forward")  # its own is the class's, also for copies of it
        try:
            tensors, _piece = self._arrived(index, write_back)
            for path, tensor in tensors.items():
                put(block, path, tensor)
            del tensors
            self._send_for(index + 1)
            yield
            if write_back:
                held = dict(self._held(block))
                self.dist.barrier()  # nobody still reads what is now replaced
                saved = {path: self.saved_in(index, path, one.dtype) for path, one in held.items()}
                self.store.replace_(index, held, saved)
        finally:
            self._send_away(block)
            block.forward = forward

    def _arrived(self, index: int, keep: bool) -> Fetched:
        """Weights of block `index` on the device; to be written to if `keep`."""
        (known, fetched), self.ahead = self.ahead, (-1, ({}, None))
        if known == index:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.side)
            fetched[1].record_stream(now)  # or its memory is taken for the next block too early
            return fetched
        piece = self.store.piece(index)
        if piece is None:
            tensors = self.store.tensors(index)
            return {path: tensor.to(self.device) for path, tensor in tensors.items()}, None
        memory, slots = piece
        if self.device.type == "cpu":  # where it stands already, and others may read it
            return _views(memory.clone() if keep else memory, slots)
        return _views(memory.to(self.device), slots)

    def _send_for(self, index: int) -> None:
        """Start copying block `index` from host memory while another block computes."""
        piece = self.store.piece(index) if self.side and index < len(self.blocks) else None
        if piece is not None:
            memory, slots = piece
            with torch.cuda.stream(self.side):
                self.ahead = index, _views(memory.to(self.device, non_blocking=True), slots)

    def _held(self, block: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Path and tensor of all that has to be kept of a block at hand."""
        for name, module in block.named_modules():
            if module in self.first:
                own = {key: one.data for key, one in module.named_parameters(recurse=False)}
            else:  # came in its place, as packed linears do: all of it
                own = {k: v for k, v in module.state_dict().items() if "." not in k}
            for key, tensor in own.items():
                yield f"{name}.{key}".strip("."), tensor

    def _send_away(self, block: nn.Module) -> None:
        for module in list(block.modules()):
            if module in self.first:
                if isinstance(module, SparseLinear) and not module.weight.is_meta:
                    module.to(self.device)  # packs again what torch's own tensor holds
                for name, one in module.named_parameters(recurse=False):
                    put(module, name, one.to(META))
            elif not list(module.children()):
                module.to(META)

    def saved_in(self, index: int, path: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of block `index`, of `dtype`, is saved."""
        parent, _, name = path.rpartition(".")
        parameter = name in self.blocks[index].get_submodule(parent)._parameters
        keeps = not (parameter and dtype.is_floating_point) or self.exact.intersection(
            path.split(".")
        )
        return dtype if keeps else self.rounding

    @contextmanager
    def materialized(self, model: nn.Module, blocks_name: str) -> Iterator[None]:
        """Inside, `save_pretrained` finds the blocks' weights, in the dtype they are saved in.

        It asks accelerate's hooks for what is on the meta device.
        """
        before = model.__dict__.get("hf_device_map")
        model._hf_hook = SimpleNamespace(weights_map=_Saved(self, f"{blocks_name}."))
        model.hf_device_map = {"": "cpu"}
        try:
            yield
        finally:
            del model._hf_hook
            del model.hf_device_map
            if before is not None:
                model.hf_device_map = before


class _Saved(Mapping):
    """The blocks' weights by their names in the model, as they are saved."""

    def __init__(self, placement: BlockPlacement, prefix: str) -> None:
        self.placement, self.prefix = placement, prefix

    def __getitem__(self, name: str) -> Tensor:
        if not name.startswith(self.prefix):
            raise KeyError(name)
        number, _, path = name.removeprefix(self.prefix).partition(".")
        index, placement = int(number), self.placement
        tensor = placement.store.tensor(index, path)
        return tensor.to(placement.saved_in(index, path, tensor.dtype))

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


def _views(memory: Tensor, slots: Slots) -> Fetched:
    return {path: slot.of(memory) for path, slot in slots.items()}, memory


def put(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or a buffer is; a parameter as it is."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    if name in owner._parameters:
        own = isinstance(tensor, nn.Parameter)
        owner._parameters[name] = tensor if own else nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def are_apart(blocks: nn.ModuleList) -> bool:
    """Whether every block has weights of its own."""
    parameters = [p for block in blocks for p in block.parameters()]
    return len(parameters) == len(set(parameters))


def check_apart(blocks: nn.ModuleList) -> None:
    """UserError where blocks share weights: one can't be fetched without the other."""
    if not are_apart(blocks):
        raise UserError("--offload: the model's blocks share weights; it must fit in memory")


def device_map(
    model: nn.Module, blocks_name: str, device: torch.device, place: str
) -> dict[str, str | int]:
    """For from_pretrained: every block at `place` (`cpu` or `disk`), all the rest on `device`."""
    here = "cpu" if device.type == "cpu" else device.index  # what accelerate and safetensors take
    where: dict[str, str | int] = {}
    above = {blocks_name}
    while (parent := blocks_name.rpartition(".")[0]) not in above:
        above.add(parent)
        blocks_name = parent
    for name in sorted(above):
        module = model.get_submodule(name)
        for own, _ in (*module.named_parameters("", False), *module.named_buffers("", False)):
            where[f"{name}.{own}".strip(".")] = here
        for child, _ in module.named_children():
            path = f"{name}.{child}".strip(".")
            if path not in above:
                where[path] = place if isinstance(module, nn.ModuleList) else here
    return where
