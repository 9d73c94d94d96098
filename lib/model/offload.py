"""Loads a model with its blocks left in files, once for all processes of a machine.

The first process of a machine lets transformers read the checkpoint without its blocks. Blocks are
mapped from the checkpoint's own files; only weights that transformers converts on loading, such as
fused experts, are written to the work folder. If several processes share the model, the weights
outside the blocks are written there too, and the other processes build the model from them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import modeling_utils

from lib.distributed.context import DistContext
from lib.model.pretrained import decoder_blocks
from lib.model.weights import WRITING, BlockFiles, Place, set_tensor
from lib.model.work_folder import CONVERTED, WorkFolder
from lib.util.errors import UserError
from lib.util.files import room
from lib.util.locks import exclusive_lock

REST = "rest.safetensors"  # the weights outside the blocks
MEMORY = Path("/dev/shm")  # on Linux: files in memory
PREFIX = "blocks-"  # of folders for a run that names none
NEW_SECONDS = 60  # in which such a folder may not be locked yet


@dataclass(frozen=True)
class ModelInFiles:
    """What another process of the machine needs to build the model.

    `places` holds {path: place} for each block, `tied` {another name of a tensor: its first name}.
    """

    places: list[dict[str, Place]]
    tied: dict[str, str]


def read_in_files(
    read: Callable[[str], nn.Module],
    empty: Callable[[], nn.Module],
    stored: dict[str, str],
    folder: WorkFolder,
    dist: DistContext,
    device: torch.device,
    shared: bool,
    in_memory: bool,
) -> tuple[nn.Module, BlockFiles]:
    """Load the model with its blocks in files; return both.

    `read(folder)` lets transformers read it with its blocks on disk and converted weights in
    `folder`; `empty()` builds it without weights. `stored` is {name: file} of the checkpoint's
    tensors. If `shared`, the processes of the machine share `folder`, and only the first one reads.
    `in_memory` says that the files are or will stay in memory.
    """
    reads = not shared or dist.is_local_main
    with as_pread():
        model = (read(str(folder.folder / CONVERTED)) if reads else empty()).eval()
    model.requires_grad_(False)
    name, blocks = decoder_blocks(model)
    check_apart(blocks)
    places = _places(model, name, stored, folder) if reads else []
    if reads:
        for module in model.modules():
            remove_hook_from_module(module)
            module.__dict__.pop("forward", None)  # accelerate leaves its wrapper in each module
    owner = dist.rank - dist.local_rank if shared else dist.rank
    if shared:
        tied = _write_rest(model, name, folder) if reads else {}
        size = sum(parameter.nbytes for parameter in model.parameters())
        dist.barrier(size / WRITING)
        spec = dist.all_gather_object(ModelInFiles(places, tied))[owner]
        places = spec.places
        _take_rest(model, name, spec=spec, folder=folder, device=device)
    return model, BlockFiles(places, folder, owner, in_memory)


def _places(
    model: nn.Module, blocks_name: str, stored: dict[str, str], folder: WorkFolder
) -> list[dict[str, Place]]:
    """Return {path: place} for each block. The model must still have accelerate's hooks."""
    converted = folder.folder / CONVERTED
    places: list[dict[str, Place]] = []
    for index, block in enumerate(model.get_submodule(blocks_name)):
        places.append({})
        for path, parameter in block.named_parameters():
            name = f"{blocks_name}.{index}.{path}"
            file = str(converted / f"{name}.safetensors")
            if not Path(file).exists():
                if name in stored:
                    file = stored[name]
                else:  # the checkpoint has it under another name
                    module = model.get_submodule(name.rpartition(".")[0])
                    with align_module_device(module, torch.device("cpu")):
                        save_file({name: model.get_parameter(name).data.contiguous()}, file)
            places[-1][path] = Place(file, name, parameter.dtype)
    return places


def _write_rest(model: nn.Module, blocks_name: str, folder: WorkFolder) -> dict[str, str]:
    """Write all tensors that are not in the blocks' files; return the names of tied ones."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, tensor in named:
        if tensor.is_meta:
            continue
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.data
    folder.write(REST.removesuffix(".safetensors"), tensors, {}, "the weights outside the blocks")
    return tied


def _take_rest(
    model: nn.Module, blocks_name: str, spec: ModelInFiles, folder: WorkFolder, device: torch.device
) -> None:
    """Set the weights outside the blocks; on a CPU all processes map them from one file."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    is_complete = not any(
        parameter.is_meta
        for name, parameter in parameters.items()
        if not name.startswith(f"{blocks_name}.")
    )
    # on a GPU the process that read them keeps its own
    if not (is_complete and device.type == "cuda"):
        for name, tensor in load_file(folder.folder / REST).items():
            buffer = name not in parameters
            if not (buffer and is_complete):
                set_tensor(model, name, tensor.to(device, copy=buffer))
    for name, other in spec.tied.items():
        tensor = model.get_parameter(other) if other in parameters else model.get_buffer(other)
        set_tensor(model, name, tensor)
    for index, places in enumerate(spec.places):
        for path, place in places.items():
            name = f"{blocks_name}.{index}.{path}"
            set_tensor(model, name, parameters[name].to(place.dtype))


