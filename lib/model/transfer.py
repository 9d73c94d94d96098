"""Copies hidden states between host memory and the GPU while it computes.

Copies run on their own stream in the order of the calls, so that a batch is read as it was written.
If states are kept on the device, nothing is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

AHEAD = 2  # batches that the host may be ahead of the GPU; their memory can't be reused yet


class Transfer:
    """Copies batches between buffers (windows, tokens, hidden) and `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.Stream(device) if device.type != "cpu" else None
        self.stored: deque[torch.Event] = deque()  # the last copies to the host

    def buffer(self, count: int, hidden: Tensor, state_device: torch.device | str) -> Tensor:
        """Return a buffer on `state_device` for `count` windows of the shape of `hidden`."""
        shape = (count, *hidden.shape[1:])
        # a GPU copies what is pinned while it computes
        pinned = self.side is not None and torch.device(state_device).type == "cpu"
        return torch.empty(shape, dtype=hidden.dtype, device=state_device, pin_memory=pinned)

    def copy(self, buffer: Tensor) -> Tensor:
        """Return another buffer with the same contents."""
        if self._apart(buffer):
            self.side.synchronize()  # pending copies to the buffer must end first
        return self.buffer(len(buffer), buffer, buffer.device).copy_(buffer)

    def batches(self, buffer: Tensor, cuts: Sequence[slice]) -> Iterator[Tensor]:
        """Yield each cut of the buffer on the device, while the next one is being copied."""
        coming = [self._send_for(buffer, cut) for cut in cuts[:1]]
        computed: deque[torch.Event] = deque()
        for index in range(len(cuts)):
            coming += [self._send_for(buffer, cut) for cut in cuts[index + 1 : index + 2]]
            tensor, sent = coming.pop(0)
            yield self._arrived(tensor, sent)
            if self._apart(buffer):
                wait_for_older(computed, torch.accelerator.current_stream(self.device))

    def fetch(self, buffer: Tensor, cut: slice) -> Tensor:
        """Return one cut of the buffer on the device."""
        tensor, sent = self._send_for(buffer, cut)
        return self._arrived(tensor, sent)

    def store_(self, buffer: Tensor, cut: slice, value: Tensor) -> None:
        """Write a value that the device may still be computing into the buffer."""
        if not self._apart(buffer):
            buffer[cut] = value
            return
        self.side.wait_stream(torch.accelerator.current_stream(self.device))
        with self.side:
            buffer[cut].copy_(value, non_blocking=True)
        value.record_stream(self.side)  # or its memory is reused before it was read
        wait_for_older(self.stored, self.side)

    def _apart(self, buffer: Tensor) -> bool:
        return self.side is not None and buffer.device.type == "cpu"

    def _send_for(self, buffer: Tensor, cut: slice) -> tuple[Tensor, torch.Event | None]:
        if not self._apart(buffer):
            return buffer[cut].to(self.device), None
        with self.side:
            return buffer[cut].to(self.device, non_blocking=True), self.side.record_event()

    def _arrived(self, tensor: Tensor, sent: torch.Event | None) -> Tensor:
        if sent is not None:
            stream = torch.accelerator.current_stream(self.device)
            stream.wait_event(sent)
            tensor.record_stream(stream)
        return tensor


def wait_for_older(events: deque[torch.Event], stream: torch.Stream) -> None:
    """Record an event on `stream`, and wait for the event recorded AHEAD calls ago."""
    events.append(stream.record_event())
    if len(events) > AHEAD:
        events.popleft().synchronize()
