"""The weights in training, whole in each rank or sharded over all; only this file uses FSDP.

`WholeWeights` and `ShardedWeights` have the same methods, which `Recoverer` (lib/stages/recover.py)
calls. Where blocks are sharded, each rank holds its rows of every parameter: some outputs of a
matrix, some experts of a stack. `fully_shard` treats each block as a group: forward and backward
passes gather the block whole and sum its gradients. Parameters that ranks cannot share evenly stay
whole on each rank. Training begins and ends with blocks in files; nothing of FSDP is left
afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from ..formats.grids import Grid
from ..model.blocks import BlockRunner, HiddenStates, run_block
from ..model.linears import find_linears, linears_of
from ..model.store import set_tensor
from ..util.errors import UserError
from ..util.ranks import DistContext
from ..util.resume import RECOVERY, RunFolder
from .store import FileBlockStore, TrainedStore

PART = 2**22  # numbers of a gradient that are copied at a time


def is_sharded(runner: BlockRunner) -> bool:
    """Return whether ranks share the blocks in training, as they do if blocks are in files."""
    return runner.dist.size > 1 and not runner.weights.resident


def can_share(blocks: nn.Module) -> bool:
    """Return whether no two blocks share a weight, so that each can be sharded alone."""
    held = [parameter for block in blocks for parameter in block.parameters()]
    return len(held) == len(set(held))


def check_rows(blocks: nn.Module, name: str, ranks: int) -> None:
    """Raise UserError if there are more ranks than rows of a matrix, or experts of a stack."""
    for linear in linears_of(blocks, name):
        one = getattr(linear.module, linear.parameter)
        rows = linear.shape[0] if linear.expert is None else len(one)
        if rows < ranks:
            what = f"{rows} rows" if linear.expert is None else f"{rows} experts"
            fewer = "fewer than the ranks that would share them out for --recover"
            problem = f"{linear.parameter_name} has {what}, {fewer}"
            raise UserError(f"WORLD_SIZE {ranks}", problem, f"Start at most {rows}")


def sharded_dims(block: nn.Module, ranks: int) -> dict[str, int | None]:
    """Return {path of a parameter: dimension that is sharded}; None: it stays whole.

    FSDP accepts parameters of one dtype, and pads only the first dimension.
    """
    linears, _ = find_linears(block, "")
    columns = {id(one.module) for one in linears if one.transposed and one.expert is None}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in block.parameters():
        sizes[parameter.dtype] += parameter.numel() * parameter.is_floating_point()
    dtype, dims = max(sizes, key=sizes.__getitem__), {}
    for path, one in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        dim = int(id(owner) in columns and one.dim() == 2)
        fits = one.dtype == dtype and one.dim() > dim and one.shape[dim] >= ranks
        dims[path] = dim if fits and (dim == 0 or one.shape[dim] % ranks == 0) else None
    return dims


def shard_of(tensor: Tensor, dim: int | None, dist: DistContext) -> Tensor:
    """Return a view of this rank's shard of a tensor, as in FSDP; `dim` None: all of it."""
    if dim is None:
        return tensor
    count = tensor.shape[dim]
    step = -(-count // dist.size)
    start = min(dist.rank * step, count)
    return tensor.narrow(dim, start, min(step, count - start))


def shard_of_masters(
    masters: Tensor, grid: Grid, dim: int | None, dist: DistContext
) -> tuple[Tensor, Grid]:
    """Return copies of this rank's shard of the masters of a parameter, and of their grid.

    A single rank, which trains blocks on the host, has all of them there.
    """
    if dist.size == 1:
        return masters.cpu(), Grid(grid.form, grid.transposed, grid.scales.cpu())
    if dim is None:
        return masters, grid
    scales = grid.scales.view(masters.shape[dim], -1, grid.scales.shape[-1])
    scales = shard_of(scales, 0, dist).flatten(0, 1).clone()
    return shard_of(masters, dim, dist).clone(), Grid(grid.form, grid.transposed, scales)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a parameter or gradient, a view; all of a plain tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def squares(gradient: Tensor) -> Tensor:
    """Return the sum of squares of a gradient (n,), float64.

    It takes no copy of the gradient, and in one float32 sum most of 10^8 terms would be lost.
    """
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradient.split(PART)]
    return torch.stack(norms).square().sum()


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


State = tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]  # tensors by name, and facts


