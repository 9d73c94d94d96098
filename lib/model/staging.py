"""Copies blocks from files to a GPU through two pinned buffers, while another block computes.

CUDA overlaps copies with other work only from pinned host memory. Two pinned buffers of a block's
size take turns: one is filled while the other is copied on its own stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from lib.model.transfer import empty_pinned

ALIGNED = 512  # bytes; tensors begin at multiples of it, as in torch's allocator


class Staging:
    """Copies each block to `device` in one piece."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.buffers: list[Tensor | None] = [None, None]  # (bytes,)
        self.copied: list[torch.cuda.Event | None] = [None, None]  # when each buffer was copied
        self.turn = 0
        self.ahead: tuple[int, dict[str, Tensor], Tensor] | None = None

    def send(
        self, index: int, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """Start copying block `index`: its tensors by path, cast to `dtypes`."""
        starts, end = {}, 0
        for path, tensor in tensors.items():
            starts[path] = end
            size = tensor.numel() * dtypes[path].itemsize
            end += -(-size // ALIGNED) * ALIGNED
        self.turn = 1 - self.turn
        buffer = self._buffer(end)

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                path: _view(memory, starts[path], tensor.shape, dtypes[path])
                for path, tensor in tensors.items()
            }

        for path, view in views(buffer).items():
            view.copy_(tensors[path])
        with torch.cuda.stream(self.side):
            piece = buffer[:end].to(self.device, non_blocking=True)
            self.copied[self.turn] = self.side.record_event()
        self.ahead = index, views(piece), piece

    def take(self, index: int) -> dict[str, Tensor] | None:
        """Return the tensors of the block that was sent last if that is `index`, else None."""
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead[0] != index:
            return None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.side)
        ahead[2].record_stream(stream)  # or its memory is reused too early
        return ahead[1]

    def _buffer(self, size: int) -> Tensor:
        """Return the buffer whose turn it is, of at least `size` bytes, after its last copy."""
        if self.copied[self.turn]:
            self.copied[self.turn].synchronize()
        buffer = self.buffers[self.turn]
        if buffer is None or len(buffer) < size:
            buffer = self.buffers[self.turn] = empty_pinned((size,), torch.uint8)
        return buffer


def _view(memory: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor that begins at byte `start` of `memory` (bytes,)."""
    return memory[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
