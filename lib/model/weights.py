"""The weights of a model's decoder blocks, on the device or in files, behind one class.

A resident model holds its weights itself. If there is no room, or if several processes of a machine
work on one model, the blocks stay in safetensors files that the system maps into memory: files of
the checkpoint until a block is changed, then files in a work folder (lib/model/work_folder.py).
Their pages are in memory once for all processes of the machine. A block that is not on the device
has its weights on the meta device. It is fetched once for all windows; a forward pass of the model
itself fetches each block when it reaches it.

Under `--resume` every finished block is also kept in such a file, for resident models too.
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
WRITING = 2e7  # bytes per second, at least, at which blocks are written


@dataclass(frozen=True)
class Place:
    """Where a tensor is on disk, and the dtype in which the model computes with it."""

    file: str
    name: str  # in the file
    dtype: torch.dtype


@dataclass
class BlockFiles:
    """The files of a model's blocks, which the processes of one machine may share.

    `places` holds {path in the block: place} for each block. `scratch` is the folder for changed
    blocks, `owner` the rank of the process that writes there. `in_memory` says that the pages of
    all blocks fit in memory, so that they are read from disk once.
    """

    places: list[dict[str, Place]]
    scratch: WorkFolder
    owner: int
    in_memory: bool


class BlockWeights:
    """Fetches the weights of `blocks` to `device`, one block at a time, and saves them.

    `files` are the files of the blocks, None for a resident model. `rounding` is the dtype in which
    the model is saved, except for modules that its class keeps in float32 (`exact`, parts of their
    names). `finished` is the work folder of `--resume`, in the main process of `dist` alone;
    `resumes` says in every process whether there is one.
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
        self.stage = "block"  # begins the names of the files of finished blocks
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
        """Whether fetching an unchanged block costs nothing."""
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
        """Inside, block `index` is on the device, and the next one is being copied to a GPU.

        With `write_back`, changes of its weights are kept, and every process must call this, since
        each waits for all.
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

    def restore(self, index: int, stage: str = "block") -> dict[str, Any] | None:
        """Replace the block on the device by the one that an interrupted run finished.

        Returns its notes; None where it is not finished. Every process must call it.
        """
        self.stage = stage
        return self.load(index) if self.has(index) else None

    def has(self, index: int) -> bool:
        """Return whether an interrupted run finished block `index`; every process must call it."""
        if not self.resumes:
            return False
        if self.finished:
            name, then = self._finished_name(index), "its block is computed again"
            self._finished_block = self.finished.read(name, then)
        return self.dist.all_gather_object(self._finished_block is not None)[0]

    def load(self, index: int) -> dict[str, Any]:
        """Replace the block on the device by finished block `index`; return its saved notes.

        `has(index)` must have been called just before.
        """
        tensors, facts = self._finished_block or ({}, {})
        header = {path: (tuple(value.shape), value.dtype) for path, value in tensors.items()}
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
                parameter = block.get_parameter(path)
                if parameter.shape == tensor.shape:
                    parameter.data.copy_(tensor)
                else:  # it has lost rows or columns
                    parameter.data = tensor.to(parameter.device, parameter.dtype)
        self._finished_block, self._kept = None, True
        return facts

    def save(
        self,
        index: int,
        notes: Mapping[str, Any],
        matrices: Mapping[str, Tensor] | None = None,
        stage: str = "block",
    ) -> None:
        """Under `--resume`, save block `index`, which is on the device, with its notes.

        `matrices` holds {path of a quantised linear: its solved weight}. The main process writes,
        and all wait for it.
        """
        self.stage = stage
        if not self.resumes:
            return
        if self.finished:
            quantised = {f"{path}.weight" for path in matrices or ()}
            held = dict(matrices or {})
            for path, tensor in self._tensors(index):
                if path not in quantised:
                    held[path] = self._narrowed(index, path, tensor)
            self.finished.write(self._finished_name(index), held, notes, f"block {index}")
        self._kept = True
        self.dist.barrier()

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Inside, the blocks have their weights in the saved dtype, for `save_pretrained`.

        They are mapped from their files, and in memory only while they are read.
        """
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
        original = block.forward

        def forward(*args, **kwargs):
            with self.on_device(index):
                return original(*args, **kwargs)

        return forward

    def _read(self, index: int) -> dict[str, Tensor]:
        """Map the tensors of block `index`, by path, in the dtypes of their files."""
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
        """Return the tensors of block `index` on the device, in the model's working dtypes."""
        if self._staging:
            tensors = self._staging.take(index)
            if tensors is None:
                self._prefetch(index)
                tensors = self._staging.take(index)
            return tensors
        places = self.files.places[index]
        return {path: value.to(places[path].dtype) for path, value in self._read(index).items()}

    def _prefetch(self, index: int) -> None:
        if self._staging and index < len(self.blocks):
            dtypes = {path: place.dtype for path, place in self.files.places[index].items()}
            self._staging.send(index, self._read(index), dtypes)

    def _write(self, index: int) -> None:
        """Write the block on the device to a file, from which it is read from now on."""
        files, kept = self.files, self.finished and self._kept
        tensors = dict(self._tensors(index))
        places = old = None
        if self._writes:
            if kept:
                file = self.finished.folder / f"{self._finished_name(index)}.safetensors"
            else:
                number = self._versions.get(index, 0)
                self._versions[index] = number + 1
                old = files.scratch.folder / f"block-{index}-{number - 1}.safetensors"
                narrowed = {
                    path: self._narrowed(index, path, value) for path, value in tensors.items()
                }
                name, what = f"block-{index}-{number}", f"block {index}"
                file = files.scratch.write(name, narrowed, {}, what)
            places = {path: Place(str(file), path, value.dtype) for path, value in tensors.items()}
        self.dist.barrier(sum(value.nbytes for value in tensors.values()) / WRITING)
        files.places[index] = self.dist.all_gather_object(places)[files.owner]
        if old:
            old.unlink(missing_ok=True)

    def _finished_name(self, index: int) -> str:
        return f"{self.stage}-{index:05d}"

    def _tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield path and tensor of every weight of the block on the device."""
        for name, module in self.blocks[index].named_modules():
            if self.files is None or module in self._original:
                state = {key: value.data for key, value in module.named_parameters(recurse=False)}
            else:  # a module that replaced another, such as a packed linear, has buffers too
                state = {key: value for key, value in module.state_dict().items() if "." not in key}
            for key, tensor in state.items():
                yield f"{name}.{key}".strip("."), tensor

    def _offload(self, block: nn.Module) -> None:
        """Move the weights of the block's modules to the meta device."""
        for module in list(block.modules()):
            if module in self._original:
                if isinstance(module, SparseLinear) and not module.weight.is_meta:
                    module.to(self.device)  # repacks the weight from torch's own sparse tensor
                for name, parameter in module.named_parameters(recurse=False):
                    set_tensor(module, name, parameter.to(META))
            elif not list(module.children()):
                module.to(META)

    def _narrowed(self, index: int, path: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype in which it is saved, if that loses nothing."""
        narrow = tensor.to(self._saved_dtype(index, path, tensor.dtype))
        same = narrow.dtype == tensor.dtype or torch.equal(narrow.to(tensor.dtype), tensor)
        return narrow if same else tensor

    def _saved_dtype(self, index: int, path: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor of block `index`, now of `dtype`, is saved."""
        parent, _, name = path.rpartition(".")
        parameter = name in self.blocks[index].get_submodule(parent)._parameters
        keeps = not (parameter and dtype.is_floating_point) or self.exact.intersection(
            path.split(".")
        )
        return dtype if keeps or self.rounding is None else self.rounding


def set_tensor(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer; a tensor that is no parameter is wrapped in one."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    if name in owner._parameters:
        wrapped = isinstance(tensor, nn.Parameter)
        owner._parameters[name] = tensor if wrapped else nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _tensor(module: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name).detach()
