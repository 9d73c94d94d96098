"""Where the weights of decoder blocks are kept while they are away: in host memory, or on disk.

A store knows each block's tensors by their path in the block. In host memory every block has a
region of its own, in which its tensors stand one behind another: a block is copied to a GPU in one
piece, and what becomes of it (pruned, packed) goes back into the same region. On disk, a block is
read from the checkpoint's own files until it is changed, and then from a file in a folder.

Several processes of a machine may share a store: one writes, and all know what stands where.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.util.errors import UserError

ALIGNED = 512  # bytes; where a tensor begins, as torch's own on a GPU
PARTS = 4  # tensors, at most, that one becomes


@dataclass(frozen=True)
class Slot:
    """Where a tensor stands in memory."""

    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor, a view of `memory` (bytes,)."""
        if self.start == self.end:
            return torch.empty(self.shape, dtype=self.dtype, device=memory.device)
        return memory[self.start : self.end].view(self.dtype).view(self.shape)


Slots = dict[str, Slot]


def side_by_side(tensors: Mapping[str, Tensor]) -> Slots:
    """One behind another, from 0."""
    slots: Slots = {}
    start = 0
    for name, tensor in tensors.items():
        slots[name] = Slot(start, tuple(tensor.shape), tensor.dtype)
        start = aligned(slots[name].end)
    return slots


def aligned(size: int) -> int:
    """`size` bytes, rounded up to where the next tensor begins."""
    return -(-size // ALIGNED) * ALIGNED


def end_of(slots: Slots) -> int:
    """Bytes from the start of a region to the end of its last tensor."""
    return max((slot.end for slot in slots.values()), default=0)


class BlockStore(Protocol):
    """What BlockPlacement asks of either kind."""

    def piece(self, index: int) -> tuple[Tensor, Slots] | None:
        """Block `index` in one piece of host memory, (bytes,), where it stands in one."""

    def tensors(self, index: int) -> dict[str, Tensor]:
        """{path in the block: tensor on the host}; not to be written to."""

    def tensor(self, index: int, path: str) -> Tensor:
        """One of them."""

    def replace_(
        self, index: int, tensors: Mapping[str, Tensor], saved: Mapping[str, torch.dtype]
    ) -> None:
        """Block `index` consists of these tensors from now on; `saved`: as what each is saved."""


@dataclass
class HostStore:
    """In host memory. `writes`: this is the process that does, of those that share it."""

    memory: Tensor  # (bytes,)
    starts: list[int]  # of the blocks' regions; each ends where the next begins
    slots: list[Slots]  # within a region
    writes: bool = True

    @classmethod
    def layout(cls, blocks: Iterable[Mapping[str, Tensor]]) -> tuple[int, list[int], list[Slots]]:
        """Bytes in all, and what stands where, of blocks whose tensors may be on any device."""
        slots = [side_by_side(tensors) for tensors in blocks]
        starts, total = [], 0
        for each in slots:
            starts.append(total)
            # a packed weight is several tensors, each of which may have to be aligned
            total += aligned(end_of(each)) + PARTS * ALIGNED * len(each)
        return total, starts, slots

    def piece(self, index: int) -> tuple[Tensor, Slots] | None:
        slots = self.slots[index]
        return self._region(index)[: end_of(slots)], slots

    def tensors(self, index: int) -> dict[str, Tensor]:
        region = self._region(index)
        return {path: slot.of(region) for path, slot in self.slots[index].items()}

    def tensor(self, index: int, path: str) -> Tensor:
        return self.slots[index][path].of(self._region(index))

    def replace_(
        self, index: int, tensors: Mapping[str, Tensor], saved: Mapping[str, torch.dtype]
    ) -> None:
        slots, region = side_by_side(tensors), self._region(index)
        assert end_of(slots) <= len(region), "a block has grown"
        self.slots[index] = slots
        for path, slot in slots.items() if self.writes else ():
            slot.of(region).copy_(tensors[path])

    def _region(self, index: int) -> Tensor:
        ends = [*self.starts[1:], len(self.memory)]
        return self.memory[self.starts[index] : ends[index]]


Place = dict[str, str]  # safetensors_file, weight_name and dtype, as accelerate notes them


@dataclass
class DiskStore:
    """In files: of the checkpoint, and in `folder` what was changed, in the dtype it is saved in.

    `writes`: as in HostStore.
    """

    folder: str
    index: list[dict[str, Place]]  # [block][path]
    writes: bool = True
    changes: dict[int, int] = field(default_factory=dict)  # how often each block was written

    def piece(self, index: int) -> tuple[Tensor, Slots] | None:
        return None

    def tensors(self, index: int) -> dict[str, Tensor]:
        return {path: self.tensor(index, path) for path in self.index[index]}

    def tensor(self, index: int, path: str) -> Tensor:
        place = self.index[index][path]
        file = place["safetensors_file"]
        try:
            with safe_open(file, framework="pt") as stored:
                tensor = stored.get_tensor(place["weight_name"])
        except (OSError, SafetensorError) as error:
            name = f"block {index}, {path}"
            raise UserError(f"--model: {name} can't be read from {file}: {error}") from error
        return tensor.to(getattr(torch, place["dtype"]))

    def replace_(
        self, index: int, tensors: Mapping[str, Tensor], saved: Mapping[str, torch.dtype]
    ) -> None:
        times = self.changes.get(index, 0)
        file = self._file(index, times)
        self.changes[index] = times + 1
        if self.writes:
            rounded = {path: tensor.to(saved[path]) for path, tensor in tensors.items()}
            self._write(index, file, rounded)
            if times:
                self._file(index, times - 1).unlink(missing_ok=True)
        self.index[index] = {
            path: {
                "safetensors_file": str(file),
                "weight_name": path,
                "dtype": dtype_name(tensor.dtype),
            }
            for path, tensor in tensors.items()
        }

    def _write(self, index: int, file: Path, tensors: Mapping[str, Tensor]) -> None:
        here = {path: tensor.to("cpu").contiguous() for path, tensor in tensors.items()}
        try:
            save_file(here, str(file))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--offload {self.folder}: block {index} can't be written ({error}); "
                "name a folder on a disk with room"
            ) from error

    def _file(self, index: int, times: int) -> Path:
        return Path(self.folder) / f"block-{index}-{times}.safetensors"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
