"""Hidden states in host memory: what comes back is what was written, in whatever order."""

import pytest
import tiny
import torch

from lib.methods.registry import Recipe
from lib.methods.sparsity import Sparsity
from lib.model.blocks import BlockRunner
from lib.model.pretrained import decoder_blocks
from lib.model.transfer import Transfer
from lib.prune import Pruner

CPU = torch.device("cpu")
CUTS = [slice(0, 2), slice(2, 4), slice(4, 5)]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=cuda)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_batch_arrives_before_it_is_written_over(device):
    transfer = Transfer(device)
    start = torch.arange(5.0)[:, None, None].expand(5, 300, 500)
    buffer = transfer.buffer(5, start, "cpu").copy_(start)
    for step in range(20):  # as many blocks, one after another
        for cut, hidden in zip(CUTS, transfer.batches(buffer, CUTS), strict=True):
            assert hidden.device == device
            transfer.store_(buffer, cut, 2 * hidden - step)
    for cut in CUTS:
        found = transfer.fetch(buffer, cut).cpu()
        expected = start[cut].clone()
        for step in range(20):
            expected = 2 * expected - step
        assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_copy_is_apart(device):
    transfer = Transfer(device)
    buffer = transfer.buffer(5, torch.zeros(1, 3, 4), "cpu").fill_(1)
    copy = transfer.copy(buffer)
    transfer.store_(buffer, CUTS[0], torch.zeros(2, 3, 4, device=device))
    assert buffer.shape == copy.shape == (5, 3, 4)
    assert (copy == 1).all() and copy.is_pinned() == buffer.is_pinned()


def test_no_batches():
    transfer = Transfer(CPU)
    assert list(transfer.batches(torch.zeros(0, 3, 4), [])) == []


@cuda
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_kept_on_the_host_or_on_the_gpu(method):
    windows = torch.randint(3, tiny.VOCAB, (5, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for keep_on in ("cpu", "cuda:0"):
        model = tiny.ARCHITECTURES["Llama"]().to("cuda:0")
        name, blocks = decoder_blocks(model)
        pruner = Pruner(
            BlockRunner(model, blocks, torch.device("cuda", 0)), name, Recipe(method), Sparsity(0.5)
        )
        pruner.run(windows, 2, keep_on)
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
