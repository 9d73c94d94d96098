"""A model whose blocks are away, read once for all processes of a machine.

The first process of a machine reads the model; its blocks go into memory that the others map too,
or stay on disk, and what is outside the blocks is handed on. So a machine holds one copy of the
blocks, however many of its processes work on them. That memory has no name and no limit but the
machine's; it goes with the last process that has it, whatever ends that.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors import safe_open
from torch import Tensor, nn
from transformers import modeling_utils

from lib.distributed.context import DistContext
from lib.model.pinned import HostMemory
from lib.model.placement import META, BlockPlacement, are_apart, check_apart, put
from lib.model.pretrained import decoder_blocks
from lib.model.store import (
    BlockStore,
    DiskStore,
    HostStore,
    Place,
    Slots,
    aligned,
    end_of,
    side_by_side,
)
from lib.util.errors import UserError
from lib.util.files import check_room
from lib.util.host import malloc_trim

SLOWEST = 2e7  # bytes a second that are read and handed on


class Sharing:
    """Two memories, of blocks (0) and of the rest (1), that all processes of a machine have."""

    def __init__(self, dist: DistContext, files: tuple[int, int]) -> None:
        self.dist = dist
        self.files = files

    @classmethod
    def arrange(cls, dist: DistContext) -> Sharing | None:
        """All processes of `dist` call this; None where those of a machine can't share."""
        if dist.size == 1:
            return None
        files = _new_files() if dist.is_local_main else None
        pid, theirs = dist.all_gather_object((os.getpid(), files))[dist.rank - dist.local_rank]
        if not dist.is_local_main:
            files = _opened(pid, theirs)
        if all(dist.all_gather_object(files is not None and dist.local_size > 1)):
            return cls(dist, files)
        for file in files or ():
            os.close(file)
        return None

    def made(self, which: int, size: int) -> Tensor:
        """One of them, of `size` bytes, for this process to fill."""
        os.ftruncate(self.files[which], size)
        return self.mapped(which)

    def mapped(self, which: int, lock: bool = False) -> Tensor:
        """One of them, (bytes,), when it has been filled."""
        size = os.fstat(self.files[which]).st_size
        return _memory(size, self.files[which], lock)

    def told(self, what: Any, size: int) -> Any:
        """What the first process of this machine tells when it has read `size` bytes."""
        self.dist.barrier(size / SLOWEST)
        return self.dist.all_gather_object(what)[self.dist.rank - self.dist.local_rank]

    def close(self) -> None:
        """What is mapped stays."""
        for file in self.files:
            os.close(file)


def _new_files() -> tuple[int, int] | None:
    if not hasattr(os, "memfd_create"):  # not Linux
        return None
    return os.memfd_create("blocks"), os.memfd_create("rest")


def _opened(pid: int, files: tuple[int, int] | None) -> tuple[int, int] | None:
    """The same files as process `pid` of this machine has them."""
    opened: list[int] = []
    try:
        for file in files or ():
            opened.append(os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR))
    except OSError:
        for file in opened:
            os.close(file)
        return None
    return tuple(opened) or None


def _memory(size: int, file: int = -1, lock: bool = False) -> Tensor:
    """Host memory (bytes,), of a file's or of its own, locked in place for a GPU if `lock`."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    held = HostMemory(file, size)
    if lock:
        held.lock()
    return held.tensor()


def can_be_shared(skeleton: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether the model is all parameters and buffers, and each block has its own."""
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return False
    own = (value for module in skeleton.modules() for value in vars(module).values())
    return are_apart(blocks) and not any(isinstance(value, Tensor) for value in own)


@dataclass(frozen=True)
class Told:
    """What another process of the machine has to know of a model that one has read."""

    layout: Any  # of the store: what stands where in its memory, or in which files
    dtypes: list[dict[str, torch.dtype]]  # [block][path]
    rest: Slots  # by name, of what is outside the blocks, and of all buffers
    same: dict[str, str]  # another name of the same parameter


def fetched_model(
    read: Callable[[], nn.Module],
    empty: Callable[[], nn.Module],
    device: torch.device,
    sharing: Sharing | None = None,
    folder: str | None = None,
    rounding: torch.dtype = torch.float32,
) -> tuple[nn.Module, BlockPlacement]:
    """The model with its blocks away, and what brings them.

    `read` gives it with its blocks on the host, or on disk if there is a `folder` for those that
    change; `empty` gives it without weights, to a process that is handed them. `rounding`: the
    dtype in which the model will be saved.
    """
    first = sharing is None or sharing.dist.is_local_main
    with unmapped():
        model = (read if first else empty)().eval().requires_grad_(False)
    name, blocks = decoder_blocks(model)
    check_apart(blocks)
    held = _taken_away(model, blocks) if first else []
    lock = device.type == "cuda"
    memory, layout = None, held
    dtypes = [{path: _dtype(one) for path, one in each.items()} for each in held]
    if first and not folder:
        size, *layout = HostStore.layout(held)
        memory = sharing.made(0, size) if sharing else _memory(size, lock=lock)
        _fill(HostStore(memory, *layout), held)
    if sharing:
        size = sum(one.nbytes for one in model.parameters())
        told = Told(layout, dtypes, *_rest_of(model, name, sharing)) if first else None
        told = sharing.told(told, size)
        layout = told.layout
        _hand_on(model, name, told, sharing.mapped(1), device)
        memory = None if folder else sharing.mapped(0, lock)
        sharing.close()
    if folder:
        store: BlockStore = DiskStore(folder, layout, writes=first)
    else:
        store = HostStore(memory, *layout, writes=first)
    exact = frozenset(model._keep_in_fp32_modules_strict or ())
    dist = sharing.dist if sharing else None
    return model, BlockPlacement(blocks, device, store, rounding, exact, dist)


