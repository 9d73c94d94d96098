"""The column loop as one kernel: on a GPU, or in Triton's interpreter where Triton is installed."""

from functools import partial

import pytest
import torch
from skips import NO_TRITON
from support import CPU
from test_sparsegpt import assert_as_reference, problem, solve

from lib.methods import sparsegpt
from lib.methods.column_loop import (
    TOLERANCE,
    TRIALS,
    column_loop,
    deviation,
    random_block,
    settle_plainly_,
)
from lib.methods.sparsity import Sparsity

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ["unstructured", "2:4", "4:8"]


@pytest.fixture
def settle_():
    pytest.importorskip("triton", reason=NO_TRITON)
    from lib.methods.column_kernel import settle_

    return settle_


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, rows", [(8, 1), (104, 19), (128, 9)])
def test_as_the_plain_loop(settle_, size, rows, kind):
    sparsity = Sparsity.parse(kind, 0.5)
    expected = random_block(size, rows, sparsity)
    actual = [tensor.to(DEVICE) for tensor in random_block(size, rows, sparsity)]
    settle_plainly_(*expected, sparsity)
    settle_(*actual, sparsity)
    for own, its in zip(expected[:2], actual[:2], strict=True):
        assert torch.allclose(own, its.cpu(), rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[1].cpu() != 0, expected[2] == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_loop_in_steps(kind):
    sparsity = Sparsity.parse(kind, 0.5)
    block = sparsegpt.ColumnBlock(104, [19], [sparsity], CPU)
    buffers = block.values, block.errors, block.mask, block.inverse, block.scale
    expected = random_block(104, 19, sparsity)
    for buffer, tensor in zip(buffers, expected, strict=True):
        buffer.copy_(tensor)
    block.settle_()
    if not sparsity.m:  # this loop chooses an unstructured mask itself
        expected[2].copy_(block.mask)
    settle_plainly_(*expected, sparsity)
    assert torch.allclose(block.values, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(block.errors, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_solver_with_the_kernel_is_as_published(settle_, kind, monkeypatch):
    monkeypatch.setattr(sparsegpt, "column_loop", lambda device: partial(on_device, settle_))
    x, [weight] = problem(200, 24)
    sparsity = Sparsity.parse(kind, 0.5)
    [pruned] = solve(x, [weight], sparsity)
    assert_as_reference(pruned, weight, x, sparsity)


def on_device(settle_, *arguments):
    *tensors, sparsity = arguments
    there = [tensor.to(DEVICE) for tensor in tensors]
    settle_(*there, sparsity)
    for tensor, its in zip(tensors, there, strict=True):
        tensor.copy_(its)


def test_the_check_finds_a_wrong_kernel():
    for sparsity in TRIALS:
        assert deviation(settle_plainly_, CPU, sparsity) == 0
        assert deviation(lambda *_: None, CPU, sparsity) > TOLERANCE
        assert deviation(forgets_the_scale_, CPU, sparsity) > TOLERANCE or not (sparsity.m)


def forgets_the_scale_(values, errors, mask, inverse, scale, sparsity):
    settle_plainly_(values, errors, mask, inverse, torch.ones_like(scale), sparsity)


def test_no_kernel_on_a_cpu():
    assert column_loop(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel is found")
def test_a_gpu_without_the_kernel_is_told_once():
    column_loop.cache_clear()
    with pytest.warns(UserWarning, match="without its Triton kernel: ") as warned:
        assert column_loop(torch.device("cuda:7")) is None
        assert column_loop(torch.device("cuda:7")) is None
    assert len(warned) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_kernel():
    assert column_loop(torch.device("cuda:0")) is not None
