"""Decoder blocks that live on the host or on disk, and come to the device one at a time.

accelerate loads such a model: the blocks' weights are on the meta device, and its hooks know where
each one really is (host memory, the checkpoint's own files, or a file in the offload folder). Here
a whole block is fetched once for all windows, instead of linear by linear for every forward, and
a pruned block is put back where `save_pretrained` will find it.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import named_module_tensors, set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import modeling_utils

from lib.dist.team import Team
from lib.util.errors import UserError
from lib.util.files import check_room


class BlockPlacement:
    """Brings block `index` to `device` and takes it away again.

    `folder`: where blocks that were changed are written, in `rounding`, if they are not kept in
    host memory.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        device: torch.device,
        rounding: torch.dtype,
        folder: str | None = None,
    ) -> None:
        hooks = [hook for block in blocks for _, hook in _hooks(block)]
        for hook in hooks:
            hook.original_devices = {}  # else a hook brings its weights before it is removed
        parameters = [p for block in blocks for p in block.parameters()]
        if len(parameters) > len(set(parameters)):
            raise UserError("--offload: the model's blocks share weights; it must fit in memory")
        self.blocks = blocks
        self.device = device
        self.rounding = rounding
        self.folder = folder
        self.side: torch.cuda.Stream | None = None
        self.ahead: tuple[int, dict[str, Tensor]] = (-1, {})  # a block that is already on its way
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)
            _pin_(hooks)

    @contextmanager
    def at_hand(self, index: int, keep: bool = False) -> Iterator[None]:
        """Inside, the block's weights are on the device; `keep` writes them back afterwards."""
        away = _hooks(self.blocks[index])
        arrived = self._arrived(index)
        for module, hook in away:
            remove_hook_from_module(module)
            for name in _names(module, hook):
                value = arrived.get(hook.weights_map.prefix + name)
                value = _read(hook.weights_map, name) if value is None else value
                set_module_tensor_to_device(module, name, self.device, value=value)
        arrived.clear()
        self._send_for(index + 1)
        try:
            yield
            if keep:
                self._put_back(index, away)
        finally:
            for module, hook in away:
                add_hook_to_module(module, hook)  # back to the meta device
                hook.original_devices = {}

    def _send_for(self, index: int) -> None:
        """Start copying what host memory holds of block `index` while another block computes."""
        if self.side is None or index >= len(self.blocks):
            return
        with torch.cuda.stream(self.side):
            coming = {
                hook.weights_map.prefix + name: hook.weights_map[name].to(
                    self.device, non_blocking=True
                )
                for module, hook in _hooks(self.blocks[index])
                for name in _names(module, hook)
                if hook.weights_map.prefix + name in hook.weights_map.dataset.state_dict
            }
        self.ahead = index, coming

    def _arrived(self, index: int) -> dict[str, Tensor]:
        """Weights of block `index` that were sent for, on the device."""
        (known, arrived), self.ahead = self.ahead, (-1, {})
        if known != index:
            return {}
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self.side)
        for tensor in arrived.values():
            tensor.record_stream(now)  # or its memory is taken for the next block too early
        return arrived

    def _put_back(self, index: int, away: list[tuple[nn.Module, AlignDevicesHook]]) -> None:
        """Into host memory, or into one file of the offload folder."""
        on_disk: dict[str, Tensor] = {}
        entries = []
        for module, hook in away:
            for name in _names(module, hook):
                tensor = module.get_parameter(name).data
                full_name = hook.weights_map.prefix + name
                loader = hook.weights_map.dataset
                if full_name in loader.state_dict:
                    loader.state_dict[full_name].copy_(tensor)
                else:
                    rounded = tensor.to("cpu", self.rounding).contiguous()
                    on_disk[full_name] = rounded
                    entries.append((loader.index, full_name, dtype_name(tensor.dtype)))
        if on_disk:
            file = str(Path(self.folder) / f"block-{index}.safetensors")
            try:
                save_file(on_disk, file)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"--offload {self.folder}: block {index} can't be written ({error}); "
                    "name a folder on a disk with room"
                ) from error
            for where, name, dtype in entries:
                where[name] = {"safetensors_file": file, "weight_name": name, "dtype": dtype}

    def settle(self) -> None:
        """From now on every block's weights are given out in the dtype they are saved in."""
        for block in self.blocks:
            for module, hook in _hooks(block):
                for name in _names(module, hook):
                    loader, full_name = hook.weights_map.dataset, hook.weights_map.prefix + name
                    if full_name in loader.state_dict:
                        rounded = loader.state_dict[full_name].to(self.rounding)
                        loader.state_dict[full_name] = rounded
                    else:
                        loader.index[full_name]["dtype"] = dtype_name(self.rounding)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _hooks(block: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    return [
        (module, module._hf_hook)
        for module in block.modules()
        if getattr(getattr(module, "_hf_hook", None), "offload", False)
    ]


def _pin_(hooks: list[AlignDevicesHook]) -> None:
    """Lock what host memory holds in place, so that it is copied beside other work."""
    for hook in hooks:
        kept = hook.weights_map.dataset.state_dict
        for name, tensor in kept.items():
            kept[name] = tensor if tensor.is_pinned() else tensor.pin_memory()


def _names(module: nn.Module, hook: AlignDevicesHook) -> list[str]:
    tensors = named_module_tensors(module, include_buffers=False, recurse=hook.place_submodules)
    return [name for name, _ in tensors]


def _read(weights: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return weights[name]
    except (OSError, SafetensorError) as error:
        full_name = weights.prefix + name
        file = weights.dataset.index.get(full_name, {}).get("safetensors_file", "memory")
        raise UserError(f"--model: {full_name} can't be read from {file}: {error}") from error


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


@contextmanager
def own_folder(path: str, team: Team) -> Iterator[str]:
    """A folder in `path` for this process alone, empty, that goes when the block ends.

    So does `path` if nothing else is in it. What a killed run left in it is removed. UserError
    where another run uses it.
    """
    folder = Path(path) / f"process-{team.rank}"
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
) -> None:
    """UserError where the disk of `path` can't hold the pruned blocks.

    Besides these, in `rounding`, weights that stand under another name in the files of a local
    `model` (experts that are fused on loading) are written there as they are `loaded`.
    """
    stored = _stored_names(model)
    needed = 0
    for name, parameter in skeleton.get_submodule(blocks_name).named_parameters():
        needed += parameter.numel() * rounding.itemsize
        if stored and f"{blocks_name}.{name}" not in stored:
            needed += parameter.numel() * loaded.itemsize
    check_room("--offload", path, needed)


def _stored_names(model: str) -> set[str]:
    names: set[str] = set()
    for file in Path(model).glob("*.safetensors") if Path(model).is_dir() else ():
        with safe_open(file, "pt") as stored:
            names.update(stored.keys())
    return names
