"""The pretended device itself: what it sees of streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

A = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("waits", [True, False])
def test_pinned_memory_is_right_once_the_host_has_waited(waits: bool, device: Any) -> None:
    host, x = A.pin_memory(), A.cuda()
    there = torch.zeros(3, 4).pin_memory()
    copied = host.to("cuda", non_blocking=True) * 2  # no matter what the device has done by then
    there.copy_(x, non_blocking=True)
    x.mul_(2)  # later work of the same stream
    if waits:
        torch.accelerator.synchronize()
    assert torch.equal(there, A if waits else torch.zeros(3, 4))
    host.zero_()
    assert any("overwritten" in line for line in device.complaints()) == (not waits)
    assert torch.equal(copied.cpu(), 2 * A)


@pytest.mark.parametrize("missing", ["", "before", "after", "recorded"])
def test_work_out_of_order_is_seen(missing: str, device: Any) -> None:
    """Of the computing stream, of another, and of the first again, as each has waited."""
    side, stream = torch.Stream("cuda"), torch.accelerator.current_stream()
    x = A.cuda() + 1
    if missing != "before":
        side.wait_stream(stream)
    with side:
        y = x + 1
    if missing not in ("after", "recorded"):
        stream.wait_stream(side)
    if missing == "after":
        y * 2
    if missing != "recorded":
        x.record_stream(side)
    del x
    complaints = device.complaints()
    torch.accelerator.synchronize()
    assert bool(complaints) == bool(missing), complaints
    assert any("was freed" in line for line in complaints) == (missing == "recorded")