def _taken_away(model: nn.Module, blocks: nn.ModuleList) -> list[dict[str, Tensor | Place]]:
    """What each block's weights are, or where on disk, by path; the model is left without."""
    held: list[dict[str, Tensor | Place]] = []
    for block in blocks:
        held.append({})
        for path, module in block.named_modules():
            known = next((one.weights_map for one in _hooks(module) if one.offload), None)
            for name, parameter in module.named_parameters(recurse=False):
                held[-1][f"{path}.{name}".strip(".")] = _taken(known, name, parameter)
                put(module, name, parameter.to(META))
    hooked = [module for module in model.modules() if _hooks(module)]
    for module in hooked:
        for hook in _hooks(module):
            hook.original_devices = {}  # else a hook brings its weights before it is removed
    remove_hook_from_submodules(model)
    for module in hooked:  # a forward of its own is left in each
        module.__dict__.pop("forward", None)
    return held


def _hooks(module: nn.Module) -> list:
    """accelerate's, on a module that it has dispatched."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _taken(known, name: str, parameter: nn.Parameter) -> Tensor | Place:
    if known is None:
        return parameter.data
    full_name, loader = known.prefix + name, known.dataset
    if full_name in loader.state_dict:
        return loader.state_dict.pop(full_name)
    return loader.index[full_name]


def _dtype(one: Tensor | Place) -> torch.dtype:
    return one.dtype if isinstance(one, Tensor) else getattr(torch, one["dtype"])


def _fill(store: HostStore, held: list[dict[str, Tensor]]) -> None:
    """Move blocks into the store's memory; each is freed there before the next comes."""
    for index, tensors in enumerate(held):
        store.replace_(index, tensors, {})
        tensors.clear()
        malloc_trim()


def _rest_of(model: nn.Module, blocks_name: str, sharing: Sharing) -> tuple[Slots, dict[str, str]]:
    """Put all but the blocks' weights into the memory for it; what stands where, and aliases."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    known: dict[int, str] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        if name.startswith(f"{blocks_name}."):
            continue
        if id(one) in known:
            same[name] = known[id(one)]
        else:
            known[id(one)] = name
            tensors[name] = one.data
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    slots = side_by_side(tensors)
    memory = sharing.made(1, aligned(end_of(slots)))
    for name, slot in slots.items():
        slot.of(memory).copy_(tensors[name])
    return slots, same


def _hand_on(
    model: nn.Module, blocks_name: str, told: Told, memory: Tensor, device: torch.device
) -> None:
    """Give the model what is outside its blocks: on a CPU, where it stands for all processes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    here = not any(one.is_meta for name, one in parameters.items() if name in told.rest)
    if not (here and device.type == "cuda"):  # where the process that has read it keeps its own
        for name, slot in told.rest.items():
            tensor = slot.of(memory)
            if name not in parameters:
                if not here:
                    put(model, name, tensor.to(device, copy=True))
                continue
            put(model, name, tensor.to(device))
    for name, known in told.same.items():
        put(model, name, model.get_parameter(known))
    for index, block in enumerate(told.dtypes):
        for path, dtype in block.items():
            name = f"{blocks_name}.{index}.{path}"
            put(model, name, parameters[name].to(dtype))


@contextmanager
def own_folder(path: str, dist: DistContext, shared: bool = False) -> Iterator[str]:
    """A folder in `path` for this process alone, empty, that goes when the block ends.

    So does `path` if nothing else is in it. What a killed run left in it is removed. UserError
    where another run uses it. `shared`: it is the one of the machine's first process, which alone
    writes in it.
    """
    folder = Path(path) / f"process-{dist.rank - dist.local_rank if shared else dist.rank}"
    if shared and not dist.is_local_main:
        yield str(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "in-use").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--offload {path}: another run uses it; name another folder") from None
        for left in folder.glob("*.safetensors"):
            left.unlink()
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: it holds more than this
                Path(path).rmdir()


@contextmanager
def unmapped() -> Iterator[None]:
    """Inside, transformers reads checkpoints instead of mapping them into memory.

    It goes through all weights once, also those that stay on disk; pages that are mapped would all
    stay resident until it is done. It has no setting for this: `disable_mmap` reads whole files.
    """
    mapped = modeling_utils.safe_open

    def read(*args, **kwargs):
        return mapped(*args, **kwargs | {"backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def check_offload_room(
    path: str,
    model: str,
    skeleton: nn.Module,
    blocks_name: str,
    loaded: torch.dtype,
    rounding: torch.dtype,
    writers: int = 1,
) -> None:
    """UserError where the disk of `path` can't hold the pruned blocks.

    Besides these, in `rounding`, weights that stand under another name in the files of a local
    `model` (experts that are fused on loading) are written there as they are `loaded`. `writers`:
    processes of this machine that each write all of it.
    """
    stored = _stored_names(model)
    needed = 0
    for name, parameter in skeleton.get_submodule(blocks_name).named_parameters():
        needed += parameter.numel() * rounding.itemsize
        if stored and f"{blocks_name}.{name}" not in stored:
            needed += parameter.numel() * loaded.itemsize
    check_room("--offload", path, writers * needed)


def _stored_names(model: str) -> set[str]:
    names: set[str] = set()
    for file in Path(model).glob("*.safetensors") if Path(model).is_dir() else ():
        with safe_open(file, "pt") as stored:
            names.update(stored.keys())
    return names
