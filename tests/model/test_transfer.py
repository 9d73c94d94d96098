"""Hidden states in host memory: what comes back is what was written, in whatever order."""

from __future__ import annotations

import pytest
import tiny
import torch
from late import DEVICE, Gpu
from support import CPU, prune_

from lib.model.blocks import BlockRunner
from lib.model.transfer import AHEAD, Transfer, empty_pinned

CUTS = [slice(0, 2), slice(2, 4), slice(4, 5)]
STEPS = 4  # as many blocks, one after another
START = torch.arange(5.0)[:, None, None].expand(5, 30, 50)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
GPU = torch.device("cuda", 0)
DEVICES = [CPU, pytest.param(GPU, marks=cuda)]


def after(step: int, hidden: torch.Tensor) -> torch.Tensor:
    """What a block makes of hidden states."""
    return 2 * hidden - step


def expected() -> torch.Tensor:
    found = START
    for step in range(STEPS):
        found = after(step, found)
    return found


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_batch_arrives_before_it_is_written_over(device: torch.device) -> None:
    transfer = Transfer(device)
    buffer = transfer.buffer(5, START, CPU).copy_(START)
    for step in range(STEPS):
        for cut, hidden in zip(CUTS, transfer.batches(buffer, CUTS), strict=True):
            assert hidden.device == device
            transfer.store_(buffer, cut, after(step, hidden))
    found = torch.cat([transfer.fetch(buffer, cut).cpu() for cut in CUTS])
    assert torch.equal(found, expected())


@pytest.mark.parametrize("eager_side", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_no_stream_runs_ahead_of_what_it_needs(
    eager: bool, eager_side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with streams that are slow or quick, one or both, and memory that is used again."""
    gpu = Gpu(monkeypatch, eager, eager_side)
    transfer = Transfer(DEVICE)
    buffer = transfer.buffer(5, START, CPU).copy_(START)
    for step in range(STEPS):
        arriving = transfer.batches(buffer, CUTS)
        for cut in CUTS:
            hidden = next(arriving)  # not by zip, which keeps what it gave
            value = gpu.compute(lambda x, step=step: after(step, x), hidden)
            del hidden
            transfer.store_(buffer, cut, value)
            del value
    found = [transfer.fetch(buffer, cut) for cut in CUTS]
    gpu.current.synchronize()
    assert torch.equal(torch.cat(found), expected())


@pytest.mark.parametrize("stores", [False, True])
def test_the_host_does_not_run_ahead(stores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a batch is asked for, the one AHEAD before the last has been computed and stored: what
    is queued holds memory on the GPU."""
    gpu = Gpu(monkeypatch, eager=False, eager_side=False)
    transfer = Transfer(DEVICE)
    cuts = [slice(i, i + 1) for i in range(8)]
    buffer = transfer.buffer(8, START[:1], CPU).fill_(1)
    ended, left = [], []
    for cut, hidden in zip(cuts, transfer.batches(buffer, cuts), strict=True):
        left.append(len(ended) - sum(event.query() for event in ended))
        value = gpu.compute(lambda x: x + 1, hidden)
        if stores:
            transfer.store_(buffer, cut, value)
        ended.append((transfer.side if stores else gpu.current).record_event())
    assert max(left) <= AHEAD


@cuda
def test_locked_by_cuda() -> None:
    one = empty_pinned((3, 1000), torch.float16)
    assert one.is_pinned() and one[1].is_pinned()
    away = one.fill_(2).to(GPU, non_blocking=True)
    torch.cuda.synchronize()
    assert (away == 2).all()


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_copy_is_apart(device: torch.device) -> None:
    transfer = Transfer(device)
    buffer = transfer.buffer(5, torch.zeros(1, 3, 4), CPU).fill_(1)
    copy = transfer.copy(buffer)
    transfer.store_(buffer, CUTS[0], torch.zeros(2, 3, 4, device=device))
    assert buffer.shape == copy.shape == (5, 3, 4)
    assert (copy == 1).all() and copy.is_pinned() == buffer.is_pinned()


def test_no_batches() -> None:
    transfer = Transfer(CPU)
    assert list(transfer.batches(torch.zeros(0, 3, 4), [])) == []


@cuda
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_kept_on_the_host_or_on_the_gpu(method: str) -> None:
    found = []
    for state_device in (CPU, GPU):
        model = tiny.tiny_llama().to(GPU)
        runner = BlockRunner(model, GPU)
        prune_(runner, method, state_device=state_device)
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