def device_map(
    model: nn.Module, blocks_name: str, device: torch.device
) -> dict[str, str | int | torch.device]:
    """Return the map for from_pretrained: every block on disk, everything else on `device`."""
    on_device = (
        "cpu" if device.type == "cpu" else device.index
    )  # the form for accelerate and safetensors
    where: dict[str, str | int] = {}
    above = {blocks_name}
    while (parent := blocks_name.rpartition(".")[0]) not in above:
        above.add(parent)
        blocks_name = parent
    for name in sorted(above):
        module = model.get_submodule(name)
        for key, _ in (*module.named_parameters("", False), *module.named_buffers("", False)):
            where[f"{name}.{key}".strip(".")] = on_device
        for child, _ in module.named_children():
            path = f"{name}.{child}".strip(".")
            if path not in above:
                where[path] = "disk" if isinstance(module, nn.ModuleList) else on_device
    return where


@contextmanager
def as_pread() -> Iterator[None]:
    """Inside, transformers reads checkpoints instead of mapping them into memory.

    It reads all weights once, even those that stay on disk, and mapped pages would stay resident
    until the end. It has no setting for this: `disable_mmap` reads whole files.
    """
    mapped = modeling_utils.safe_open

    def read(*args, **kwargs):
        return mapped(*args, **kwargs | {"backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


@contextmanager
def offload_folder(path: str, dist: DistContext, shared: bool) -> Iterator[WorkFolder]:
    """Yield this process's folder in `--offload PATH`, or its machine's if `shared`.

    Files of a killed run are removed first, and all files of runs at the end. Raises UserError if
    another run uses the folder, or if it holds other files.
    """
    try:
        with _scratch("--offload", path, dist, shared) as folder:
            yield folder
    finally:
        with suppress(OSError):  # it has other files
            Path(path).rmdir()


@contextmanager
def temporary_folder(parent: Path, dist: DistContext, shared: bool) -> Iterator[WorkFolder]:
    """Yield such a folder below `parent`, for a run without `--offload`."""
    with ExitStack() as at_end:
        made = None
        if not shared or dist.is_local_main:
            _remove_left(parent)
            made = at_end.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent))
        owner = dist.rank - dist.local_rank if shared else dist.rank
        path = dist.all_gather_object(made)[owner]
        yield at_end.enter_context(_scratch("--offload", path, dist, shared))


def _remove_left(parent: Path) -> None:
    """Remove folders of killed runs: they are not new, and nobody holds their locks."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError, UserError):
            if time.time() - folder.stat().st_mtime > NEW_SECONDS:
                for lock in folder.glob(".*.lock"):
                    with exclusive_lock(lock, "in use"):
                        pass
                shutil.rmtree(folder)


@contextmanager
def _scratch(flag: str, path: str, dist: DistContext, shared: bool) -> Iterator[WorkFolder]:
    name = f"process-{dist.rank - dist.local_rank if shared else dist.rank}"
    if shared and not dist.is_local_main:
        yield WorkFolder.of_another(flag, path, name)
        return
    folder = WorkFolder(flag, path, name)
    try:
        folder.clear()
        folder.begin({})
        (folder.folder / CONVERTED).mkdir(exist_ok=True)
        yield folder
    finally:
        folder.clear()
        folder.close()


def place_in_memory(size: int, available: int) -> Path | None:
    """Return a folder with room for `size` bytes: in memory, or for temporary files; else None."""
    if MEMORY.is_dir() and size < min(room(MEMORY), available):
        return MEMORY
    folder = Path(tempfile.gettempdir())
    return folder if size < room(folder) else None


def are_apart(blocks: nn.ModuleList) -> bool:
    """Return whether no two blocks share weights."""
    parameters = [p for block in blocks for p in block.parameters()]
    return len(parameters) == len(set(parameters))


def check_apart(blocks: nn.ModuleList) -> None:
    """Raise UserError if blocks share weights: one can't be fetched without the other."""
    if not are_apart(blocks):
        raise UserError("--offload: the model's blocks share weights; it must fit in memory")


def can_be_shared(skeleton: nn.Module, blocks: nn.ModuleList) -> bool:
    """Return whether the model has only parameters and buffers, and blocks share none."""
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return False
    attributes = (value for module in skeleton.modules() for value in vars(module).values())
    return are_apart(blocks) and not any(isinstance(value, Tensor) for value in attributes)


def scratch_bytes(
    skeleton: nn.Module,
    blocks_name: str,
    stored: dict[str, str],
    loaded: torch.dtype,
    rounding: torch.dtype,
) -> int:
    """Return the bytes that blocks take in a work folder.

    Pruned weights take them in `rounding`. Weights that the checkpoint has under another name, such
    as experts fused on loading, also take them in `loaded`.
    """
    size = 0
    for name, parameter in skeleton.get_submodule(blocks_name).named_parameters():
        size += parameter.numel() * rounding.itemsize
        if stored and f"{blocks_name}.{name}" not in stored:
            size += parameter.numel() * loaded.itemsize
    return size
