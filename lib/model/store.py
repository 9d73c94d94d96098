"""The weights of a model's decoder blocks: on the device, or in files from which they are fetched.

A resident model holds its weights itself. If there is no room, or if several ranks of a machine
work on one model, the blocks stay in safetensors files that the system maps into memory: files of
the checkpoint until a block is changed, then files in a run's folder (lib/model/run_folder.py),
whose pages are in memory once for all ranks of the machine. A block that is not on the device has
its weights on the meta device. It is fetched once for all windows; a forward pass of the model
itself fetches each block when it reaches it.

Every finished block is also kept in such a file where the run can be continued.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.distributed.context import DistContext
from lib.model.linears import find_linears
from lib.model.run_folder import CONVERTED, RunFolder
from lib.model.transfer import empty_pinned, wait_for_older
from lib.packed.linear import SparseLinear
from lib.util.errors import UserError

META = torch.device("meta")
ALIGNED = 512  # bytes; tensors begin at multiples of it, as in torch's allocator


@dataclass(frozen=True)
class Place:
    """Where a tensor is on disk, and the dtype in which the model computes with it."""

    file: str
    name: str  # in the file
    dtype: torch.dtype


@dataclass
class Files:
    """{path in the block: place} of each block, and where this machine writes changed blocks."""

    places: list[dict[str, Place]]
    folder: RunFolder | None  # None in ranks that do not write
    on_disk: bool  # the pages of all blocks do not fit in memory
    narrow: bool = False  # weights are rounded to the dtype in which they are saved


class BlockStore:
    """Fetches the weights of `blocks` to `device`, one block at a time, and keeps finished ones.

    `name`: of the blocks in the model. `files`: None for a resident model. `save_dtype`: the dtype
    in which the model is saved, except for modules that its class keeps in float32 (`exact`, parts
    of their names). `finished`: where finished blocks are kept, in the main rank of `dist` alone;
    `resumes` says in every rank whether there is such a folder.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        device: torch.device,
        name: str = "",
        *,
        files: Files | None = None,
        save_dtype: torch.dtype | None = None,
        exact: frozenset[str] = frozenset(),
        finished: RunFolder | None = None,
        resumes: bool = False,
        dist: DistContext | None = None,
    ) -> None:
        self.blocks, self.device, self.name, self.files = blocks, device, name, files
        self.save_dtype, self.exact = save_dtype, exact
        self.finished, self.resumes = finished, resumes
        self.dist = dist or DistContext(device, alone=True)
        self._kept: Path | None = None  # the file that holds the block on the device
        if files is None:
            return
        # modules that the model came with: their buffers stay on the device
        self._original = weakref.WeakSet(module for block in blocks for module in block.modules())
        self._ahead = Prefetcher(device, self._read) if device.type != "cpu" else None
        self._zero_copy: bool | None = None
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
        if self._zero_copy is None:
            on_cpu = self.device.type == "cpu" and not self.files.on_disk
            self._zero_copy = on_cpu and all(
                tensor.dtype == places[path].dtype
                for index, places in enumerate(self.files.places)
                for path, tensor in self._read(index)[0].items()
            )
        return self._zero_copy

    @contextmanager
    def on_device(self, index: int, write_back: bool = False) -> Iterator[None]:
        """Inside, block `index` is on the device, and the next one is being copied to a GPU.

        With `write_back`, changes of its weights are kept, and every rank must call this, since
        each waits for all.
        """
        if write_back:
            self._kept = None
        if self.files is None:
            yield
            return
        block = self.blocks[index]
        forward = block.__dict__.pop("forward")  # its own is the class's, also for copies of it
        try:
            ahead = self._ahead
            tensors, dtypes = ahead.take(index, len(self.blocks)) if ahead else self._read(index)
            for path, tensor in tensors.items():
                set_tensor(block, path, tensor.to(dtypes[path]))
            yield
            if write_back:
                self._write(index)
        finally:
            self._offload(block)
            block.forward = forward

    def restore(self, index: int, stage: str = "block") -> dict[str, Any] | None:
        """Replace the block on the device by the one that an interrupted run finished.

        Returns its notes; None where it is not finished. Every rank must call this.
        """
        kept = self.read_kept(_file_name(stage, index))
        if kept is None:
            return None
        tensors, facts = kept
        block, prefix = self.blocks[index], self._prefix(index)
        quantised = {
            linear.name: linear for linear in find_linears(block, "")[0] if linear.is_quantised
        }
        for name, tensor in tensors:
            path = name.removeprefix(prefix)
            if f".{path}" in quantised:
                quantised[f".{path}"].set_weight_(tensor)
            else:
                parameter = block.get_parameter(path)
                if parameter.shape == tensor.shape:
                    parameter.data.copy_(tensor)
                else:  # it has lost rows or columns
                    parameter.data = tensor.to(parameter.device, parameter.dtype)
        if self.finished:
            self._kept = self.finished.folder / f"{_file_name(stage, index)}.safetensors"
        return facts

    def read_kept(self, name: str) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]] | None:
        """Return tensors by name, one after another, and facts of a file of an interrupted run.

        None where there is none. Every rank must call this, and take all tensors or none.
        """
        if not self.resumes:
            return None
        kept = self.finished.read(name) if self.finished else None
        tensors, facts = kept or ({}, None)
        header = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        header, facts = self.dist.all_gather_object((header, facts))[0]
        if facts is None:
            return None
        return self._broadcast(tensors, header), facts

    def _broadcast(
        self, tensors: Mapping[str, Tensor], header: Mapping[str, tuple[tuple, torch.dtype]]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, (shape, dtype) in header.items():
            tensor = tensors[name] if tensors else torch.empty(shape, dtype=dtype)
            yield name, self.dist.broadcast_(tensor, 0)

    def save(
        self,
        index: int,
        notes: Mapping[str, Any],
        matrices: Mapping[str, Tensor] | None = None,
        stage: str = "block",
    ) -> None:
        """Keep block `index`, which is on the device, with its notes, if the run can be continued.

        `matrices` holds {path of a quantised linear: its solved weight}. The main rank writes, and
        all wait for it.
        """
        if not self.resumes:
            return
        if self.finished:
            quantised = {f"{path}.weight" for path in matrices or ()}
            held = dict(matrices or {}) | {
                path: self._narrowed(index, path, tensor)
                for path, tensor in self._tensors(index)
                if path not in quantised
            }
            named = {self._prefix(index) + path: tensor for path, tensor in held.items()}
            self._kept = self.finished.write(_file_name(stage, index), named, notes)
        self.dist.barrier()

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Inside, the blocks have their weights in the saved dtype, for `save_pretrained`.

        They are mapped from their files, and in memory only while they are read.
        """
        for index, places in enumerate(self.files.places if self.files else ()):
            for path, tensor in self._read(index)[0].items():
                dtype = self._saved_dtype(index, path, places[path].dtype)
                set_tensor(self.blocks[index], path, tensor.to(dtype))
        try:
            yield
        finally:
            for index, places in enumerate(self.files.places if self.files else ()):
                for path, place in places.items():
                    parent, _, name = path.rpartition(".")
                    owner = self.blocks[index].get_submodule(parent)
                    empty = torch.empty_like(getattr(owner, name), device=META, dtype=place.dtype)
                    set_tensor(owner, name, empty)

    def shards(self) -> dict[Path, list[str]] | None:
        """Return {file of a block: names of its tensors}, if each block has a file of this run.

        Such files can become those of a saved model. None for a resident model.
        """
        shards: dict[Path, list[str]] = {}
        for index, places in enumerate(self.files.places if self.files else ()):
            files = {place.file for place in places.values()}
            file, prefix = Path(next(iter(files))), self._prefix(index)
            named = all(place.name == prefix + path for path, place in places.items())
            if not self.files.folder or len(files) > 1 or not named:
                return None
            if file.parent != self.files.folder.folder:
                return None
            shards[file] = [place.name for place in places.values()]
        return shards or None

    def wait_for_readers(self) -> None:
        """Wait until no rank reads blocks any longer: their files may then be moved."""
        if self.files and self._ahead:
            self._ahead.forget()
        self.dist.barrier()

    def moved(self, files: Mapping[str, str]) -> None:
        """Read blocks from where their files are now, {old path: new path}; for every rank."""
        for places in self.files.places if self.files else ():
            for path, place in places.items():
                places[path] = replace(place, file=files.get(place.file, place.file))

    def _prefix(self, index: int) -> str:
        return f"{self.name}.{index}."

    def _fetching_forward(self, index: int, block: nn.Module) -> Callable:
        original = block.forward

        def forward(*args, **kwargs):
            with self.on_device(index):
                return original(*args, **kwargs)

        return forward

    def _read(self, index: int) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """Map the tensors of block `index`, by path, in the dtypes of their files.

        The second value are the dtypes in which the model computes with them.
        """
        places = self.files.places[index]
        by_file: dict[str, dict[str, str]] = defaultdict(dict)
        for path, place in places.items():
            by_file[place.file][path] = place.name
        tensors = {}
        for file, names in by_file.items():
            try:
                with safe_open(file, framework="pt") as stored:
                    tensors |= {path: stored.get_tensor(name) for path, name in names.items()}
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"--model: block {index} can't be read from {file}: {error}"
                ) from error
        if self.files.narrow:
            tensors = {
                path: tensor.to(self._saved_dtype(index, path, tensor.dtype))
                for path, tensor in tensors.items()
            }
        return tensors, {path: place.dtype for path, place in places.items()}

    def _write(self, index: int) -> None:
        """Write the block on the device to a file, from which it is read from now on."""
        tensors, folder = dict(self._tensors(index)), self.files.folder
        prefix, places = self._prefix(index), None
        if folder:
            file = self._kept
            if file is None or file.parent != folder.folder:
                narrowed = {
                    prefix + path: self._narrowed(index, path, value)
                    for path, value in tensors.items()
                }
                file = folder.write(_file_name("changed", index), narrowed, {})
            places = {
                path: Place(str(file), prefix + path, value.dtype)
                for path, value in tensors.items()
            }
        owner = self.dist.rank - self.dist.local_rank
        self.files.places[index] = self.dist.all_gather_object(places)[owner]
        self._zero_copy = None
        if self._ahead:
            self._ahead.forget(index)

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
        return dtype if keeps or self.save_dtype is None else self.save_dtype


class Prefetcher:
    """Copies blocks to a GPU while the block before computes, at most one block ahead.

    A thread reads the next block from its files into one of two pinned buffers, from which it is
    copied in one piece on a stream of its own. Three blocks are on the GPU at most: one that
    computes, one whose work is queued, and one that arrives.
    """

    def __init__(self, device: torch.device, read: Callable) -> None:
        self.device, self.read = device, read
        self.side = torch.Stream(device)
        self.thread = ThreadPoolExecutor(1)
        self.buffers: list[Tensor | None] = [None, None]  # (bytes,)
        self.copied: list[torch.Event | None] = [None, None]  # when each buffer was copied
        self.turn = 0
        self.last = -1
        self.pending: tuple[int, Future] | None = None
        self.computed: deque[torch.Event] = deque()  # the ends of blocks that were taken

    def take(self, index: int, count: int) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """Return what `read` gives of block `index`, on the device, and bring the next block."""
        pending, self.pending = self.pending, None
        if pending is None or pending[0] != index:
            if pending:
                pending[1].result()  # its buffer is in use until then
            pending = index, self.thread.submit(self._bring, index)
        views, dtypes, piece = pending[1].result()
        stream = torch.accelerator.current_stream(self.device)
        wait_for_older(self.computed, stream, ahead=1)
        stream.wait_stream(self.side)
        piece.record_stream(stream)  # or its memory is reused too early
        following = index - 1 if self.last == index + 1 else index + 1  # in either direction
        self.last = index
        if 0 <= following < count:
            self.pending = following, self.thread.submit(self._bring, following)
        return views, dtypes

    def forget(self, index: int | None = None) -> None:
        """Drop the block that was brought if it is `index`, whose file has changed; None: any."""
        if self.pending and index in (None, self.pending[0]):
            self.pending[1].result()
            self.pending = None

    def _bring(self, index: int) -> tuple[dict[str, Tensor], dict[str, torch.dtype], Tensor]:
        tensors, dtypes = self.read(index)
        starts, end = {}, 0
        for path, tensor in tensors.items():
            starts[path] = end
            end += -(-tensor.numel() * dtypes[path].itemsize // ALIGNED) * ALIGNED
        self.turn = 1 - self.turn
        if self.copied[self.turn]:
            self.copied[self.turn].synchronize()
        buffer = self.buffers[self.turn]
        if buffer is None or len(buffer) < end:
            buffer = self.buffers[self.turn] = empty_pinned((end,), torch.uint8)

        def view(memory: Tensor, path: str) -> Tensor:
            shape, dtype = tensors[path].shape, dtypes[path]
            size = prod(shape) * dtype.itemsize
            return memory[starts[path] : starts[path] + size].view(dtype).view(shape)

        for path, tensor in tensors.items():
            view(buffer, path).copy_(tensor)
        with self.side:
            piece = buffer[:end].to(self.device, non_blocking=True)
            self.copied[self.turn] = self.side.record_event()
        return {path: view(piece, path) for path in tensors}, dtypes, piece


def _file_name(stage: str, index: int) -> str:
    return f"{stage}-{index:05d}"


def set_tensor(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer; a tensor that is no parameter is wrapped in one."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    if name in owner._parameters:
        wrapped = isinstance(tensor, nn.Parameter)
        owner._parameters[name] = tensor if wrapped else nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def are_apart(blocks: nn.ModuleList) -> bool:
    """Return whether no two blocks share weights: else one can't be fetched without the other."""
    parameters = [p for block in blocks for p in block.parameters()]
    return len(parameters) == len(set(parameters))


def place_blocks(
    model: nn.Module, name: str, stored: Mapping[str, str], folder: Path
) -> list[dict[str, Place]]:
    """Return {path: place} for each of the blocks `name`, which transformers has left on disk.

    They are mapped from the checkpoint's own files, `stored` as {name: file}; only weights that
    transformers converted on loading, such as fused experts, lie in `folder`. The model's hooks,
    which would fetch them, are removed.
    """
    places: list[dict[str, Place]] = []
    for index, block in enumerate(model.get_submodule(name)):
        places.append({})
        for path, parameter in block.named_parameters():
            full = f"{name}.{index}.{path}"
            file = str(folder / CONVERTED / f"{full}.safetensors")
            if not Path(file).exists():
                if full in stored:
                    file = stored[full]
                else:  # the checkpoint has it under another name
                    module = model.get_submodule(full.rpartition(".")[0])
                    with align_module_device(module, torch.device("cpu")):
                        save_file({full: model.get_parameter(full).data.contiguous()}, file)
            places[-1][path] = Place(file, full, parameter.dtype)
    for module in model.modules():
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)  # accelerate leaves its wrapper in each module
    model.__dict__.pop("hf_device_map", None)  # nothing of it is left
    return places


def device_map(model: nn.Module, blocks_name: str, device: torch.device) -> dict[str, str]:
    """Return the map for from_pretrained: every block on disk, everything else on `device`."""
    where: dict[str, str] = {}
    above = {blocks_name}
    while (parent := blocks_name.rpartition(".")[0]) not in above:
        above.add(parent)
        blocks_name = parent
    for name in sorted(above):
        module = model.get_submodule(name)
        for key, _ in (*module.named_parameters("", False), *module.named_buffers("", False)):
            where[f"{name}.{key}".strip(".")] = str(device)
        for child, _ in module.named_children():
            path = f"{name}.{child}".strip(".")
            if path not in above:
                where[path] = "disk" if isinstance(module, nn.ModuleList) else str(device)
    return where
