"""The weights of a model's decoder blocks: on the device, or in files from which they are fetched.

A `BlockStore` leaves them in the model. If there is no room, or if several ranks of a machine work
on one model, the blocks of a `FileBlockStore` stay in safetensors files that the system maps into
memory: files of the checkpoint until a block is changed, then files in a run's folder
(lib/model/run_folder.py), whose pages are in memory once for all ranks of the machine. A block that
is not on the device has its weights on the meta device. It is fetched once for all windows; a
forward pass of the model itself fetches each block when it reaches it.

Both keep every finished block in such a file where the run can be continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..distributed.context import DistContext
from ..packed.linear import SparseLinear
from ..util.errors import UserError
from .linears import find_linears
from .matrix import SaveDtypes
from .pretrained import decoder_blocks
from .run_folder import CHANGED, PRUNED, RunFolder, of_block

META = torch.device("meta")


class BlockStore:
    """The blocks of a model that holds all its weights itself.

    `save_dtype`: in which the model is saved (None: as it is). `finished`: the folder in which
    finished blocks are kept, in the main rank of `dist` alone; `resumes` says in every rank whether
    there is one.
    """

    resident = True  # all weights are on the device
    zero_copy = True  # fetching an unchanged block costs nothing

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
        self._kept: Path | None = None  # the file that holds the block on the device

    @contextmanager
    def on_device(self, index: int, write_back: bool = False) -> Iterator[None]:
        """Inside, block `index` is on the device.

        With `write_back`, changes of its weights are kept, and every rank must call this, since
        each waits for all.
        """
        yield

    def get(self, index: int, stage: str = PRUNED) -> dict[str, Any] | None:
        """Replace the block on the device by the one that an interrupted run finished.

        Returns its notes; None where it is not finished. Every rank must call this.
        """
        file = of_block(stage, index)
        kept = self.read_kept(file)
        if kept is None:
            return None
        tensors, notes = kept
        block, prefix = self.blocks[index], self._prefix(index)
        linears, _ = find_linears(block, f"{self.name}.{index}")
        quantized = {linear.name: linear for linear in linears if linear.is_quantized}
        for name, tensor in tensors:
            if name in quantized:
                quantized[name].set_weight_(tensor)
            else:  # it may have lost rows or columns
                parameter = block.get_parameter(name.removeprefix(prefix))
                parameter.data = tensor.to(parameter.device, parameter.dtype, copy=True)
        if self.finished:
            self._kept = self.finished.path / f"{file}.safetensors"
        return notes

    def put(
        self,
        index: int,
        notes: Mapping[str, Any],
        matrices: Mapping[str, Tensor] | None = None,
        stage: str = PRUNED,
    ) -> None:
        """Keep block `index`, which is on the device, with its notes, if the run can be continued.

        `matrices` holds {path of a quantized linear: its solved weight}. The main rank writes, and
        all wait for it.
        """
        if not self.resumes:
            return
        if self.finished:
            prefix, held = self._prefix(index), self._to_keep(index)
            for path, matrix in (matrices or {}).items():
                held.pop(f"{prefix}{path}.weight")
                held[prefix + path] = matrix
            self._kept = self.finished.write(of_block(stage, index), held, notes)
        self.dist.barrier()

    def read_kept(self, name: str) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]] | None:
        """Return tensors by name, one after another, and facts of a file of an interrupted run.

        None where there is none. Every rank must call this, and take all tensors or none.
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
        """Inside, the blocks have their weights, for `save_pretrained`."""
        yield

    def shards(self) -> dict[Path, list[str]] | None:
        """Return {file of a block: names of its tensors}, if all can be files of a saved model."""
        return None

    def moved(self, files: Mapping[str, str]) -> None:
        """Read blocks, once they are saved, from {old path: new path}; for every rank."""

    def _prefix(self, index: int) -> str:
        return f"{self.name}.{index}."

    def _held(self, index: int) -> dict[str, Tensor]:
        """Return the weights of the block on the device, by path."""
        held: dict[str, Tensor] = dict(self.blocks[index].named_parameters())
        for name, module in self.blocks[index].named_modules():
            if isinstance(module, SparseLinear):  # which has buffers too
                held |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return held

    def _to_keep(self, index: int) -> dict[str, Tensor]:
        """Return them by name, in the dtype in which they are saved where that loses nothing."""
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


