"""A GPU made of two streams on the CPU, which work as late, or as early, as CUDA allows.

What a stream has not computed yet is nan, and the memory of a tensor that was dropped becomes nan
when its stream may use it for something else. So where a wait is missing, or a `record_stream`,
there is nan in the result.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)  # by name; all tensors are on the host
NAN = float("nan")


def poisoned_(memory: Tensor) -> Tensor:
    """nan in any floating-point dtype, also where it is seen as bytes."""
    return memory.fill_(NAN if memory.is_floating_point() else 255)


class Stream:
    """Work in order: done at once, or only when somebody waits for it."""

    eager = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def add(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        if self.eager:
            self.synchronize()

    def synchronize(self, end: int | None = None) -> None:
        while self.done < (len(self.work) if end is None else end):
            self.done += 1
            self.work[self.done - 1]()

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.add(event.synchronize)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Event:
    """A place in a stream's work."""

    def __init__(self, **_: bool) -> None:
        self.stream, self.end = Stream(), 0

    def record(self, stream: Stream) -> None:
        self.stream, self.end = stream, len(stream.work)

    def synchronize(self) -> None:
        self.stream.synchronize(self.end)

    def query(self) -> bool:
        return self.stream.done >= self.end


def _plain(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class Gpu:
    """Stands in for torch.cuda; `eager`: the stream that computes, `eager_side`: the others."""

    def __init__(self, patch: pytest.MonkeyPatch, eager: bool, eager_side: bool) -> None:
        self.current = Stream()
        self.current.eager = eager
        self.used_by: dict[int, set[Stream]] = {}  # streams that an address was recorded for
        self.to, self.copy_ = Tensor.to, Tensor.copy_
        patch.setattr(torch.cuda, "Stream", type("Side", (Stream,), {"eager": eager_side}))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self._inside)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        for module in ("transfer", "staging"):  # no memory can be locked here
            patch.setattr(f"lib.model.{module}.empty_pinned", _plain)
        patch.setattr(Tensor, "to", lambda x, *where, **how: self._to(x, *where, **how))
        patch.setattr(Tensor, "copy_", lambda x, *source, **how: self._copy_(x, *source, **how))
        patch.setattr(Tensor, "record_stream", lambda x, user: self.used_by[x.data_ptr()].add(user))

    def compute(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What `function` makes of tensors, as the current stream's work."""
        kept = [one.detach() for one in inputs]  # not what the caller holds: that may be dropped
        memory = poisoned_(torch.empty_like(inputs[0]))
        owner = self.current
        owner.add(lambda: self.copy_(memory, function(*kept)))
        out = memory.detach()
        self.used_by[out.data_ptr()] = set()
        weakref.finalize(out, self._drop, memory, owner)
        return out

    def _drop(self, memory: Tensor, owner: Stream) -> None:
        if not self.used_by[memory.data_ptr()] - {owner}:
            owner.add(lambda: poisoned_(memory))

    def _to(self, tensor: Tensor, *where, non_blocking: bool = False, **how) -> Tensor:
        if non_blocking:
            return self.compute(Tensor.clone, tensor)
        return self.to(tensor, *where, **how)

    def _copy_(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        kept = source.detach()
        if non_blocking:
            self.current.add(lambda: self.copy_(target, kept))
            return target
        return self.copy_(target, source)  # from host to host, whatever the streams do

    @contextmanager
    def _inside(self, stream: Stream) -> Iterator[None]:
        outside, self.current = self.current, stream
        yield
        self.current = outside
