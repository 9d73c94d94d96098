"""The weights of a model's decoder blocks: one class has them, wherever they are.

Where the model is whole on its device, it holds them itself. Where there is no room, or where
several processes of a machine work on one model, the blocks stay in safetensors files that the
system maps into memory: files of the checkpoint as long as a block is not changed, then files in a
work folder (lib/model/work_folder.py). Their pages are in memory once for all processes of the
machine. A block that is away has its weights on the meta device; it is brought once for all
windows, and a forward pass of the model itself brings each block as it comes to it.

Under `--resume` every finished block is kept in a file of that kind, whoever has the weights.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lib.distributed.context import DistContext
from lib.model.linears import find_linears
from lib.model.staging import Staging
from lib.model.work_folder import WorkFolder
from lib.packed.linear import SparseLinear
from lib.util.errors import UserError

META = torch.device("meta")
WRITING = 2e7  # bytes a second, at least, of blocks that are written


@dataclass(frozen=True)
class Place:
    """Where a tensor is on disk, and the dtype in which the model computes with it."""

    file: str
    name: str  # in the file
    dtype: torch.dtype


@dataclass
class BlockFiles:
    """The files of a model whose blocks stay there, as its processes on one machine share them.

    `places`: {path in the block: place} of each block. `scratch`: the folder for blocks that are
    changed. `owner`: the rank of the process that writes there. `in_memory`: there is room for the
    pages of all blocks, so that they need not be read again.
    """

    places: list[dict[str, Place]]
    scratch: WorkFolder
    owner: int
    in_memory: bool


class BlockWeights:
    """The weights of `blocks`, which are brought to `device` one at a time.

    `files`: where they are, None for a model that is whole on the device. `rounding`: the dtype in
    which the model is saved, but for what its class keeps in another (`exact`, parts of names).
    `finished`: the work folder of `--resume`, in the main process of `dist`; `resumes`: whether
    that has one.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        device: torch.device,
        files: BlockFiles | None = None,
        rounding: torch.dtype | None = None,
        exact: frozenset[str] = frozenset(),
        finished: WorkFolder | None = None,
        resumes: bool = False,
        dist: DistContext | None = None,
    ) -> None:
        self.blocks, self.device, self.files = blocks, device, files
        self.rounding, self.exact = rounding, exact
        self.finished, self.resumes = finished, resumes
        self.dist = dist or DistContext(device, alone=True)
        self._finished_block: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._kept = False  # the block on the device is the one in the folder of --resume
        self._versions: dict[int, int] = {}  # how often each block was written as scratch
        self._writes = files is not None and files.owner == self.dist.rank
        if files is None:
            return
        # modules that the model came with: their buffers stay on the device
        self._original = weakref.WeakSet(module for block in blocks for module in block.modules())
        self._staging = Staging(device) if device.type == "cuda" else None
        for index, block in enumerate(blocks):
            self._offload(block)
            block.forward = self._fetching_forward(index, block)

    @property
    def resident(self) -> bool:
        """Whether the model holds all weights itself."""
        return self.files is None

    @property
    def zero_copy(self) -> bool:
        """Whether bringing a block that is not changed costs nothing."""
        if self.files is None:
            return True
        if self.device.type != "cpu" or not self.files.in_memory:
            return False
        return all(
            tensor.dtype == places[path].dtype
            for index, places in enumerate(self.files.places)
            for path, tensor in self._read(index).items()
        )

    @contextmanager
    def on_device(self, index: int, write_back: bool = False) -> Iterator[None]:
        """Inside, block `index` is on the device, and the next one is on its way to a GPU.

        With `write_back` changes of its weights are kept; every process has to call it then: each
        waits for all.
        """
        if write_back:
            self._kept = False
        if self.files is None:
            yield
            return
        block = self.blocks[index]
        forward = block.__dict__.pop("forward")  # its own is the class's, also for copies of it
        try:
            for path, tensor in self._fetch(index).items():
                set_tensor(block, path, tensor)
            self._prefetch(index + 1)
            yield
            if write_back:
                self._write(index)
        finally:
            self._offload(block)
            block.forward = forward

    def has(self, index: int) -> bool:
        """Whether an interrupted run has finished block `index`; every process has to call it."""
        if not self.resumes:
            return False
        if self.finished:
            name, then = _file_name(index), "its block is pruned again"
            self._finished_block = self.finished.read(name, then)
        return self.dist.all_gather_object(self._finished_block is not None)[0]

    def load(self, index: int) -> dict[str, Any]:
        """Put finished block `index`, for which `has` was asked just now, in place of the one on
        the device; return the notes that were saved with it."""
        tensors, facts = self._finished_block or ({}, {})
        header = {path: (tuple(one.shape), one.dtype) for path, one in tensors.items()}
        header, facts = self.dist.all_gather_object((header, facts))[0]
        block = self.blocks[index]
        quantised = {
            linear.name: linear for linear in find_linears(block, "")[0] if linear.is_quantised
        }
        for path, (shape, dtype) in header.items():
            tensor = tensors[path] if tensors else torch.empty(shape, dtype=dtype)
            tensor = self.dist.broadcast_(tensor, 0)
            if f".{path}" in quantised:
                quantised[f".{path}"].set_weight_(tensor)
            else:
                own = block.get_parameter(path)
                if own.shape == tensor.shape:
                    own.data.copy_(tensor)
                else:  # it has lost rows or columns
                    own.data = tensor.to(own.device, own.dtype)
        self._finished_block, self._kept = None, True
        return facts

    def save(
        self, index: int, notes: Mapping[str, Any], matrices: Mapping[str, Tensor] | None = None
    ) -> None:
        """Under `--resume` keep block `index`, which is on the device, with its notes.

        `matrices`: {path of a quantised linear: its weight as it was solved}. The main process
        writes; all wait for it.
        """
        if not self.resumes:
            return
        if self.finished:
            quantised = {f"{path}.weight" for path in matrices or ()}
            held = dict(matrices or {})
            for path, tensor in self._tensors(index):
                if path not in quantised:
                    held[path] = self._narrowed(index, path, tensor)
            self.finished.write(_file_name(index), held, notes, f"block {index}")
        self._kept = True
        self.dist.barrier()

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Inside, the blocks have their weights as these are saved, so that `save_pretrained` finds
        them: mapped from their files, and in memory only while they are read."""
        for index, places in enumerate(self.files.places if self.files else ()):
            for path, tensor in self._read(index).items():
                dtype = self._saved_dtype(index, path, places[path].dtype)
                set_tensor(self.blocks[index], path, tensor.to(dtype))
        try:
            yield
        finally:
            for index, places in enumerate(self.files.places if self.files else ()):
                for path, place in places.items():
                    empty = torch.empty_like(_tensor(self.blocks[index], path), device=META)
                    set_tensor(self.blocks[index], path, empty.to(place.dtype))

    def _fetching_forward(self, index: int, block: nn.Module):
        own = block.forward

        def forward(*args, **kwargs):
            with self.on_device(index):
                return own(*args, **kwargs)

        return forward

    def _read(self, index: int) -> dict[str, Tensor]:
        """Tensors of block `index` by path, mapped, in the dtypes of their files."""
        by_file: dict[str, dict[str, str]] = defaultdict(dict)
        for path, place in self.files.places[index].items():
            by_file[place.file][path] = place.name
        tensors = {}
        for file, names in by_file.items():
            try:
                with safe_open(file, framework="pt") as stored:
                    tensors |= {path: stored.get_tensor(name) for path, name in names.items()}
            except (OSError, SafetensorError) as error:
                raise UserError(f"--model: block {index} can't be read from {file}: {error}") from (
                    error
                )
        return tensors

    def _fetch(self, index: int) -> dict[str, Tensor]:
        """Tensors of block `index` on the device, in the dtypes that the model computes with."""
        if self._staging:
            tensors = self._staging.take(index)
            if tensors is None:
                self._prefetch(index)
                tensors = self._staging.take(index)
            return tensors
        places = self.files.places[index]
        return {path: one.to(places[path].dtype) for path, one in self._read(index).items()}

    def _prefetch(self, index: int) -> None:
        if self._staging and index < len(self.blocks):
            dtypes = {path: place.dtype for path, place in self.files.places[index].items()}
            self._staging.send(index, self._read(index), dtypes)

    def _write(self, index: int) -> None:
        """Keep the block that is on the device in a file, from which it is read from now on."""
        files, kept = self.files, self.finished and self._kept
        tensors = dict(self._tensors(index))
        places = old = None
        if self._writes:
            if kept:
                file = self.finished.folder / f"{_file_name(index)}.safetensors"
            else:
                number = self._versions.get(index, 0)
                self._versions[index] = number + 1
                old = files.scratch.folder / f"block-{index}-{number - 1}.safetensors"
                narrowed = {path: self._narrowed(index, path, one) for path, one in tensors.items()}
                name, what = f"block-{index}-{number}", f"block {index}"
                file = files.scratch.write(name, narrowed, {}, what)
            places = {path: Place(str(file), path, one.dtype) for path, one in tensors.items()}
        self.dist.barrier(sum(one.nbytes for one in tensors.values()) / WRITING)
        files.places[index] = self.dist.all_gather_object(places)[files.owner]
        if old:
            old.unlink(missing_ok=True)

    def _tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Path and tensor of all that makes up the block on the device."""
        for name, module in self.blocks[index].named_modules():
            if self.files is None or module in self._original:
                own = {key: one.data for key, one in module.named_parameters(recurse=False)}
            else:  # came in its place, as packed linears do: all of it
                own = {key: one for key, one in module.state_dict().items() if "." not in key}
            for key, tensor in own.items():
                yield f"{name}.{key}".strip("."), tensor

    def _offload(self, block: nn.Module) -> None:
        """Leave the block's modules without weights."""
        for module in list(block.modules()):
            if module in self._original:
                if isinstance(module, SparseLinear) and not module.weight.is_meta:
                    module.to(self.device)  # packs again what torch's own tensor holds
                for name, one in module.named_parameters(recurse=False):
                    set_tensor(module, name, one.to(META))
            elif not list(module.children()):
                module.to(META)

    def _narrowed(self, index: int, path: str, tensor: Tensor) -> Tensor:
        """In the dtype in which it is saved, where that loses nothing."""
        narrow = tensor.to(self._saved_dtype(index, path, tensor.dtype))
        same = narrow.dtype == tensor.dtype or torch.equal(narrow.to(tensor.dtype), tensor)
        return narrow if same else tensor

    def _saved_dtype(self, index: int, path: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of block `index`, of `dtype`, is saved."""
        parent, _, name = path.rpartition(".")
        parameter = name in self.blocks[index].get_submodule(parent)._parameters
        keeps = not (parameter and dtype.is_floating_point) or self.exact.intersection(
            path.split(".")
        )
        return dtype if keeps or self.rounding is None else self.rounding


def set_tensor(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or a buffer is; a parameter as it is."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    if name in owner._parameters:
        own = isinstance(tensor, nn.Parameter)
        owner._parameters[name] = tensor if own else nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _tensor(module: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name).detach()


def _file_name(index: int) -> str:
    return f"block-{index:05d}"