class WholeWeights:
    """Weights that each rank holds whole; ranks sum the gradients of their windows.

    Training takes place inside this context. `blocks` are trained, and `dims` has the dimension
    along which a parameter of theirs is sharded, if one is. `folder` is for checkpoints.
    """

    in_step = False  # whether all ranks must make the same calls

    def __init__(self, runner: BlockRunner, teacher: BlockRunner | None = None) -> None:
        self.runner, self.dist, self.blocks = runner, runner.dist, runner.blocks
        self.dims: dict[str, int | None] = {}
        self.folder = runner.weights.finished  # only in the main rank

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def forward(self, states: HiddenStates) -> Tensor:
        """Return a batch's hidden states (n, tokens, hidden) after the last block, with a graph."""
        hidden, run = states.hidden, run_block
        if self.runner.checkpointed:
            run = partial(checkpoint, run_block, use_reentrant=False)
        for block, ((args, kwargs),) in zip(self.blocks, states.block_args, strict=True):
            hidden = run(block, hidden, args, kwargs)
        return hidden

    def sum_gradients_(self, gradient: Tensor, n_sharded: int, loss: Tensor) -> Tensor:
        """Sum a buffer of gradients and the loss over ranks in place; return the gradient's norm.

        The first `n_sharded` gradients are of shards, and no sums.
        """
        self.dist.sum_([gradient, loss])
        return squares(gradient).sqrt()

    def write_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a checkpoint to `folder`, after `facts["step"]` steps."""
        self.folder.write(RECOVERY, tensors, facts)

    def read_state(self) -> State | None:
        """Return the last checkpoint of an interrupted run. Every rank must call this."""
        return self.runner.weights.read_kept(RECOVERY)

    def scales(self, grids: dict[str, Grid]) -> dict[str, Tensor]:
        """Return whole scales (rows, groups) of grids, by every name of a parameter."""
        parameters = dict(self.runner.model.named_parameters(remove_duplicate=False))
        scales = {id(parameters[name]): grid.scales for name, grid in grids.items()}
        return {name: scales[id(one)] for name, one in parameters.items() if id(one) in scales}

    def summary(self, whole: list[int]) -> list[str]:
        """Return lines for the user; `whole` are the sizes of tensors that are not sharded."""
        size = self.dist.size
        line = f"recovery: blocks share weights, so each of {size} ranks holds all weights"
        return [line] * (size > 1)


class ShardedWeights:
    """Weights of which each rank holds a shard: methods are as in `WholeWeights`.

    Inside this context the blocks of the runner and of its teacher are sharded. If no error ends
    it, the trained blocks are written to files.
    """

    in_step = True

    def __init__(self, runner: BlockRunner, teacher: BlockRunner) -> None:
        self.runner, self.dist = runner, runner.dist
        self.stores = [(one, ShardedStore(one.weights)) for one in (runner, teacher)]
        store = self.stores[0][1]
        self.blocks, self.root, self.dims = store.twins, store.root, {}
        for index, dims in enumerate(store.dims):
            self.dims |= {f"{index}.{path}": dim for path, dim in dims.items()}

    def __enter__(self) -> Self:
        known, self.folder = None, self.runner.weights.finished
        if self.folder:
            known = self.folder.label, str(self.folder.path.absolute()), self.folder.digest
        if (known := self.dist.all_gather_object(known)[0]) and not self.folder:
            self.folder = RunFolder.joined(*known)  # each rank writes its checkpoints there
        for runner, store in self.stores:
            runner.weights = store
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for runner, store in self.stores:
            runner.weights = store.files
            store.close(write_back=runner is self.runner and kind is None)

    def forward(self, states: HiddenStates) -> Tensor:
        return self.root(partial(WholeWeights.forward, self, states))

    def sum_gradients_(self, gradient: Tensor, n_sharded: int, loss: Tensor) -> Tensor:
        replicated, of_shards = gradient[n_sharded:], squares(gradient[:n_sharded])
        self.dist.sum_([replicated, loss, of_shards])
        return (of_shards + squares(replicated)).sqrt()

    def write_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write each rank's checkpoint, then remove the one before."""
        file = self.folder.write(f"{self._state}-{facts['step']}", tensors, facts)
        self.dist.barrier()  # until all are written, the ones before are the complete state
        for each in self.folder.path.glob(f"{self._state}-*.safetensors"):
            if each != file:
                each.unlink()

    def read_state(self) -> State | None:
        """Return this rank's shard of the last checkpoint that all ranks have, and its facts."""
        if not self.folder:
            return None
        files = self.folder.path.glob(f"{self._state}-*.safetensors")
        steps = {int(file.stem.rpartition("-")[2]) for file in files}
        steps = set.intersection(*self.dist.all_gather_object(steps))
        kept = self.folder.read(f"{self._state}-{max(steps)}") if steps else None
        if not all(self.dist.all_gather_object(kept is not None)):
            return None
        return iter(kept[0].items()), kept[1]

    def scales(self, grids: dict[str, Grid]) -> dict[str, Tensor]:
        prefix = f"{self.runner.name}."  # no two names have one parameter
        return {name: self._whole(name.removeprefix(prefix), one) for name, one in grids.items()}

    def summary(self, whole: list[int]) -> list[str]:
        but = f", except {len(whole)} tensors with {sum(whole):,} weights"
        return [f"recovery: {self.dist.size} ranks share the trained weights{but * bool(whole)}"]

    @property
    def _state(self) -> str:
        return f"{RECOVERY}-{self.dist.rank:05d}-of-{self.dist.size:05d}"

    def _whole(self, path: str, grid: Grid) -> Tensor:
        """Gather the scales (rows, groups) of a parameter's grid."""
        dim, shape = self.dims[path], self.blocks.get_parameter(path).shape
        if dim is None:
            return grid.scales
        rows = 1 if len(shape) == 2 else shape[1 + grid.transposed]  # rows per index of `dim`
        whole = grid.scales.new_zeros(shape[dim], rows, grid.scales.shape[-1])
        shard_of(whole, 0, self.dist).copy_(grid.scales.view(-1, *whole.shape[1:]))
        self.dist.sum_([whole])
        return whole.flatten(0, 1)


