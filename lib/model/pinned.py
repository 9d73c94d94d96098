"""Host memory locked in place, so that a GPU copies it beside other work; exactly as much as asked.

torch's own pinned memory comes in powers of two, and stays taken when it is freed: of a model of 70
billion parameters 15 GiB for nothing. Here plain memory is registered with CUDA for as long as a
tensor uses it. Where CUDA refuses to, copies work as ever, but the host waits for each.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

PORTABLE = 1  # of cudaHostRegister: for every context of this process
log = logging.getLogger(__name__)


class HostMemory(mmap.mmap):
    """Pages of their own, which no other registration touches.

    `mmap.mmap`'s arguments; `tensor` keeps them, and the lock, alive.
    """

    release: Callable[[], None] | None = None  # of the lock

    def tensor(self) -> Tensor:
        """All of it, as bytes."""
        return torch.frombuffer(self, dtype=torch.uint8)

    def lock(self) -> None:
        """Lock it in place, from now on until nothing uses it any more."""
        address = self.tensor().data_ptr()
        if register(address, len(self)):
            self.release = partial(unregister, address)
        else:
            log.warning("CUDA can't lock %d bytes of host memory in place: copies wait", len(self))

    def __del__(self) -> None:  # before the pages go; a weak reference would be told after that
        if self.release:
            self.release()


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the host, locked in place; its memory is given back with it."""
    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(tuple(shape), dtype=dtype)
    held = HostMemory(-1, size)
    held.lock()
    return held.tensor().view(dtype).view(tuple(shape))


def register(address: int, size: int) -> bool:
    """Whether CUDA has locked these bytes."""
    done = int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE)) == 0
    if not done:
        try:  # the error stays, and would be raised by whatever comes next
            torch.zeros(1, device="cuda").add_(1).item()
        except RuntimeError:
            pass
    return done


def unregister(address: int) -> None:
    """Let go of what `register` locked, when no copy is under way any more."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
