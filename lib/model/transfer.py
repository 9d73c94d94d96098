"""Hidden states that are kept in host memory: to the GPU and back while it computes.

Copies run on a stream of their own, in the order in which they are asked for; so a batch that was
written comes back as it was written. Where states are kept on the device, nothing is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

AHEAD = 2  # batches that the host may be ahead of the GPU: what they use can't be used again yet


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the host, locked in place, so that a GPU copies it beside other work."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


class Transfer:
    """Between buffers (windows, tokens, hidden) and `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stored: deque[torch.cuda.Event] = deque()  # the last copies to the host

    def buffer(self, count: int, hidden: Tensor, state_device: torch.device | str) -> Tensor:
        """Room on `state_device` for `count` windows like those of hidden (n, tokens, hidden)."""
        shape = (count, *hidden.shape[1:])
        if self.side is not None and torch.device(state_device).type == "cpu":
            return empty_pinned(shape, hidden.dtype)
        return torch.empty(shape, dtype=hidden.dtype, device=state_device)

    def copy(self, buffer: Tensor) -> Tensor:
        """Another buffer with the same contents."""
        if self._apart(buffer):
            self.side.synchronize()  # what was stored may be on its way
        return self.buffer(len(buffer), buffer, buffer.device).copy_(buffer)

    def batches(self, buffer: Tensor, cuts: Sequence[slice]) -> Iterator[Tensor]:
        """Each cut of the buffer on the device, the next on its way while one is in use."""
        coming = [self._send_for(buffer, cut) for cut in cuts[:1]]
        computed: deque[torch.cuda.Event] = deque()
        for index in range(len(cuts)):
            coming += [self._send_for(buffer, cut) for cut in cuts[index + 1 : index + 2]]
            yield self._arrived(*coming.pop(0))
            if self._apart(buffer):
                _wait_for_older(computed, torch.cuda.current_stream(self.device))

    def fetch(self, buffer: Tensor, cut: slice) -> Tensor:
        """One cut of the buffer, on the device."""
        return self._arrived(*self._send_for(buffer, cut))

    def store_(self, buffer: Tensor, cut: slice, value: Tensor) -> None:
        """Write a value that the device may still be computing."""
        if not self._apart(buffer):
            buffer[cut] = value
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            buffer[cut].copy_(value, non_blocking=True)
        value.record_stream(self.side)  # or its memory is taken again before it was read
        _wait_for_older(self.stored, self.side)

    def _apart(self, buffer: Tensor) -> bool:
        return self.side is not None and buffer.device.type == "cpu"

    def _send_for(self, buffer: Tensor, cut: slice) -> tuple[Tensor, torch.cuda.Event | None]:
        if not self._apart(buffer):
            return buffer[cut].to(self.device), None
        with torch.cuda.stream(self.side):
            return buffer[cut].to(self.device, non_blocking=True), self.side.record_event()

    def _arrived(self, tensor: Tensor, sent: torch.cuda.Event | None) -> Tensor:
        if sent is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(sent)
            tensor.record_stream(now)
        return tensor


def _wait_for_older(events: deque[torch.cuda.Event], stream: torch.cuda.Stream) -> None:
    """Note where `stream` stands, and wait until it has passed where it stood AHEAD notes ago."""
    events.append(stream.record_event())
    if len(events) > AHEAD:
        events.popleft().synchronize()
