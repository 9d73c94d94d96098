"""Blocks sharded over the ranks for training; only this file uses torch's FSDP.

Each rank holds its rows of every parameter: some outputs of a matrix, some experts of a stack.
`fully_shard` treats each block as a group: forward and backward passes gather the block whole and
sum its gradients. Parameters that ranks cannot share evenly stay whole on each rank. Training
begins and ends with blocks in files; nothing of FSDP is left afterwards.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as torch_dist
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from .distributed.context import DistContext
from .model.blocks import BlockRunner
from .model.linears import find_linears
from .model.run_folder import RECOVERY, RunFolder
from .model.store import FetchHook, FileBlockStore, remove_hook, set_tensor
from .packed.formats import Grid
from .util.errors import UserError


def is_sharded(runner: BlockRunner) -> bool:
    """Return whether ranks share the blocks in training, as they do if blocks are in files."""
    return runner.dist.size > 1 and not runner.weights.resident


def can_share(blocks: nn.Module) -> bool:
    """Return whether no two blocks share a weight, so that each can be sharded alone."""
    held = [parameter for block in blocks for parameter in block.parameters()]
    return len(held) == len(set(held))


def check_rows(blocks: nn.Module, name: str, ranks: int) -> None:
    """Raise UserError if there are more ranks than rows of a matrix, or experts of a stack."""
    for index, block in enumerate(blocks):
        for linear in find_linears(block, f"{name}.{index}")[0]:
            one = getattr(linear.module, linear.parameter)
            rows = linear.shape[0] if linear.expert is None else len(one)
            if rows < ranks:
                what = "rows" if linear.expert is None else "experts"
                raise UserError(
                    f"WORLD_SIZE {ranks}: {linear.stage} has {rows} {what}, fewer than the ranks "
                    f"that would share them out for --recover. Start at most {rows}."
                )


def shared_along(block: nn.Module, ranks: int) -> dict[str, int | None]:
    """Return {path of a parameter: dimension that ranks share out}; None: it stays whole.

    FSDP accepts parameters of one dtype, and pads only the first dimension.
    """
    linears, _ = find_linears(block, "")
    columns = {id(one.module) for one in linears if one.transposed and one.expert is None}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in block.parameters():
        sizes[parameter.dtype] += parameter.numel() * parameter.is_floating_point()
    dtype, along = max(sizes, key=sizes.__getitem__), {}
    for path, one in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        dim = int(id(owner) in columns and one.dim() == 2)
        fits = one.dtype == dtype and one.dim() > dim and one.shape[dim] >= ranks
        along[path] = dim if fits and (dim == 0 or one.shape[dim] % ranks == 0) else None
    return along


def part_of(tensor: Tensor, dim: int | None, dist: DistContext) -> Tensor:
    """Return a view of this rank's part of a tensor, divided as in FSDP; `dim` None: all of it."""
    if dim is None:
        return tensor
    count = tensor.shape[dim]
    step = -(-count // dist.size)
    start = min(dist.rank * step, count)
    return tensor.narrow(dim, start, min(step, count - start))


def part_of_start(
    masters: Tensor, grid: Grid, dim: int | None, dist: DistContext
) -> tuple[Tensor, Grid]:
    """Return copies of this rank's part of the masters of a parameter, and of their grid."""
    if dim is None:
        return masters, grid
    scales = grid.scales.view(masters.shape[dim], -1, grid.scales.shape[-1])
    scales = part_of(scales, 0, dist).flatten(0, 1).clone()
    return part_of(masters, dim, dist).clone(), Grid(grid.form, grid.transposed, scales)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a parameter or gradient, a view; all of a plain tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _state(dist: DistContext) -> str:
    return f"{RECOVERY}-{dist.rank:05d}-of-{dist.size:05d}"


def write_state(
    folder: RunFolder, dist: DistContext, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write each rank's checkpoint after `facts["step"]` steps, then remove the one before."""
    file = folder.write(f"{_state(dist)}-{facts['step']}", tensors, facts)
    dist.barrier()  # until all are written, the ones before are the complete state
    for each in folder.path.glob(f"{_state(dist)}-*.safetensors"):
        if each != file:
            each.unlink()


def read_state(
    folder: RunFolder, dist: DistContext
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]] | None:
    """Return this rank's part of the last checkpoint that all ranks have, and its facts."""
    files = folder.path.glob(f"{_state(dist)}-*.safetensors")
    steps = {int(file.stem.rpartition("-")[2]) for file in files}
    steps = set.intersection(*dist.all_gather_object(steps))
    kept = folder.read(f"{_state(dist)}-{max(steps)}") if steps else None
    if not all(dist.all_gather_object(kept is not None)):
        return None
    return iter(kept[0].items()), kept[1]


def ranks_of_state(folder: RunFolder) -> set[int]:
    """Return the numbers of ranks of the checkpoints in a folder; 1: not sharded."""
    parts = (file.stem.split("-of-") for file in folder.files() if file.stem.startswith(RECOVERY))
    return {int(more[0].partition("-")[0]) if more else 1 for _, *more in parts}


@contextmanager
def answered(dist: DistContext) -> Iterator[None]:
    """Raise UserError if FSDP loses a rank; other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        lost = any(word in str(error) for word in ("gloo", "Connection", "NCCL"))
        if lost or isinstance(error, torch_dist.DistError):
            with dist.collective():
                raise
        raise


class ShardedStore(FileBlockStore):
    """The blocks of a store of files, sharded over the ranks.

    FSDP manages copies of the blocks, `twins`. The model's own blocks are empty except inside
    `on_device`, which gathers one whole, so runs with replaced forwards gather nothing. All ranks
    must call `on_device`, and each twin, the same number of times.
    """

    zero_copy = False
    together = True

    def __init__(self, files: FileBlockStore) -> None:
        vars(self).update(vars(files))  # shares the list `places`, which `restored` writes
        self.files = files
        self.along = [shared_along(block, self.dist.size) for block in self.blocks]
        self.twins = nn.ModuleList(self._twin(index) for index in range(len(self.blocks)))

    def fetch(self, index: int) -> None:
        twin = self.twins[index]
        with answered(self.dist):
            twin.unshard()
        for path, parameter in twin.named_parameters():
            set_tensor(self.blocks[index], path, parameter.data)

    def evict(self, index: int) -> None:
        super().evict(index)
        self.twins[index].reshard()

    def restored(self) -> FileBlockStore:
        """Return the store of files, with the trained blocks written to it."""
        for index, block in enumerate(self.blocks):
            with self.on_device(index, write_back=True):
                for parameter in block.parameters():  # FSDP cannot free what numpy has seen
                    parameter.data = parameter.data.clone()
            remove_hook_from_module(block)
            add_hook_to_module(block, FetchHook(self.files, index))
        return self.files

    def finished_by_all(self) -> RunFolder | None:
        """Return the folder of finished blocks, where each rank writes its checkpoints."""
        folder, known = self.finished, None
        if folder:
            known = folder.label, str(folder.path.absolute()), folder.digest
        known = self.dist.all_gather_object(known)[0]
        return folder or (RunFolder.joined(*known) if known else None)

    def dim(self, name: str) -> int | None:
        """Return the dimension that ranks share out of a parameter, named as in `twins`."""
        index, _, path = name.partition(".")
        return self.along[int(index)][path]

    def whole_scales(self, name: str, grid: Grid) -> Tensor:
        """Gather the scales (rows, groups) of a parameter's grid, named as in `twins`."""
        dim, shape = self.dim(name), self.twins.get_parameter(name).shape
        if dim is None:
            return grid.scales
        rows = 1 if len(shape) == 2 else shape[1 + grid.transposed]  # rows per index of `dim`
        whole = grid.scales.new_zeros(shape[dim], rows, grid.scales.shape[-1])
        part_of(whole, 0, self.dist).copy_(grid.scales.view(-1, *whole.shape[1:]))
        self.dist.sum_([whole])
        return whole.flatten(0, 1)

    def _twin(self, index: int) -> nn.Module:
        """Return a copy of a block, sharded by FSDP; only this rank's part of it is read."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        twin, along = copy.deepcopy(self.blocks[index]), self.along[index]  # without weights
        remove_hook(twin)
        dims = {one: along[path] for path, one in twin.named_parameters()}
        fully_shard(
            twin,
            mesh=DeviceMesh.from_group(torch_dist.group.WORLD, self.device.type),
            reshard_after_forward=True,
            shard_placement_fn=lambda one: Shard(dims[one]),
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            ignored_params={one for one, dim in dims.items() if dim is None},
        )
        twin._apply(lambda one: torch.empty_like(one, device=self.device) if one.is_meta else one)
        own = {path: local(one) for path, one in twin.named_parameters()}
        parts = self.files.each(index, lambda path, one: part_of(one, along[path], self.dist))
        for path, _, part in parts:
            own[path].copy_(part)
        twin.set_gradient_divide_factor(1.0)  # gradients are sums
        twin.set_force_sum_reduction_for_comms(True)
        if hasattr(twin, "set_reduce_scatter_unused_params"):  # newer than the oldest torch allowed
            twin.set_reduce_scatter_unused_params(True)
        return twin
