"""Blocks in files, from which they come to the device one at a time.

A `FileBlockStore` is for too little memory, or for several ranks per machine. Its
blocks stay in memory-mapped safetensors files: those of the checkpoint until a block
is changed, then files in a run's folder (lib/util/resume.py). All ranks of a machine
share their pages. A block that is not on the device has its weights on the meta
device. It is fetched once for all windows. A forward pass of the model itself fetches
blocks one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..model.skeleton import decoder_blocks
from ..model.store import BlockStore, set_tensor
from ..packed.linear import SparseLinear
from ..util.errors import UserError
from ..util.resume import CHANGED, RunFolder, of_block

META = torch.device("meta")


class FileBlockStore(BlockStore):
    """Blocks in files, which come to the device one at a time.

    `model` was loaded by transformers with `device_map`. `folder`: where this machine writes
    changed blocks, None in other ranks. `on_disk`: whether the pages of all blocks do not fit in
    memory. cast_on_load: whether fetched weights are rounded to the dtype in which they are saved.
    `BlockStore` documents the other arguments.
    """

    resident = False

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        folder: RunFolder | None,
        on_disk: bool,
        cast_on_load: bool,
        **kept: Any,
    ) -> None:
        super().__init__(model, device, **kept)
        self.folder, self.on_disk, self.cast_on_load = folder, on_disk, cast_on_load
        self.places = self._stored()  # per block {path: (file, name in it)}
        for module in model.modules():
            remove_hook(module)
        del model.hf_device_map  # outdated
        for index, block in enumerate(self.blocks):
            add_hook_to_module(block, FetchHook(self, index))

    def of_copy(self, model: nn.Module) -> FileBlockStore:
        """Return a store of the same files for a copy of the model; changes affect neither."""
        other = copy.copy(self)
        other.blocks, other.places = decoder_blocks(model)[1], list(self.places)
        other.folder = other.finished = None
        other.resumes = False
        for index, block in enumerate(other.blocks):
            remove_hook_from_module(block)
            add_hook_to_module(block, FetchHook(other, index))
        return other

    @property
    def zero_copy(self) -> bool:
        """Whether fetching an unchanged block costs nothing."""
        return (self.device.type == "cpu" and not self.on_disk) and all(
            cast is tensor
            for index in range(len(self.blocks))
            for _, tensor, cast in self.each(index)
        )

    @contextmanager
    def on_device(self, index: int, write_back: bool = False) -> Iterator[None]:
        if write_back:
            self._kept = None
        block = self.blocks[index]
        remove_hook(block)  # copies of the block must not fetch
        try:
            self.fetch(index)
            yield
            if write_back:
                self._write(index)
        finally:
            self.evict(index)
            add_hook_to_module(block, FetchHook(self, index))

    def fetch(self, index: int) -> None:
        """Bring block `index` to the device."""
        for path, _, tensor in self.each(index):
            set_tensor(self.blocks[index], path, tensor.to(self.device))

    def evict(self, index: int) -> None:
        """Move the weights of block `index` to the meta device."""
        block = self.blocks[index]
        for module in block.modules():
            if isinstance(module, SparseLinear):  # move its buffers too
                module.to(META)
        for path, parameter in list(block.named_parameters()):
            set_tensor(block, path, parameter.to(META))

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Give the blocks their weights in the saved dtype, for `save_pretrained`.

        The weights are mapped from files, and in memory only while they are read.
        """
        with ExitStack() as emptied:
            for index, block in enumerate(self.blocks):
                for path, tensor in self._mapped(index).items():
                    before = set_tensor(block, path, self._as_saved(index, path, tensor))
                    emptied.callback(set_tensor, block, path, before)
            yield

    def shards(self) -> dict[Path, list[str]] | None:
        shards: dict[Path, list[str]] = {}
        for index, places in enumerate(self.places):
            file, *more = {Path(file) for file, _ in places.values()}
            if more or not self.folder or file.parent != self.folder.path:
                return None
            tensors = self._mapped(index)
            if any(self._as_saved(index, path, one) is not one for path, one in tensors.items()):
                return None
            shards[file] = [name for _, name in places.values()]
        return shards

    def moved(self, files: Mapping[str, str]) -> None:
        self.cast_on_load = True  # as in a saved model that stays in memory
        self.places = [
            {path: (files.get(file, file), name) for path, (file, name) in places.items()}
            for places in self.places
        ]

    def _stored(self) -> list[dict[str, tuple[str, str]]]:
        """Return where transformers left the weights on disk, from the hooks that it would use.

        Weights are in the checkpoint's own files. Weights converted on loading, such as fused
        experts, are in its folder for them.
        """
        hooks = (getattr(module, "_hf_hook", None) for module in self.blocks.modules())
        index = next(hook.weights_map for hook in hooks if hook and hook.weights_map).dataset.index
        places: list[dict[str, tuple[str, str]]] = []
        for number, block in enumerate(self.blocks):
            prefix = self._prefix(number)
            entries = ((path, index[prefix + path]) for path, _ in block.named_parameters())
            places.append(
                {path: (one["safetensors_file"], one["weight_name"]) for path, one in entries}
            )
        return places

    def _mapped(self, index: int) -> dict[str, Tensor]:
        """Map the tensors of block `index`, by path, in the dtypes of their files."""
        places, tensors = self.places[index], {}
        for file in sorted({file for file, _ in places.values()}):
            names = {path: name for path, (stored_in, name) in places.items() if stored_in == file}
            try:
                with safe_open(file, framework="pt") as stored:
                    tensors |= {path: stored.get_tensor(name) for path, name in names.items()}
            except (OSError, SafetensorError) as error:
                problem = f"block {index} cannot be read from {file} ({error})"
                raise UserError("--model", problem, "Check the disk") from error
        return tensors

    def each(
        self, index: int, part: Callable[[str, Tensor], Tensor] = lambda path, tensor: tensor
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield path, tensor in its file, and tensor in the model's compute dtype.

        If only a `part(path, tensor)` is wanted, no more is read.
        """
        block = self.blocks[index]
        empty = dict((*block.named_parameters(), *block.named_buffers()))
        for path, tensor in self._mapped(index).items():
            tensor = part(path, tensor)
            narrow = self._as_saved(index, path, tensor) if self.cast_on_load else tensor
            yield path, tensor, narrow.to(empty[path].dtype)

    def _write(self, index: int) -> None:
        """Write the block on the device to a file, from which it is read afterwards."""
        places = None
        if self.folder:
            file, prefix = self._kept, self._prefix(index)
            if file is None:
                file = self.folder.write(of_block(CHANGED, index), self._to_keep(index), {})
            places = {path: (str(file), prefix + path) for path in self._held(index)}
        owner = self.dist.rank - self.dist.local_rank
        self.places[index] = self.dist.all_gather_object(places)[owner]


class TrainedStore(FileBlockStore):
    """The blocks of a store of files while they are trained: they are copies of these, `twins`.

    The model's own blocks are empty except inside `on_device`.
    """

    zero_copy = False
    twins: nn.ModuleList

    def __init__(self, files: FileBlockStore) -> None:
        vars(self).update(vars(files))  # shares the list `places`, which `close` writes
        self.files = files

    def empty_twin(self, index: int) -> nn.Module:
        """Return a copy of a block without weights."""
        twin = copy.deepcopy(self.blocks[index])
        remove_hook(twin)
        return twin

    def close(self, write_back: bool) -> None:
        """Let the model fetch its blocks from the files; `write_back`: as they are here."""
        for index, block in enumerate(self.blocks):
            if write_back:
                with self.on_device(index, write_back=True):
                    for parameter in block.parameters():  # FSDP cannot free what numpy has seen
                        parameter.data = parameter.data.clone()
            remove_hook_from_module(block)
            add_hook_to_module(block, FetchHook(self.files, index))


class FetchHook(ModelHook):
    """Keeps a block on the device while the model's own forward pass runs it."""

    def __init__(self, store: FileBlockStore, index: int) -> None:
        self.store, self.index = store, index

    def __deepcopy__(self, memo: dict) -> FetchHook:  # a model's copy has the same files
        return self

    def pre_forward(self, module: nn.Module, *args, **kwargs) -> tuple[tuple, dict]:
        self.store.fetch(self.index)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.store.evict(self.index)
        return output


def remove_hook(module: nn.Module) -> None:
    """Remove accelerate's hook of a module, and the `forward` that it leaves.

    That is a cycle: a copy of the module would stay on the device until garbage is collected.
    """
    remove_hook_from_module(module)
    vars(module).pop("forward", None)


def device_map(model: nn.Module, name: str, device: torch.device) -> dict[str, str]:
    """Return the map for from_pretrained: the blocks `name` on disk, all else on `device`."""
    where = {f"{name}.{index}": "disk" for index in range(len(model.get_submodule(name)))}
    tensors = model.named_parameters(remove_duplicate=False), model.named_buffers()
    for path, _ in chain(*tensors):
        owner = path.rpartition(".")[0]
        if not path.startswith(f"{name}."):
            above = not owner or f"{name}.".startswith(f"{owner}.")  # the blocks are inside
            where[path if above else owner] = str(device)
    return where