class FileBlockStore(BlockStore):
    """Blocks in files: they come to the device one at a time, and leave it again.

    `model` is as transformers has loaded it by `device_map`. `folder`: where this machine writes
    changed blocks, None in ranks that do not. `on_disk`: the pages of all blocks do not fit in
    memory. `narrow`: weights are rounded to the dtype in which they are saved as they are fetched.
    For the others see `BlockStore`.
    """

    resident = False

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        folder: RunFolder | None,
        on_disk: bool,
        narrow: bool,
        **kept: Any,
    ) -> None:
        super().__init__(model, device, **kept)
        self.folder, self.on_disk, self.narrow = folder, on_disk, narrow
        self.places = self._stored()  # of each block: {path: (file, name in it)}
        for module in model.modules():
            remove_hook(module)
        del model.hf_device_map  # nothing of it is left
        for index, block in enumerate(self.blocks):
            add_hook_to_module(block, FetchHook(self, index))

    @property
    def zero_copy(self) -> bool:
        """Whether fetching an unchanged block costs nothing."""
        return (self.device.type == "cpu" and not self.on_disk) and all(
            cast is tensor
            for index in range(len(self.blocks))
            for _, tensor, cast in self._each(index)
        )

    @contextmanager
    def on_device(self, index: int, write_back: bool = False) -> Iterator[None]:
        if write_back:
            self._kept = None
        block = self.blocks[index]
        remove_hook(block)  # a copy of the block fetches nothing
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
        for path, _, tensor in self._each(index):
            set_tensor(self.blocks[index], path, tensor.to(self.device))

    def evict(self, index: int) -> None:
        """Move the weights of block `index` to the meta device."""
        block = self.blocks[index]
        for module in block.modules():
            if isinstance(module, SparseLinear):  # its buffers too
                module.to(META)
        for path, parameter in list(block.named_parameters()):
            set_tensor(block, path, parameter.to(META))

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Inside, the blocks have their weights in the saved dtype, for `save_pretrained`.

        They are mapped from their files, and in memory only while they are read.
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
        self.narrow = True  # as a model that stays in memory is once it was saved
        self.places = [
            {path: (files.get(file, file), name) for path, (file, name) in places.items()}
            for places in self.places
        ]

    def _stored(self) -> list[dict[str, tuple[str, str]]]:
        """Return where transformers has left the weights on disk, by the hooks it would use.

        That is in the checkpoint's own files, and for weights that were converted on loading, such
        as fused experts, in its folder for them.
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
            names = {path: name for path, (its, name) in places.items() if its == file}
            try:
                with safe_open(file, framework="pt") as stored:
                    tensors |= {path: stored.get_tensor(name) for path, name in names.items()}
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"--model: block {index} can't be read from {file}: {error}"
                ) from error
        return tensors

    def _each(self, index: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield path, tensor in its file, and tensor as the model computes with it."""
        block = self.blocks[index]
        empty = dict((*block.named_parameters(), *block.named_buffers()))
        for path, tensor in self._mapped(index).items():
            narrow = self._as_saved(index, path, tensor) if self.narrow else tensor
            yield path, tensor, narrow.to(empty[path].dtype)

    def _write(self, index: int) -> None:
        """Write the block on the device to a file, from which it is read from now on."""
        places = None
        if self.folder:
            file, prefix = self._kept, self._prefix(index)
            if file is None:
                file = self.folder.write(of_block(CHANGED, index), self._to_keep(index), {})
            places = {path: (str(file), prefix + path) for path in self._held(index)}
        owner = self.dist.rank - self.dist.local_rank
        self.places[index] = self.dist.all_gather_object(places)[owner]


class FetchHook(ModelHook):
    """Has a block on the device while the model's own forward pass is in it."""

    def __init__(self, store: FileBlockStore, index: int) -> None:
        self.store, self.index = store, index

    def __deepcopy__(self, memo: dict) -> FetchHook:  # of a model, whose copy has the same files
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


def set_tensor(module: nn.Module, path: str, tensor: Tensor) -> Tensor:
    """Replace a parameter or buffer, and return the one before."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    before = getattr(owner, name)
    if isinstance(before, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, name, tensor)
    return before


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