class Together(nn.Module):
    """The FSDP root of blocks: every forward pass that is back-propagated is a call of it.

    Under one root, blocks hold one whole float32 gradient between them, and share streams. With a
    root each, they would hold all gradients until the backward pass ends.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        return run()


class ShardedStore(TrainedStore):
    """The blocks of a store of files, sharded over the ranks.

    FSDP manages the `twins`. `on_device` gathers a block whole, so runs with replaced forwards
    gather nothing. All ranks must call `on_device`, and each twin, the same number of times.
    """

    collective = True

    def __init__(self, files: FileBlockStore) -> None:
        from torch.distributed.fsdp import fully_shard

        super().__init__(files)
        self.dims = [sharded_dims(block, self.dist.size) for block in self.blocks]
        mesh = DeviceMesh.from_group(torch_dist.group.WORLD, self.device.type)
        self.twins = nn.ModuleList(self._twin(index, mesh) for index in range(len(self.blocks)))
        self.root = fully_shard(Together(self.twins), mesh=mesh)

    def fetch(self, index: int) -> None:
        twin = self.twins[index]
        with answered(self.dist):
            twin.unshard()
        for path, parameter in twin.named_parameters():
            set_tensor(self.blocks[index], path, parameter.data)

    def evict(self, index: int) -> None:
        super().evict(index)
        self.twins[index].reshard()

    def _twin(self, index: int, mesh: DeviceMesh) -> nn.Module:
        """Return a copy of a block, sharded by FSDP; only this rank's shard of it is read."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        twin = self.empty_twin(index)
        dim_of = self.dims[index]
        dims = {one: dim_of[path] for path, one in twin.named_parameters()}
        fully_shard(
            twin,
            mesh=mesh,
            reshard_after_forward=True,
            shard_placement_fn=lambda one: Shard(dims[one]),
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            ignored_params={one for one, dim in dims.items() if dim is None},
        )
        twin._apply(lambda one: torch.empty_like(one, device=self.device) if one.is_meta else one)
        own = {path: local(one) for path, one in twin.named_parameters()}
        shards = self.files.each(index, lambda path, one: shard_of(one, dim_of[path], self.dist))
        for path, _, shard in shards:
            own[path].copy_(shard)
        twin.set_gradient_divide_factor(1.0)  # gradients are sums
        twin.set_force_sum_reduction_for_comms(True)
        if hasattr(twin, "set_reduce_scatter_unused_params"):  # newer than the oldest torch allowed
            twin.set_reduce_scatter_unused_params(True)
        return twin
