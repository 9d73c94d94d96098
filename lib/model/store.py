"""The weights of a model's decoder blocks, all on the device.

lib/offload/store.py has the store whose blocks are in files. Both store every finished block in a
file if the run can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..packed.linear import SparseLinear
from ..util.ranks import DistContext
from ..util.resume import PRUNED, RunFolder, of_block
from .linears import find_linears
from .matrix import SaveDtypes
from .skeleton import decoder_blocks


class BlockStore:
    """The blocks of a model that holds all its weights itself.

    `save_dtype`: the dtype in which the model is saved (None: unchanged). `finished`: the folder
    for finished blocks, only in the main rank of `dist`; `resumes` is true in every rank if there
    is one.
    """

    resident = True  # all weights are on the device
    zero_copy = True  # fetching an unchanged block costs nothing
    collective = False  # whether all ranks must fetch a block at the same time

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        save_dtype: torch.dtype | None = None,
        finished: RunFolder | None = None,
        dist: DistContext | None = None,
    ) -> None:
        self.name, self.blocks = decoder_blocks(model)
        self.device, self.finished = device, finished
        self.saved = SaveDtypes(model, save_dtype)
        self.dist = dist or DistContext(device, alone=True)
        self.resumes = any(self.dist.all_gather_object(finished is not None))
        self._kept: Path | None = None  # file of the block on the device

    @contextmanager
    def on_device(self, index: int, write_back: bool = False) -> Iterator[None]:
        """Keep block `index` on the device within this context.

        With `write_back`, changes of its weights are kept. Every rank must then call this, since
        each waits for all.
        """
        yield

    def get(self, index: int, prefix: str = PRUNED) -> dict[str, Any] | None:
        """Replace the block on the device by the one that an interrupted run finished.

        Returns its notes; None if it is not finished. Every rank must call this.
        """
        file = of_block(prefix, index)
        kept = self.read_kept(file)
        if kept is None:
            return None
        tensors, notes = kept
        block, within = self.blocks[index], self._prefix(index)
        linears, _ = find_linears(block, f"{self.name}.{index}")
        quantized = {linear.name: linear for linear in linears if linear.is_quantized}
        for name, tensor in tensors:
            if name in quantized:
                quantized[name].set_weight_(tensor)
            else:  # its shape may be smaller
                parameter = block.get_parameter(name.removeprefix(within))
                parameter.data = tensor.to(parameter.device, parameter.dtype, copy=True)
        if self.finished:
            self._kept = self.finished.path / f"{file}.safetensors"
        return notes

    def put(
        self,
        index: int,
        notes: Mapping[str, Any],
        matrices: Mapping[str, Tensor] | None = None,
        prefix: str = PRUNED,
    ) -> None:
        """Store block `index`, which is on the device, with its notes, if the run can be resumed.

        `matrices` holds {path of a quantized layer: its solved weight}. The main rank writes, and
        all wait for it.
        """
        if not self.resumes:
            return
        if self.finished:
            within, held = self._prefix(index), self._to_keep(index)
            for path, matrix in (matrices or {}).items():
                held.pop(f"{within}{path}.weight")
                held[within + path] = matrix
            self._kept = self.finished.write(of_block(prefix, index), held, notes)
        self.dist.barrier()

    def read_kept(self, name: str) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]] | None:
        """Return tensors by name, one after another, and facts from a file of an interrupted run.

        None if there is none. Every rank must call this, and take all tensors or none.
        """
        if not self.resumes:
            return None
        tensors, facts = (self.finished and self.finished.read(name)) or ({}, None)
        header = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        header, facts = self.dist.all_gather_object((header, facts))[0]

        def broadcast() -> Iterator[tuple[str, Tensor]]:
            for name, (shape, dtype) in header.items():
                tensor = tensors[name] if tensors else torch.empty(shape, dtype=dtype)
                yield name, self.dist.broadcast_(tensor, 0)

        return None if facts is None else (broadcast(), facts)

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Give the blocks their weights, for `save_pretrained`."""
        yield

    def shards(self) -> dict[Path, list[str]] | None:
        """Return {file of a block: names of its tensors} if all files can be shards of a model."""
        return None

    def moved(self, files: Mapping[str, str]) -> None:
        """Read saved blocks from {old path: new path}; every rank must call this."""

    def _prefix(self, index: int) -> str:
        return f"{self.name}.{index}."

    def _held(self, index: int) -> dict[str, Tensor]:
        """Return the weights of the block on the device, by path."""
        held: dict[str, Tensor] = dict(self.blocks[index].named_parameters())
        for name, module in self.blocks[index].named_modules():
            if isinstance(module, SparseLinear):  # has buffers too
                held |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return held

    def _to_keep(self, index: int) -> dict[str, Tensor]:
        """Return the weights by name, in the dtype in which they are saved if that is lossless."""
        kept = {}
        for path, tensor in self._held(index).items():
            narrow = self._as_saved(index, path, tensor)
            same = narrow is tensor or torch.equal(narrow.to(tensor.dtype), tensor)
            kept[self._prefix(index) + path] = narrow if same else tensor
        return kept

    def _as_saved(self, index: int, path: str, tensor: Tensor) -> Tensor:
        """Return a parameter or a buffer of block `index` in the dtype in which it is saved."""
        parent, _, name = path.rpartition(".")
        owner = self.blocks[index].get_submodule(parent)
        if name not in dict(owner.named_parameters(recurse=False)):
            return tensor
        return tensor.to(self.saved.of(self._prefix(index) + path, tensor))


def set_tensor(module: nn.Module, path: str, tensor: Tensor) -> Tensor:
    """Replace a parameter or buffer, and return the old one."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    before = getattr(owner, name)
    if isinstance(before, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, name, tensor)
    return before
